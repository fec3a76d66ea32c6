"""`prompt_sets`: the prompts that checkpoints are judged by, fixed under a digest."""

import dagster as dg

from assets.metadata import describe, materialize
from assets.partitions import prompt_sets as prompt_set_partitions
from resources.stages import Scope, Stage
from resources.store import Made, Store, file_digest
from training.evaluation.prompt_sets import read_prompts


def _file(store: Store, key: str) -> dict[str, str]:
    """Digest of the prompt file."""
    return {"file": file_digest(store.resource_path(store.config.prompt_sets[key].file))}


STAGE = Stage(name="prompt_sets", version=1, scope=Scope.PROMPT_SET, others=_file)


@dg.asset(partitions_def=prompt_set_partitions, **describe(STAGE, "evaluate"))
def prompt_sets(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per prompt: text, negative, size, group, and a seed that follows from its id alone."""

    def make(key: str) -> Made:
        frame = read_prompts(store.resource_path(store.config.prompt_sets[key].file))
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

    return materialize(context, store, STAGE, make)
