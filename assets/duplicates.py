"""Which images are the same one: by bytes, by pixels, or nearly."""

import dagster as dg

from assets.metadata import materialize
from assets.raw_images import thumbnails
from resources.graph import Reads, Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.curation.duplicates import find_groups

COLUMNS = (
    "source", "source_id", "image_id", "locator", "height", "width", "bytes", "pixel_digest", "phash", "phash_mirrored",
    "brightness", "contrast",
)  # fmt: skip


@Stage(version=1, scope=Scope.ALL, group="curate", reads=(Reads("raw_images", COLUMNS),))
def duplicate_groups(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per candidate that is a copy of another, and which one of each group goes on."""

    def make(key: str) -> Made:
        raw = store.slices.read(duplicate_groups, "raw_images", key)
        groups = find_groups(raw)
        kinds = groups["kind"].value_counts(sort=True, name="n")
        examples = groups.join(
            raw.select("source", "source_id", "locator"), on=["source", "source_id"]
        ).head(16)
        captions = [
            f"{group[:4]} {kind}" for group, kind in examples.select("group", "kind").iter_rows()
        ]
        return Made(
            frame=groups,
            report={
                "numbers": {
                    "groups": groups["group"].n_unique(),
                    "dropped": int((~groups["kept"]).sum()),
                },
                "tables": {
                    "candidates by kind": [
                        {"kind": kind, "count": n} for kind, n in kinds.iter_rows()
                    ]
                },
                "pictures": {"groups": thumbnails(store, examples, captions)}
                if examples.height
                else {},
            },
        )

    return materialize(context, store, duplicate_groups, make)
