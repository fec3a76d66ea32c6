"""Rows of networks that need not be made again: of images that stayed in a shard, and of those that
were missing."""

from dataclasses import replace

import polars as pl

from resources.graph import Stage
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.errors import DamageError
from training.manifests import Manifest


def known(store: Store, stage: Stage, key: str) -> pl.DataFrame:
    """Rows that the stage would make again: committed or kept ones of equal code, model and
    settings."""
    frames = [
        store.read(stage.table, parts=[]),
        *(_rows(store, item, key) for item in (stage, _kept(stage))),
    ]
    return pl.concat(frames).unique("image_id", keep="first", maintain_order=True)


def keep(store: Store, stage: Stage, key: str, rows: pl.DataFrame) -> None:
    """Commit the rows of images that are not in the shard now, beside those kept before.

    They stay until they are forgotten, or the model, code or settings change.
    """
    kept = _kept(stage)
    before = _rows(store, kept, key)
    after = pl.concat([before, rows]).unique("image_id", keep="first", maintain_order=True)
    after = after.filter(~pl.col("image_id").is_in(list(store.tables.forgotten())))
    basis = store.currency.basis(stage, key)
    if basis is not None and after.height > before.height:
        store.writer.commit(kept, key, Made(frame=after), {**basis, "inputs": {}}, seconds=0.0)


def _kept(stage: Stage) -> Stage:
    table = f"kept_{stage.table}"
    return replace(stage, name=table, table=table, reads=())


def _rows(store: Store, stage: Stage, key: str) -> pl.DataFrame:
    part = stage.part(key)
    try:
        manifest = store.manifest(stage.table, part)
        return store.read(
            stage.table, parts=[part] if manifest and _is_equal(store, stage, key, manifest) else []
        )
    except DamageError:  # What is damaged is made again.
        return store.read(stage.table, parts=[])


def _is_equal(store: Store, stage: Stage, key: str, manifest: Manifest) -> bool:
    basis = store.currency.basis(stage, key)
    return (
        basis is not None
        and manifest.version == stage.version
        and dict(manifest.models) == basis["models"]
        and dict(manifest.config) == dict(stage.section(store.config, key))
    )
