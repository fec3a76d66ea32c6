"""All figures of a GPU in one call, part by part in the order of their worth, each within its time;
see gpu_figures.sh.

Full-size SDXL with random weights: bigASP's configuration recreated and the product's beside it,
every lever between them, the VAE, sampling, the annotators. FILE is replaced after every row, so
that a cut-off keeps what is done; a part that did not run says why and has no numbers.

Usage: python benchmarks/gpu_figures.py [--tiny] [--resume] [--out FILE] [--table FILE] [--until
EPOCH_SECONDS] Exit status 1 where a lever was not seen to act or a part failed, 3 where the GPU
itself failed: `--resume` goes on.
"""

import argparse
import dataclasses
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
SECONDS = 570.0
"""Of the whole call, unless told otherwise."""
MIN_PART_S = 10.0
"""A part is not begun with less."""
GOALS = {"training": 20.0, "ratio": 2.0, "encoding": 70.0, "sampling": 1.0}
"""Images per second on one H200, and times the recreated configuration."""
MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"
GPU_FAILED = 3

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all parts are told."""

    device: torch.device
    tiny: bool
    """Small models of the same classes, by the same functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the measurements."""

    name: str
    cap_s: float
    """Seconds that it may take at full size."""
    rows: Callable[[Setting], Iterator[Row]]
    """Measures one row after the other."""


class TimeUpError(BaseException):
    """A part's time is over; no library's `except Exception` may take it for a failure of its
    own."""


def training(setting: Setting) -> Iterator[Row]:
    """The recreated configuration, the product as it comes, and with all levers."""
    import train_throughput as bench

    size = bench.MICRO_BATCH // bench.TINY_MICRO_SCALE if setting.tiny else bench.MICRO_BATCH
    base = None
    ours = bench.defaults(size)
    best = dataclasses.replace(ours, run=dataclasses.replace(ours.run, precision="bf16"))
    for name, variant in (
        ("bigASP recreated", bench.recreated(size)),
        ("product's defaults", ours),
        ("and bf16", best),
    ):
        result = bench.measure(name, variant, base=base, offload=True, **_of_training(setting))
        base = base or result.images_per_s
        bench.print_result(result)
        yield dataclasses.asdict(result)


def levers(setting: Setting) -> Iterator[Row]:
    """One lever at a time, from the recreated configuration on."""
    import train_throughput as bench

    for result in bench.measure_all(**_of_training(setting)):
        bench.print_result(result)
        yield dataclasses.asdict(result)


def _of_training(setting: Setting) -> dict[str, Any]:
    import train_throughput as bench

    steps, accumulate = (1, 1) if setting.tiny else (2, 4)
    backend = bench.default_backend(tiny=setting.tiny)
    return {
        **dataclasses.asdict(setting),
        "steps": steps,
        "accumulate": accumulate,
        "backend": backend,
    }


def encoding(setting: Setting) -> Iterator[Row]:
    """The VAE on images of a megapixel."""
    import bench_latents as bench

    for precision, speed in bench.encoding(tiny=setting.tiny).items():
        yield {"name": f"VAE, {precision}", "images_per_s": speed, "goal": GOALS["encoding"]}


def sampling(setting: Setting) -> Iterator[Row]:
    """Images of 1024 x 1024 in 30 steps with guidance."""
    import bench_sampling as bench

    size, steps = (2, 2) if setting.tiny else (8, 30)
    results = bench.measure_all(
        setting.device,
        tiny=setting.tiny,
        batch_size=size,
        num_batches=1,
        num_steps=steps,
        precisions=("bf16",),
    )
    for result in results:
        name = f"sampling, {result.precision}, batch {result.batch_size}"
        yield {**dataclasses.asdict(result), "name": name, "goal": GOALS["sampling"]}


def annotators(setting: Setting) -> Iterator[Row]:
    """CLIP, the tagger and OWLv2: the networks alone, on prepared pixels; without a card the demo's
    small ones."""
    from training.estimates.cost import Rates

    assumed = Rates()
    for name, rate, make in (
        ("CLIP", assumed.embedding, _make_clip),
        ("tagger", assumed.tagging, _make_tagger),
        ("OWLv2", assumed.watermarks, _make_detector),
    ):
        adapter, side = make(setting)
        speed = _forward_rate(adapter, side, setting, batch_size=4 if setting.tiny else 64)
        print(f"{name:<28}{speed:>10.1f} images/s (foundry cost assumes {rate:g})", flush=True)
        yield {"name": name, "images_per_s": speed, "goal": rate}


def _make_clip(setting: Setting) -> tuple[Any, int]:
    from transformers import CLIPConfig, CLIPModel

    from training.annotators.clip import Clip
    from training.models.text_encoders import load_tokenizer

    if setting.tiny:
        clip = Clip.load(MODELS / "clip", setting.device)
        return clip, clip.crop
    # openai/clip-vit-large-patch14.
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14}  # fmt: skip
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    with setting.device:
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
    sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    return Clip(model, load_tokenizer(MODELS / "clip"), sizes, setting.device), 224


def _make_tagger(setting: Setting) -> tuple[Any, int]:
    from training.annotators.tagger import JOYTAG_STEM, JoyTagViT, Tagger

    if setting.tiny:
        tagger = Tagger.load(MODELS / "tagger", setting.device)
        return tagger, tagger.image_size
    # fancyfeast/joytag.
    with setting.device:
        model = JoyTagViT(
            n_tags=5813, image_size=448, num_blocks=12, patch_size=16, d_model=768, mlp_dim=3072, num_heads=12,
            cnn_stem=JOYTAG_STEM,
        )  # fmt: skip
    return Tagger(model, [str(number) for number in range(5813)], setting.device), 448


def _make_detector(setting: Setting) -> tuple[Any, int]:
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    from training.annotators.detector import Detector
    from training.models.text_encoders import load_tokenizer

    if setting.tiny:
        detector = Detector.load(MODELS / "owlv2", setting.device)
        return detector, detector.image_size
    # google/owlv2-base-patch16-ensemble; transformers' defaults but for the side.
    with setting.device:
        model = Owlv2ForObjectDetection(Owlv2Config(vision_config={"image_size": 960}))
    sizes = {"size": {"height": 960, "width": 960}}
    return Detector(
        model, load_tokenizer(MODELS / "owlv2"), sizes, "a watermark", setting.device
    ), 960


def _forward_rate(adapter: Any, side: int, setting: Setting, *, batch_size: int) -> float:
    """Images per second of an adapter's network, the best of three spans of a second."""
    pixels = torch.randn((batch_size, 3, side, side), device=setting.device)
    best = 0.0
    adapter.forward(pixels)
    for _ in range(3):
        _wait(setting.device)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < (0.1 if setting.tiny else 1.0):
            adapter.forward(pixels)
            _wait(setting.device)
            done += batch_size
        best = max(best, done / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = (
    Part(name="training", cap_s=150, rows=training),
    Part(name="levers", cap_s=260, rows=levers),
    Part(name="encoding", cap_s=40, rows=encoding),
    Part(name="sampling", cap_s=80, rows=sampling),
    Part(name="annotators", cap_s=60, rows=annotators),
)
"""In the order of their worth. The levers' last rows compile for minutes and may be cut off."""


class Figures:
    """The file: what ran, and what did not with its reason."""

    def __init__(self, path: Path, setting: Setting, *, resume: bool) -> None:
        """Begin a file, or go on with one."""
        self.path = path
        on_gpu = setting.device.type == "cuda"
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
            "torch": torch.__version__,
            "tiny": setting.tiny,
            "goals": GOALS,
            "parts": {
                part.name: {"status": "not_run", "reason": "not reached", "rows": []}
                for part in PARTS
            },
        }
        if resume and path.is_file():
            self.content = json.loads(path.read_bytes())
        self.write()

    def part(self, name: str) -> dict[str, Any]:
        """One part's entry."""
        return self.content["parts"][name]

    def write(self) -> None:
        """Replace the file in one piece."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", "utf-8")
        os.replace(temporary, self.path)

    def faults(self) -> list[str]:
        """A line for each lever that was not seen to act and each part that failed, or did not end
        at tiny size."""
        found = []
        for name, part in self.content["parts"].items():
            found += [row["contradiction"] for row in part["rows"] if row.get("contradiction")]
            if part["status"] == "failed" or (self.content["tiny"] and part["status"] != "done"):
                found.append(f"{name}: {part['status']}: {part['reason']}")
        return found


def run_part(part: Part, setting: Setting, figures: Figures, seconds: float) -> None:
    """Measure a part's rows until they are done, its time is over, or it fails."""
    entry, began = figures.part(part.name), time.monotonic()
    print(f"\n== {part.name}, at most {seconds:.0f} s", flush=True)

    def time_up(*_: object) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, time_up)
    entry |= {"status": "cut_off", "reason": "the process ended in it"}
    figures.write()
    # Again and again: what is raised while an object is deleted, say, is ignored.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        for row in part.rows(setting):
            entry["rows"].append(row)
            figures.write()
        entry |= {"status": "done", "reason": ""}
    except TimeUpError:
        entry |= {"status": "cut_off", "reason": f"its time of {seconds:.0f} s was over"}
    except Exception as error:  # the other parts are worth running
        entry |= {
            "status": "failed",
            "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}",
        }
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if not entry["rows"] and entry["status"] == "cut_off":
            entry["status"] = "not_run"
        entry["seconds"] = time.monotonic() - began
        figures.write()
        gc.collect()
    if entry["status"] != "done":
        print(f"{part.name}: {entry['status']}: {entry['reason']}", flush=True)


