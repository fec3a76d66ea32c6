"""The schema of every table: columns, types, what they mean, and how far model outputs may differ.

`docs/tables.md` is generated from here; the store refuses a frame that does not fit.
"""

from collections.abc import Mapping

import polars as pl

from training.errors import DataError
from training.names import CheckpointName, ShardKey
from training.tables.images import IMAGES
from training.tables.table import Reason, Table
from training.tables.training import TRAINING

TABLES: dict[str, Table] = {table.name: table for table in (*IMAGES, *TRAINING)}
for _name in ("embeddings", "tags", "captions", "watermark_boxes"):
    TABLES[f"kept_{_name}"] = Table(
        f"kept_{_name}", "image x model, of images that were missing from their shard", TABLES[_name].key,
        TABLES[_name].columns,
    )  # fmt: skip


def rejections(stage: str, rows: list[dict[str, object]]) -> pl.DataFrame:
    """Rows for `rejected_images`: each a dict with reason and any of source, source_id, image_id,
    value, limit, detail.

    Raises:
        DataError: a reason outside of the closed list.
    """
    table = TABLES["rejected_images"]
    for row in rows:
        if row["reason"] not in set(Reason):
            raise DataError(
                f"stage {stage}: reason {row['reason']!r} is not in the closed list {sorted(Reason)}"
            )
    full = [
        {
            name: str(value) if (value := {**row, "stage": stage}.get(name)) is not None else None
            for name in table.columns
        }
        for row in rows
    ]
    return pl.DataFrame(full, schema=table.schema) if full else table.empty()


PART_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bucket_assignments": ("encoding",),
    "latents": ("encoding", "shard"),
    "training_set": ("encoding",),
    "prompt_statistics": ("run",),
    "prompt_sets": ("prompt_set",),
    "sample_images": ("checkpoint", "run"),
    "eval_metrics": ("checkpoint", "run"),
    "release": ("run",),
}
"""Of tables whose keys recur from part to part: columns in SQL that tell a row's part."""


def part_values(table: str, part: str) -> dict[str, str | None]:
    """Values of a part's `PART_COLUMNS`; the run of a model without one is None.

    Args:
        table: Name of the table.
        part: Name of the part: a checkpoint, a run, an encoding, `<encoding>|<shard>`, or a prompt
            set.
    """
    names = PART_COLUMNS.get(table, ())
    if names == ("checkpoint", "run"):
        name = CheckpointName.parse(part)
        return {"checkpoint": part, "run": name.run if name.is_of_run else None}
    if len(names) > 1:
        return dict(zip(names, ShardKey.parse(part), strict=True))
    return dict.fromkeys(names, part)


def markdown() -> str:
    """`docs/tables.md`: every table with its columns."""
    lines = [
        "# Tables",
        "",
        "Made from `training/tables/schemas.py` by `python -m training.tables.schemas`. A tolerance marks outputs of",
        "models: equal inputs may differ by so much between machines; all else is equal everywhere.",
        "",
        f"Reasons in `rejected_images`, a closed list: {', '.join(f'`{reason}`' for reason in Reason)}.",
    ]
    for table in TABLES.values():
        key = ", ".join(f"`{name}`" for name in table.key) or "none"
        told = " and ".join(f"`{name}`" for name in PART_COLUMNS.get(table.name, ()))
        more = f" In SQL also {told}, first." if told else ""
        lines += ["", f"## {table.name}", "", f"One row per {table.row}. Key: {key}.{more}", ""]
        lines += ["| column | type | meaning | tolerance |", "| --- | --- | --- | --- |"]
        for name, column in table.columns.items():
            tolerance = "" if column.tolerance is None else f"{column.tolerance:g}"
            lines.append(
                f"| `{name}` | {str(column.dtype).replace('|', ' ')} | {column.about} | {tolerance} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
