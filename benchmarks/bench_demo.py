"""Seconds per stage and peak memory of the whole demo, with everything that it starts.

Usage: python benchmarks/bench_demo.py
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

LIMIT_BYTES = 4e9
LIMIT_S = 360


def tree_bytes(process: psutil.Process) -> int:
    """Memory of a process and its descendants, shared pages counted once (PSS)."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def main() -> None:
    """Run the demo in a fresh workspace."""
    foundry = Path(sys.executable).with_name("foundry")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "workspace"
        began = time.monotonic()
        subprocess.run(
            [foundry, "init", home, "--preset", "demo"], check=True, stdout=subprocess.DEVNULL
        )
        run = subprocess.Popen(
            [foundry, "run", "--home", home],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        peak = 0

        def watch() -> None:
            nonlocal peak
            parent = psutil.Process(run.pid)
            while run.poll() is None:
                peak = max(peak, tree_bytes(parent))
                time.sleep(2.0)  # reading a large process's memory map is work of its own

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = run.communicate()[0]
        watcher.join()
        seconds = time.monotonic() - began
        print(output)
        print(f"the demo took {seconds:.0f} s (limit {LIMIT_S})")
        print(f"peak memory {peak / 1e9:.2f} GB (limit {LIMIT_BYTES / 1e9:.0f})")
        began = time.monotonic()
        subprocess.run(
            [foundry, "run", "--home", home],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        again = time.monotonic() - began
        print(f"again, with nothing to do: {again:.1f} s, {seconds / again:.0f} x quicker")


if __name__ == "__main__":
    main()