def run(setting: Setting, figures: Figures, until: float) -> int:
    """Run what has not run; returns the exit status."""
    for part in PARTS:
        entry = figures.part(part.name)
        if entry["status"] != "not_run" or entry.get("seconds"):
            continue
        left = until - time.time()
        seconds = left if setting.tiny else min(part.cap_s, left)
        if seconds < MIN_PART_S:
            entry["reason"] = (
                f"{max(seconds, 0):.0f} s of the call were left, it needs {MIN_PART_S:.0f}"
            )
            figures.write()
            continue
        run_part(part, setting, figures, seconds)
        if "CUDA error" in entry["reason"]:
            return GPU_FAILED  # a process that has met one meets it again in every call
    for fault in figures.faults():
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(figures.faults()))


def table(content: dict[str, Any]) -> str:
    """The figures as Markdown: speeds, but of tiny models, which say nothing, and what a step asks
    of the device."""
    lines = [
        f"`benchmarks/gpu_figures.sh`, {content['device']}, torch {content['torch']}{', tiny' * content['tiny']}:",
        "",
    ]
    parts = content["parts"].items()
    if not content["tiny"]:
        lines += _header("what", "images/s", "goal", "times bigASP's", "MFU", "memory")
        lines += [_speeds(row, content["goals"]) for _, part in parts for row in part["rows"]]
    not_done = [
        f"{name}: {part['status']} ({part['reason']})"
        for name, part in parts
        if part["status"] != "done"
    ]
    lines += ["", *(f"- {line}" for line in not_done), ""] if not_done else [""]
    rows = [row for _, part in parts for row in part["rows"] if row.get("counts")]
    if rows:
        names = list(rows[0]["counts"])
        lines += _header("a step", *names)
        for row in rows:
            lines.append(
                _cells(
                    row["name"],
                    *("" if (n := row["counts"][name]) is None else f"{n:,}" for name in names),
                )
            )
    return "\n".join(lines) + "\n"


