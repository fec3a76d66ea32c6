"""`prompt_sets`: the prompts that checkpoints are judged by, fixed under a digest."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from resources.graph import Per, Reads, Scope, Stage
from resources.workspace.paths import file_digest
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.buckets import plans
from training.buckets.geometry import Size
from training.commit import json_digest
from training.errors import ConfigError
from training.evaluation import prompt_building
from training.evaluation.prompt_groups import UNKNOWN_WORDS, negative_prompt
from training.evaluation.prompt_sets import make_frame, read_prompts, refuse_overlap
from training.sampling.prompt_reading import read_set

VOCABULARY = ("tag", "aliases")


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the prompt file, of what was held out and trained on, and of the data set's
    words."""
    config, found = store.config.prompt_sets[key], {}
    if config.file:
        found["file"] = file_digest(store.paths.resource(config.file))
    tables: dict[str, tuple[str, ...]] = {"selected_images": prompt_building.HELD_OUT}
    if UNKNOWN_WORDS in config.groups:
        tables["tag_vocabulary"] = VOCABULARY
    for table, columns in tables.items():
        manifest = store.manifest(table, "all")
        found[table] = (
            json_digest([manifest.columns[name] for name in columns]) if manifest else "absent"
        )
    return found


@Stage(
    version=5,
    scope=Scope.PROMPT_SET,
    group="evaluate",
    follows=(
        Reads("selected_images", prompt_building.HELD_OUT),
        Reads("tag_vocabulary", VOCABULARY),
    ),
    also=(Reads("prompt_sets", per=Per.KEY),),
    config=lambda config, key: config.prompt_sets[key],
    settings="prompt_sets.{key}",
    others=_inputs,
)
def prompt_sets(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per prompt: text, negative, size, group, and a seed that follows from its id
    alone."""

    def make(key: str) -> Made:
        frame = _make(store, key)
        groups = frame["group"].value_counts(name="n").sort("group")
        return Made(
            frame=frame,
            report={
                "tables": {
                    "groups": [{"group": name, "prompts": n} for name, n in groups.iter_rows()],
                    "examples": frame.head(8).select("prompt_id", "group", "text").to_dicts(),
                }
            },
        )

    return materialize(context, store, prompt_sets, make)


def _make(store: Store, key: str) -> pl.DataFrame:
    """The set's prompts, none of which a training image has as a caption or as its tags.

    Raises:
        EvaluationError: the set cannot be made, or it is that of the evaluation and a prompt cannot
            be drawn.
    """
    config = store.config.prompt_sets[key]
    selected = store.read("selected_images", prompt_building.HELD_OUT)
    if config.file:
        path = store.paths.resource(config.file)
        is_parti = path.is_file() and prompt_building.is_parti(path)
        frame = (
            prompt_building.read_parti(path, _sizes(store, key)) if is_parti else read_prompts(path)
        )
    else:
        frames = []
        if config.held_out:
            previous = store.read("prompt_sets", parts=[key]) if _is_in_style(store, key) else None
            frames.append(
                prompt_building.from_validation(
                    selected, _sizes(store, key), config.held_out, config.prompts, previous
                )
            )
        if config.groups:
            words = (
                store.read("tag_vocabulary", VOCABULARY) if UNKNOWN_WORDS in config.groups else None
            )
            known = (
                [] if words is None else [*words["tag"], *words["aliases"].explode().drop_nulls()]
            )
            frames.append(prompt_building.from_groups(config.groups, _sizes(store, key), known))
        frame = make_frame([row for one in frames for row in one.drop("seed").to_dicts()])
    refuse_overlap(frame, prompt_building.trained_texts(selected))
    negative = pl.col("negative")
    frame = frame.with_columns(
        negative=pl.when(negative == "")
        .then(pl.lit(negative_prompt(config.negative)))
        .otherwise(negative)
    )
    if key == store.config.evaluation.prompt_set:
        read_set(
            frame, store.config.evaluation.sampling
        )  # refused here, and not when a model is to draw it
    return frame


def _is_in_style(store: Store, key: str) -> bool:
    """Whether the committed set's held-out images were made into prompts as they would be now."""
    manifest = store.manifest("prompt_sets", key)
    if manifest is None or manifest.version != prompt_sets.version:
        return False
    return bool(manifest.config["prompts"] == prompt_sets.section(store.config, key)["prompts"])


def _sizes(store: Store, key: str) -> tuple[Size, ...]:
    """Sizes of the bucket plan of the set's encoding.

    Raises:
        ConfigError: it names no encoding though there are several, or one that is not there, or
            whose plan follows each image.
    """
    name, known = store.config.prompt_sets[key].encoding, sorted(store.config.encodings)
    name = name or (known[0] if len(known) == 1 else "")
    if name not in known:
        raise ConfigError(
            f"prompt_sets.{key}.encoding={name!r} must be one of {', '.join(known) or 'none'}"
        )
    sizes = plans.plan(store.config.encodings[name].buckets)
    if not sizes:
        raise ConfigError(
            f"prompt_sets.{key}.encoding={name!r}: its bucket plan has no list of sizes; use a prompt file"
        )
    return sizes
