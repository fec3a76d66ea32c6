"""What our step costs beside the least that it could: a bare loop, and a script as diffusers' SDXL
example has it.

Usage: python benchmarks/bench_step_loop.py [--rounds N] [--samples N]

Two measurements. First the floor: the demo's SDXL, one bucket of 128 x 128, 32 samples a step, text
encoders frozen; by turns a step of the product's trainer, one of a bare loop (encode the same
prompts with the same encoders, forward, backward, fused AdamW) and one of what diffusers' script
does (prompts tokenized and encoded live, its scheduler, clipping, AdamW as it comes, a learning
rate scheduler). Second the loop's own time: on the tests' tiny SDXL, the processor time that is
neither forward and backward passes, nor optimizer, clipping and averages, nor waiting for data.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))
MAX_OVERHEAD_MS = 2.0
MAX_RATIO_TO_BARE = 1.2
MAX_RATIO_TO_SCRIPT = 1.0
WARM_UP_STEPS = 10
_RATE, _DECAY = 1e-4, 0.01


class Clock:
    """Processor seconds of this thread inside of the wrapped calls; a call within another counts
    once."""

    def __init__(self) -> None:
        """Nothing spent."""
        self.seconds, self._depth = 0.0, 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            began, self._depth = time.thread_time(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - began

        return counted


class BareLoop:
    """UNet forward, backward and AdamW, with prompts that are encoded in the step: nothing can be
    left out of it."""

    def __init__(self, trainer: Any) -> None:
        """Copy the trainer's UNet, so that both train, and share its frozen encoders."""
        import torch

        self.parts, self.signal = trainer.state.parts, trainer.signal
        self.unet = copy.deepcopy(self.parts.unet)
        for parameter in self.unet.parameters():
            parameter.grad = None
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True
        )

    def step(self, draw: Any) -> float:
        """Train one batch."""
        import torch

        from training.loop.conditioning import make_time_ids
        from training.loop.noise import add_noise
        from training.models.text_encoders import encode_sdxl

        batch = draw.batch
        with torch.no_grad():
            text = encode_sdxl(*self.parts.text_encoders, *batch.ids)
        noised = add_noise(batch.latents, draw.noise, draw.timesteps, self.signal)
        time_ids = make_time_ids(batch.original_size, batch.crop_top_left, batch.target_size)
        added = {"text_embeds": text.pooled, "time_ids": time_ids}
        prediction = self.unet(
            noised,
            draw.timesteps,
            encoder_hidden_states=text.hidden_states,
            added_cond_kwargs=added,
        ).sample
        loss = torch.nn.functional.mse_loss(prediction, draw.noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


class Script:
    """A step as diffusers' `train_text_to_image_sdxl.py` makes it, without accelerate's share,
    prompts encoded live."""

    def __init__(self, trainer: Any) -> None:
        """Copy the UNet and take what the script would make."""
        import torch
        from diffusers import DDPMScheduler

        self.parts, self.unet = trainer.state.parts, copy.deepcopy(trainer.state.parts.unet)
        for parameter in self.unet.parameters():
            parameter.grad = None
        config = {**self.parts.noise_scheduler_config, "_class_name": "DDPMScheduler"}
        self.scheduler = DDPMScheduler.from_config(config)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=_RATE, weight_decay=_DECAY)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)

    def step(self, draw: Any) -> float:
        """Train one batch."""
        import torch

        batch, states = draw.batch, []
        with torch.no_grad():
            for tokenizer, encoder in zip(
                self.parts.tokenizers, self.parts.text_encoders, strict=True
            ):
                ids = tokenizer(
                    batch.prompts,
                    padding="max_length",
                    max_length=77,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                output = encoder(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
            pooled = output[0]
        noise = torch.randn_like(batch.latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(noise),))
        noised = self.scheduler.add_noise(batch.latents, noise, timesteps)
        sizes = zip(batch.original_size.tolist(), batch.crop_top_left.tolist(), strict=True)
        target = batch.target_size[0].tolist()
        time_ids = torch.cat([torch.tensor([[*size, *crop, *target]]) for size, crop in sizes])
        added = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = self.unet(
            noised,
            timesteps,
            encoder_hidden_states=torch.cat(states, dim=-1),
            added_cond_kwargs=added,
        ).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def measure_floor(folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Wall seconds of each step of the product, the bare loop and the script, by turns, and of our
    steps' parts."""
    import tiny_runs
    import torch

    from training.buckets.geometry import Size
    from training.loop.prefetch import Prefetch
    from training.loop.trainer import Trainer
    from training.models.weights import read_config
    from training.optimization.ranks import Ranks
    from training.runs.event_log import EventLog

    # As training/loop/run.py: what the product's own steps run with.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    base = ROOT / "demo" / "models" / "base"
    changes = {
        "num_samples": 10**6, "reduction": "fast", "train_text_encoder": False, "prompts.max_chunks": 1,
        "batch.global_batch_size": 32, "batch.micro_batch_size": 32, "validation.every_samples": 10**9,
        "checkpoints.every_samples": 10**9, "optimizer.ema_half_life_samples": 0, "loss.noise_offset": 0,
        "loss.watermark_weight": 1,
    }  # fmt: skip
    scale = read_config(base / "vae" / "config.json")["scaling_factor"]
    rows = tiny_runs.training_rows(32 * 4, 8, (Size(128, 128),))
    run = tiny_runs.build_run(
        folder, base, "floor", changes, rows, max_bytes=10**8, scaling_factor=scale
    )
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "script": []}
    with EventLog(run.folder / "events.jsonl") as log:
        trainer = Trainer(
            folder=run.folder, config=run.config, inputs=run.inputs, ranks=Ranks(), log=log,
            stop_requested=lambda: False,
        )  # fmt: skip
        bare, script = BareLoop(trainer), Script(trainer)
        parts = _timed_parts(trainer)
        for _ in range(rounds):
            trainer.state.clock.step_in_epoch = 0
            upcoming = trainer._upcoming()[: trainer.order.num_steps]
            with Prefetch(
                trainer._draw, upcoming, trainer.worker, run.config.compute.prefetch
            ) as draws:
                for rows_of_step in upcoming:
                    _time(seconds["ours"], trainer._step, draws)
                    draw, _ = trainer._draw(rows_of_step)
                    _time(seconds["bare"], bare.step, draw)
                    _time(seconds["script"], script.step, draw)
        trainer.worker.shutdown()
    kept = {name: values[WARM_UP_STEPS:] for name, values in seconds.items()}
    inside = {name: statistics.median(values[WARM_UP_STEPS:]) for name, values in parts.items()}
    inside["all else"] = statistics.median(kept["ours"]) - sum(inside.values())
    return kept, inside


def _timed_parts(trainer: Any) -> dict[str, list[float]]:
    """Wrap what our step is made of; returns seconds by part, which grow with every step."""
    arithmetic, parts = trainer.state.arithmetic, dict[str, list[float]]()
    places = {
        "text, forward and backward": (trainer, "_pass"), "clearing gradients": (arithmetic.gradients, "begin"),
        "norm": (arithmetic, "norm"), "clipping": (arithmetic, "unscale_and_clip"), "AdamW": (arithmetic, "step"),
    }  # fmt: skip

    def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            seconds.append(time.perf_counter() - began)
            return result

        return measured

    for name, (owner, attribute) in places.items():
        parts[name] = []
        setattr(owner, attribute, timed(getattr(owner, attribute), parts[name]))
    return parts


def _time(into: list[float], call: Callable[..., object], *arguments: object) -> None:
    began = time.perf_counter()
    call(*arguments)
    into.append(time.perf_counter() - began)


def measure_overhead(folder: Path, num_samples: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each step outside of model code, and of each whole step."""
    import tiny_runs

    from training.loop import trainer as loop

    clock, overheads, steps = Clock(), list[float](), list[float]()
    changes = {
        "num_samples": num_samples, "reduction": "fast", "batch.global_batch_size": 8, "batch.micro_batch_size": 4,
        "validation.every_samples": 10**9, "checkpoints.every_samples": 10**9,
    }  # fmt: skip

    def prepare(trainer: Any) -> None:
        arithmetic, state = trainer.state.arithmetic, trainer.state
        arithmetic.gradients.begin = clock.timed(arithmetic.gradients.begin)
        for name in ("norm", "unscale_and_clip", "step"):
            setattr(arithmetic, name, clock.timed(getattr(arithmetic, name)))
        if state.ema is not None:
            state.ema.update = clock.timed(state.ema.update)

    step, forward_and_backward = loop.Trainer._step, loop.Trainer._pass

    def timed_step(self: Any, draws: Any) -> bool:
        clock.seconds, began = 0.0, time.thread_time()
        going_on = step(self, draws)
        spent = time.thread_time() - began
        overheads.append(spent - clock.seconds)
        steps.append(spent)
        return going_on

    loop.Trainer._pass = clock.timed(forward_and_backward)  # type: ignore[method-assign]
    loop.Trainer._step = timed_step  # type: ignore[method-assign]
    base = tiny_runs.write_tiny_sdxl(folder / "base")
    run = tiny_runs.build_run(folder, base, "bench", changes)
    tiny_runs.train_here(run, prepare=prepare)
    loop.Trainer._pass, loop.Trainer._step = forward_and_backward, step  # type: ignore[method-assign]
    return overheads[WARM_UP_STEPS:], steps[WARM_UP_STEPS:]


def main() -> None:
    """Print both measurements beside their limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="four steps of each kind a round")
    parser.add_argument("--samples", type=int, default=1600)
    arguments = parser.parse_args()
    import tiny_runs  # noqa: F401  # pins one thread for the tests
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        floor, parts = measure_floor(Path(folder), arguments.rounds)
    ours = statistics.median(floor["ours"])
    for name, limit in (("bare", MAX_RATIO_TO_BARE), ("script", MAX_RATIO_TO_SCRIPT)):
        other = statistics.median(floor[name])
        ratio = statistics.median(a / b for a, b in zip(floor["ours"], floor[name], strict=True))
        print(
            f"a step of 32 at 128 x 128: ours {ours:.3f} s, {name} {other:.3f} s: {ratio:.2f} x (limit {limit:.2f})"
        )
    print(
        "of ours: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in parts.items())
    )
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overheads, steps = measure_overhead(Path(folder), arguments.samples)
    own, whole = statistics.median(overheads) * 1e3, statistics.median(steps) * 1e3
    worst = sorted(overheads)[int(0.95 * len(overheads))] * 1e3
    print(f"step of 2 micro-batches: {whole:.1f} ms of processor time, {len(steps)} steps")
    print(
        f"the loop's own time: {own:.2f} ms (limit {MAX_OVERHEAD_MS:.0f}), 95 % of the steps below {worst:.2f} ms"
    )


if __name__ == "__main__":
    main()
