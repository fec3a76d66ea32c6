"""What the graph costs beside its work: importing it, and a stage over 100 shards that has nothing
to do.

Usage: python benchmarks/bench_graph.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_SHARDS = 100
LIMIT_IMPORT_S = 1.5
LIMIT_NO_OP_S = 10.0


def seconds_of(code: str, repeats: int = 5) -> float:
    """Best of several: CPU seconds (user and system) of an interpreter that runs `code`."""
    program = (
        f"import resource, time\n{code}\nu = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(u.ru_utime + u.ru_stime)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    return min(float(run.stdout.splitlines()[-1]) for run in runs)


def import_cost() -> None:
    """`import jobs.definitions` against an interpreter that imports Dagster alone, and proof that
    torch stays out."""
    bare, dagster = seconds_of("pass"), seconds_of("import dagster")
    ours = seconds_of("import jobs.definitions")
    heavy = subprocess.run(
        [sys.executable, "-c", "import sys, jobs.definitions; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    print(
        f"import jobs.definitions: {ours:.2f} s CPU (limit {LIMIT_IMPORT_S}), {ours / dagster:.2f} x Dagster alone"
    )
    print(f"  of which the interpreter   {bare:.2f} s; torch imported: {heavy}")


def no_op_stage() -> None:
    """One run over 100 committed shards: every body finds its partition current."""
    from PIL import Image

    from resources.workspace.setup import create
    from resources.workspace.store import Store

    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "pictures"
        images.mkdir()
        for number in range(NUM_SHARDS):
            Image.new("RGB", (64, 48), (number, 255 - number, 7)).save(images / f"{number:03d}.png")
        home = Path(folder) / "workspace"
        create(home, sources=[str(images)], preset="demo", tiny=False)
        config = home / "foundry.toml"
        config.write_text(config.read_text().replace("format = 1", "format = 1\nshard_size = 1", 1))
        from assets.registry import STAGES
        from jobs import pipeline

        began = time.monotonic()
        pipeline.bring_up_to_date(home, select="raw_images")
        first = time.monotonic() - began
        store = Store(home)
        assert len(store.tables.shards()) == NUM_SHARDS
        began = time.monotonic()
        with pipeline.open_instance(home) as instance:
            stage = STAGES["raw_images"]
            pipeline.execute(instance, [stage], store.currency.keys(stage.scope))
        again = time.monotonic() - began
        began = time.monotonic()
        pipeline.bring_up_to_date(home, select="raw_images")
        nothing = time.monotonic() - began
    print(f"raw_images over {NUM_SHARDS} shards of one image: {first:.1f} s")
    print(f"  {first / again:.1f} x a run that finds all of them current")
    print(f"  a run over {NUM_SHARDS} current shards: {again:.1f} s (limit {LIMIT_NO_OP_S})")
    print(f"  `foundry run` that finds nothing stale: {nothing:.1f} s")


if __name__ == "__main__":
    import_cost()
    no_op_stage()
