"""Who works on which card. A card is held by flock on one file per machine and user, which the
kernel frees when its holder ends however it ends; whoever finds all of its cards held waits and
says for whom."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from training.config.workspace import DevicesConfig
from training.errors import ConfigError

Kind = Literal["train", "annotate", "encode", "evaluate"]

POLL_S = 0.5
"""How often a waiting process looks again, seconds."""


def state_folder() -> Path:
    """Where the locks lie: shared by all workspaces of a user, because they share the cards."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "diffusion-foundry"


@contextlib.contextmanager
def hold(
    kind: Kind,
    config: DevicesConfig,
    home: Path,
    *,
    gives_way: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[str]:
    """Hold one card for as long as the context lasts.

    Args:
        kind: What it is for; `[devices]` says which cards that may be.
        config: The workspace's `[devices]`.
        home: The workspace, named to whoever waits.
        gives_way: Take no card that anybody else waits for: for work that can be done at any time.
        say: Told for whom we wait, once for each holder.

    Yields:
        torch's name of the card, `cuda:0`; `cpu` at once, without importing torch, where there is
        no card.

    Raises:
        ConfigError: there are cards, and `[devices]` names none of them.
    """
    cards = _allowed_cards(kind, config)
    if not cards:
        yield "cpu"
        return
    name, file = _first_free(kind, cards, say, gives_way=gives_way)
    with file:
        _sign(file, _holder(kind, home))
        yield name
        _sign(file, "")


@contextlib.contextmanager
def hold_all(
    kind: Kind,
    config: DevicesConfig,
    home: Path,
    *,
    gives_way: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[tuple[str, ...]]:
    """Hold every card that is to be had: wait for one as `hold` does, then take all others that are
    free and that no one waits for.

    Args and errors: those of `hold`.

    Yields: torch's names of the cards, sorted; `cpu` alone where there is no card.
    """
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(hold(kind, config, home, gives_way=gives_way, say=say))
        names = [first]
        for name, card in _allowed_cards(kind, config).items():
            if name != first and not isinstance(file := _take(card, gives_way=True), str):
                stack.enter_context(file)
                _sign(file, _holder(kind, home))
                stack.callback(_sign, file, "")
                names.append(name)
        yield tuple(sorted(names))


def are_wanted(kind: Kind, config: DevicesConfig, names: Sequence[str]) -> bool:
    """Whether somebody waits for one of these cards, given by torch's names."""
    cards = _allowed_cards(kind, config)
    return any(_is_wanted(state_folder(), cards[name]) for name in names if name in cards)


@contextlib.contextmanager
def hold_for_trainer(
    config: DevicesConfig, home: Path, num_cards: int, *, say: Callable[[str], None] = print
) -> Iterator[tuple[list[str], list[int]]]:
    """Hold cards on behalf of a process that outlives this one: whoever inherits the descriptors
    holds them on.

    Args:
        config: The workspace's `[devices]`.
        home: The workspace, named to whoever waits.
        num_cards: One per rank.
        say: Told for whom we wait.

    Yields:
        The cards for CUDA_VISIBLE_DEVICES, and the descriptors to pass on; both empty where there
        is no card.

    Raises:
        ConfigError: `[devices] train` allows fewer cards than the run has ranks.
    """
    cards = _allowed_cards("train", config)
    if cards and len(cards) < num_cards:
        raise ConfigError(
            f"num_processes={num_cards}, but [devices] train allows {len(cards)} cards: {list(cards.values())}"
        )
    with contextlib.ExitStack() as stack:
        held: list[str] = []
        locks: list[int] = []
        while cards and len(held) < num_cards:
            name, file = _first_free("train", cards, say)
            stack.enter_context(file)
            _sign(file, _holder("train", home))
            held.append(cards.pop(name))
            locks.append(file.fileno())
        yield held, locks


def _allowed_cards(kind: Kind, config: DevicesConfig) -> dict[str, str]:
    """torch's name -> card, of those that `[devices]` allows for a kind of work; empty on a machine
    without cards."""
    visible = visible_cards()
    allowed = getattr(config, kind)
    cards = {
        f"cuda:{i}": card
        for i, card in enumerate(visible)
        if not allowed or card in map(str, allowed)
    }
    if visible and not cards:
        raise ConfigError(
            f"[devices] {kind} = {list(allowed)} names none of this machine's cards {visible}"
        )
    return cards


def _holder(kind: Kind, home: Path) -> str:
    return f"{kind} of {home} (pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')})"


def has_cards() -> bool:
    """Whether this machine may have cards that torch sees; asked without torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def visible_cards() -> list[str]:
    """The machine's numbers (or ids) of the cards that torch sees, in torch's order."""
    if not has_cards():
        return []
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(i) for i in range(torch.cuda.device_count())]
    return [card.strip() for card in chosen.split(",")][: len(numbers)] if chosen else numbers


def _first_free(
    kind: Kind, cards: dict[str, str], say: Callable[[str], None], *, gives_way: bool = False
) -> tuple[str, IO[str]]:
    """Wait for one of the cards; the open file holds it. Whoever waits and does not give way is
    seen to wait."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    said = ""
    with contextlib.ExitStack() as flags:
        while True:
            obstacles = []
            for name, card in cards.items():
                taken = _take(card, gives_way=gives_way)
                if not isinstance(taken, str):
                    return name, taken
                obstacles.append(f"{name} is {taken}")
            if not said and not gives_way:
                for card in cards.values():
                    flag = flags.enter_context((folder / f"cuda{card}.waiting").open("a"))
                    fcntl.flock(flag, fcntl.LOCK_SH)
            if said != (said := "; ".join(obstacles)):
                say(f"{kind} waits: {said}")
            time.sleep(POLL_S)


def _take(card: str, *, gives_way: bool) -> IO[str] | str:
    """Take a card if it can be had now: the open file that holds it, or what stands in the way."""
    file = (state_folder() / f"cuda{card}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            return f"held by {file.read() or 'a process that is just starting'}"
    if gives_way and _is_wanted(state_folder(), card):
        file.close()
        return "wanted by work that goes first"
    return file


def _is_wanted(folder: Path, card: str) -> bool:
    """Whether somebody waits for the card: the kernel takes the flag of a waiter that died."""
    with (folder / f"cuda{card}.waiting").open("a") as flag:
        try:
            fcntl.flock(flag, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sign(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