def _speeds(row: Row, goals: dict[str, float]) -> str:
    is_training = "counts" in row
    return _cells(
        row["name"],
        "out of memory" if row["images_per_s"] is None else f"{row['images_per_s']:.2f}",
        f"{goals['training']:g} and {goals['ratio']:g} x" if is_training else f"{row['goal']:g}",
        f"{row['ratio']:.2f}" if row.get("ratio") else "",
        f"{row['mfu']:.1%}" if row.get("mfu") else "",
        f"{row['peak_bytes'] / 1e9:.1f} GB" if row.get("peak_bytes") else "",
    )


def _header(*names: str) -> list[str]:
    return [_cells(*names), _cells(*("---" for _ in names))]


def _cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def main(arguments: list[str]) -> int:
    """Measure what there is time for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small models; without CUDA it must be given"
    )
    parser.add_argument(
        "--resume", action="store_true", help="run only the parts of FILE that did not run"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_figures.json"))
    parser.add_argument("--table", type=Path, help="Markdown for docs/experiments.md")
    parser.add_argument(
        "--until", type=float, default=0.0, help="end by this time; default in 570 s"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error(
            "there is no CUDA device: full-size figures of a CPU are of no use; give --tiny"
        )
    setting = Setting(device=device, tiny=options.tiny)
    figures = Figures(options.out, setting, resume=options.resume)
    status = run(setting, figures, options.until or time.time() + SECONDS)
    if options.table:
        options.table.write_text(table(figures.content), "utf-8")
    print(f"\n{table(figures.content)}wrote {options.out}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
