"""Entry point of a training process: `python -m training.loop.run RUN_FOLDER`, alone or as a rank
under torchrun.

How the run ended is the last line of `events.jsonl`; torchrun replaces exit statuses. Started early
with `--wait FD`, it imports its libraries and receives its run folder over that socket; when the
other end closes first, it ends silently.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from training import commit
from training.errors import ConfigError, PipelineError, WorkspaceError
from training.loop.quick_imports import quick_imports
from training.runs import run_folder
from training.runs.event_log import EventLog, read_events

WAIT = "--wait"
_MAX_PATH_BYTES = 4096


def main(arguments: list[str]) -> int:
    """Train the run in the folder named by the only argument; 0 when it finished or was asked to
    stop."""
    waits = len(arguments) == 2 and arguments[0] == WAIT and arguments[1].isdecimal()
    if len(arguments) != 1 and not waits:
        print(f"usage: python -m training.loop.run RUN_FOLDER | {WAIT} FD", file=sys.stderr)
        return 2
    assigned = _listen(int(arguments[1])) if waits else None
    # Buckets take turns: pieces of a size that comes back later are lost to all others, unless
    # pieces can grow.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with quick_imports(freeze=__name__ == "__main__"):
        import torch

        from training.loop.trainer import Trainer
        from training.optimization.ranks import Ranks
    folder = (Path(arguments[0]) if assigned is None else assigned.get()).resolve()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        # Filling memory that is written anyway costs a quarter of a step and makes nothing more
        # deterministic.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    log: EventLog | None = None
    ranks: Ranks | None = None
    with contextlib.ExitStack() as held:
        try:
            if not folder.is_dir():
                raise ConfigError(f"run folder {folder} does not exist")
            ranks = Ranks()
            if ranks.rank == 0:
                held.enter_context(commit.lock(folder / run_folder.LOCK, f"run folder {folder}"))
                # Only the holder of the lock may write: a second trainer must not end the first
                # one's log.
                log = held.enter_context(EventLog(folder / run_folder.EVENTS))
            inputs, config = run_folder.read_inputs(folder), run_folder.read_config(folder)
            Trainer(
                folder=folder,
                config=config,
                inputs=inputs,
                ranks=ranks,
                log=log,
                stop_requested=stop.is_set,
            ).run()
        except Exception as error:
            reason = _reason(error)
            if log is not None:
                with contextlib.suppress(
                    WorkspaceError
                ):  # no space left: whoever waits for this process sees that, too
                    log.write("failed", samples_seen=_samples_seen(folder), reason=reason)
            if not isinstance(error, PipelineError):
                traceback.print_exc()
            print(f"training failed: {reason}", file=sys.stderr)
            if ranks is not None and ranks.size > 1 and ranks.device.type == "cuda":
                # Sums that a lost rank has left in the GPU's queue would be waited for at an
                # orderly end.
                sys.stderr.flush()
                os._exit(1)
            return 1
        ranks.close()
    return 0


def _listen(descriptor: int) -> "queue.Queue[Path]":
    """Wait in a thread for the run folder: it is queued, and output goes to the descriptor
    that comes with it.

    A launcher that ends or needs no trainer closes its end, and this process ends at once,
    whatever it imports.
    """
    assigned: queue.Queue[Path] = queue.Queue()

    def wait() -> None:
        with socket.socket(fileno=descriptor) as launcher:
            message, descriptors, _, _ = socket.recv_fds(launcher, _MAX_PATH_BYTES, 1)
            if not message:
                os._exit(0)
            (output,) = descriptors
            for number in (1, 2):
                os.dup2(output, number)
            os.close(output)
            assigned.put(Path(os.fsdecode(message)))

    threading.Thread(target=wait, daemon=True, name="launcher").start()
    return assigned


def _reason(error: Exception) -> str:
    """One line for the user."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"


def _samples_seen(folder: Path) -> int:
    """How far the run had come by its log."""
    return max(
        (event["samples_seen"] for event in read_events(folder / run_folder.EVENTS)), default=0
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
