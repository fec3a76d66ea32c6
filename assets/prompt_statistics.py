"""`prompt_statistics`: what the model will really read, before a GPU-hour is spent."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.run_settings import RunSettings, configure
from resources.graph import Reads, Scope, Stage
from resources.workspace.paths import file_digest
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.config.run import PromptConfig
from training.images import figures
from training.prompts import prompt_statistics as counted
from training.runs.run_folder import CONFIG, read_config
from training.runs.training_set import count_forgotten

NUM_EXAMPLES = 12
MAX_SAMPLES = 10_000
NUM_TAGS = 30


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the run's configuration, and of the training set and vocabulary: those that it was
    frozen with, or before its first launch those of the tables."""
    from resources.operations.run_prompts import frozen_inputs

    folder, frozen = store.paths.run_folder(key), frozen_inputs(store, key)
    config = read_config(folder)
    if frozen is not None:
        count = count_forgotten(frozen.training_set)
        training_set = frozen.fingerprint + (f" without {count}" if count else "")
        words = frozen.tag_vocabulary or frozen.vocabulary_sha256
    else:
        parts = (("training_set", config.encoding), ("tag_vocabulary", "all"))
        training_set, words = (
            manifest.digest if (manifest := store.manifest(*part)) else "absent" for part in parts
        )
    found = {
        "config": file_digest(folder / CONFIG),
        "training_set": training_set,
        "tag_vocabulary": words,
    }
    if config.base != "base":  # whose tokenizers it reads
        found["base"] = frozen.base_digest if frozen else store.models.base_digest(config.base)
    return found


@Stage(
    version=4,
    scope=Scope.RUN,
    group="train",
    kinds=("polars",),
    follows=(Reads("training_set"), Reads("tag_vocabulary")),
    models=("base",),
    others=_inputs,
)
def prompt_statistics(
    context: dg.AssetExecutionContext, config: RunSettings, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """Tag counts, token counts, chunks and tag frequencies of the prompts of epoch 0, with
    examples.

    Read are images that train; of a run that was started, those of the set that it was frozen with.
    """

    def make(key: str) -> Made:
        from resources.operations.run_prompts import frozen_inputs, prompt_maker

        run = read_config(store.paths.run_folder(key))
        maker = prompt_maker(store, run, frozen_inputs(store, key))
        train = maker.samples.train_rows
        made = maker.make(train[:MAX_SAMPLES].tolist(), 0)
        frame = counted.statistics(made)
        report = _report(frame, run.prompts)
        report["tables"]["examples"] = [
            {"prompt": one.text, "tokens": one.num_tokens, "kind": one.prompt.trace["kind"]}
            for one in made[:NUM_EXAMPLES]
        ]
        report["numbers"]["images that train"] = len(train)
        report["numbers"]["zeroed"] = sum(one.zeroed for one in made)
        return Made(frame=frame, report=report)

    for key in context.partition_keys if context.has_partition_key else ():
        configure(store, key, config)
    return materialize(context, store, prompt_statistics, make)


def _report(frame: pl.DataFrame, config: PromptConfig) -> dict[str, dict[str, object]]:
    """Numbers, warnings and plots of the statistics."""
    kinds = dict(frame.filter(pl.col("statistic") == "kind").select("key", "count").iter_rows())
    tags = (
        frame.filter(pl.col("statistic") == "tag")
        .sort("count", "key", descending=[True, False])
        .head(NUM_TAGS)
    )
    truncated = frame.filter(pl.col("statistic") == "num_truncated")
    return {
        "numbers": {
            "prompts": sum(kinds.values()),
            "empty": kinds.get("empty", 0),
            "truncated": int(truncated["count"].sum()),
            "tokens cut off": sum(counted.histogram_of(frame, "num_truncated")),
        },
        "tables": {
            "warnings": [{"warning": line} for line in counted.warnings(frame, config)],
            "most frequent tags": tags.select(tag="key", prompts="count").to_dicts(),
        },
        "pictures": {
            "tags per prompt": figures.histogram(counted.histogram_of(frame, "num_tags")),
            "tokens per prompt": figures.histogram(counted.histogram_of(frame, "num_tokens")),
            "prompts by tokens that their chunks hold, found of wanted": figures.shares(
                counted.chunk_mix(frame, config)
            ),
            "kinds of prompts": figures.bars(sorted(kinds.items())),
            "tags by frequency": figures.bars([("", count) for count in tags["count"].to_list()]),
        },
    }
