"""`prompt_statistics`: what the model will really read, before a GPU-hour is spent."""

import dagster as dg

from assets.metadata import describe, materialize
from assets.partitions import runs
from resources.stages import Scope, Stage
from resources.store import Made, Store, file_digest
from training.data.prompts import make_prompt, statistics
from training.data.tokens import tokenize
from training.errors import DataError
from training.evaluation import figures
from training.run_folder import CONFIG, read_config
from training.seeds import Purpose, generator

NUM_EXAMPLES = 12
MAX_SAMPLES = 10_000


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the run's configuration and of its encoding's training set."""
    encoding = read_config(store.run_folder(key)).encoding
    manifest = store.manifest("training_set", encoding)
    return {
        "config": file_digest(store.run_folder(key) / CONFIG),
        "training_set": manifest.digest if manifest else "absent",
    }


STAGE = Stage(name="prompt_statistics", version=1, scope=Scope.RUN, models=("base",), others=_inputs)


@dg.asset(
    deps=[dg.AssetDep("training_set", partition_mapping=dg.AllPartitionMapping())],
    partitions_def=runs,
    **describe(STAGE, "train", "polars"),
)
def prompt_statistics(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """Tag counts, token counts, chunks and tag frequencies of the prompts of epoch 0, with examples."""

    def make(key: str) -> Made:
        from training.models.text_encoders import load_tokenizer

        config = read_config(store.run_folder(key))
        if store.manifest("training_set", config.encoding) is None:
            raise DataError(f"prompt_statistics {key}: training_set {config.encoding} is not committed; run that first")
        samples = store.read("training_set", parts=[config.encoding]).head(MAX_SAMPLES)
        tokenizer = load_tokenizer(store.model_path("base") / "tokenizer")
        made = [
            make_prompt(sample, config.prompts, generator(config.seed, Purpose.PROMPT, 0, sample["image_id"]))
            for sample in samples.iter_rows(named=True)
        ]
        tokens = tokenize([prompt for prompt, _ in made], tokenizer, max_chunks=config.prompts.max_chunks)
        counts = [item.num_tokens for item in tokens]
        frame = statistics([trace for _, trace in made], counts, config.prompts.max_chunks)
        return Made(
            frame=frame,
            report={
                "numbers": {
                    "prompts": len(made),
                    "empty": sum(prompt == "" for prompt, _ in made),
                    "truncated": sum(item.num_truncated > 0 for item in tokens),
                },
                "tables": {"examples": [{"prompt": prompt} for prompt, _ in made[:NUM_EXAMPLES]]},
                "pictures": {"tokens per prompt": figures.histogram(counts)},
            },
        )

    return materialize(context, store, STAGE, make)
