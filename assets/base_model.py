"""`base_model`: what training starts from, by digest, so that every checkpoint can name it."""

import dagster as dg
import polars as pl

from assets.metadata import materialize
from assets.partitions import mirror
from resources.graph import Scope, Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.models.base_model import inspect
from training.names import CheckpointName
from training.tables.schemas import TABLES


@Stage(version=1, scope=Scope.MODEL, group="train", kinds=("huggingface",), models=("base",))
def base_model(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """The model folder that runs start from: family, size, digest, and its name as a checkpoint."""

    def make(key: str) -> Made:
        digest = store.models.digest(key)
        row = {
            "name": key,
            "checkpoint": str(CheckpointName.of_base(digest)),
            "digest": digest,
            "parents": [],
            **inspect(store.models.path(key)),
        }
        numbers = {
            "parameters (millions)": round(row["num_parameters"] / 1e6, 2),
            "family": row["family"],
        }
        return Made(
            frame=pl.DataFrame([row], schema=TABLES["base_model"].schema),
            report={"numbers": numbers},
        )

    result = materialize(context, store, base_model, make)
    mirror(context.instance, store)
    return result
