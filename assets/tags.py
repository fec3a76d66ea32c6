"""`tag_vocabulary`: every canonical tag, how often it occurs, and what CLIP's tokenizer makes of
it."""

import dagster as dg

from assets.metadata import materialize
from resources.graph import Reads, Scope, Stage
from resources.workspace.paths import file_digest
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.curation.tags import Aliases, load_aliases, vocabulary


def aliases_digest(store: Store, key: str) -> dict[str, str]:
    """Digest of the alias table, an input that is no table of ours."""
    name = store.config.tags.aliases
    return {"aliases": file_digest(store.paths.resource(name)) if name else "none"}


def read_aliases(store: Store) -> Aliases:
    """The workspace's alias table, resolved."""
    name = store.config.tags.aliases
    return load_aliases(store.paths.resource(name)) if name else Aliases()


@Stage(
    version=1,
    scope=Scope.ALL,
    group="curate",
    kinds=("polars",),
    reads=(
        Reads("raw_images", ("image_id", "source", "source_id")),
        Reads("source_listing", ("source", "source_id", "tags")),
        Reads("tags", ("image_id", "tags")),
    ),
    config=lambda config, key: config.tags,
    settings="tags",
    models=("clip",),
    others=aliases_digest,
)
def tag_vocabulary(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per canonical tag: category, aliases, counts by origin, CLIP pieces."""

    def make(key: str) -> Made:
        from training.models.text_encoders import load_tokenizer

        tokenizer = load_tokenizer(store.models.path("clip"))
        config = store.config.tags
        raw, listing = (
            store.slices.read(tag_vocabulary, table, key)
            for table in ("raw_images", "source_listing")
        )
        frame = vocabulary(
            raw.join(listing, on=["source", "source_id"]).select("image_id", "tags"),
            store.slices.read(tag_vocabulary, "tags", key),
            threshold=config.threshold,
            aliases=read_aliases(store),
            blacklist=config.blacklist,
            pieces=lambda tags: [tokenizer.tokenize(tag) for tag in tags],
        )
        top = frame.sort("num_images", "tag", descending=[True, False]).head(25)
        return Made(
            frame=frame,
            report={
                "numbers": {
                    "shattered into 4 or more pieces": int((frame["pieces"].list.len() >= 4).sum())
                },
                "tables": {"most frequent": top.select("tag", "category", "num_images").to_dicts()},
            },
        )

    return materialize(context, store, tag_vocabulary, make)
