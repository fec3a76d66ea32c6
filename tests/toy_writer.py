"""A process that commits, and dies by SIGKILL at its n-th change of the file system; run by test_commit.py."""

import os
import signal
import sys
from pathlib import Path

CHANGES = ("open-write", "fsync", "replace", "unlink", "mkdir", "rename")


def die_at(fatal: int) -> None:
    """Count every change that this process makes to the file system, and die just before the fatal one."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    os.fsync = fsync


def main(folder: Path, generation: int, fatal: int, style: str) -> None:
    import polars as pl

    from training import commit

    frame = pl.DataFrame({"x": list(range(generation, generation + 50))})
    digests = commit.column_digests(frame)
    die_at(fatal)
    if style == "in place":  # the negative control: what commits must not do
        frame.write_parquet(folder / "t-fixed.parquet")
        entry = commit.Entry(
            name="t-fixed.parquet",
            sha256=commit.sha256_file(folder / "t-fixed.parquet"),
            bytes=(folder / "t-fixed.parquet").stat().st_size,
        )
    else:
        entry = commit.write_parquet(folder, "t", frame)
    manifest = commit.Manifest(
        table="toy", part="t", version=generation, files=(entry,), rows=50, digest=commit.logical_digest(digests, 50)
    )
    if style == "in place":
        import json

        (folder / "t.json").write_text(json.dumps(manifest.to_json()))
    else:
        commit.commit_manifest(folder / "t.json", manifest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
