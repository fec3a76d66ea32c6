"""Latents of an encoding, shard by shard: what is missing, or the next generation of what is
there."""

import time
from pathlib import Path

import dagster as dg

from assets.partitions import mirror
from assets.registry import STAGES, chosen
from jobs.pipeline import execute
from resources.graph import Scope
from resources.instance import instance as open_instance
from resources.workspace import generations
from resources.workspace.generations import DEADLINE_TAG, REENCODE_TAG
from resources.workspace.store import Store
from training.errors import DataError
from training.names import GenerationName

JOB = dg.define_asset_job(
    "encode",
    selection=chosen("encode", scope=Scope.ENCODING_SHARD),
    description="Encode the kept images of shards.",
)

REENCODE_JOB = dg.define_asset_job(
    "reencode",
    selection=dg.AssetSelection.assets("latents"),
    tags={REENCODE_TAG: "true"},
    description="Encode shards anew, with other crops, as their next generation. A running trainer takes it up at its "
    "next epoch.",
)


def reencode(
    home: Path,
    *,
    encoding: str | None = None,
    num_shards: int = 0,
    max_minutes: float | None = None,
) -> tuple[list[str], list[str]]:
    """Encode the oldest shards anew, one Dagster run each, in this process.

    Args:
        home: The workspace.
        encoding: Only this one.
        num_shards: At most so many of each encoding; 0 for all.
        max_minutes: Begin no shard after this.

    Returns:
        The partitions done, and those for which there was no time.

    Raises:
        ConfigError: there is no such encoding.
        DataError: nothing is encoded yet.
    """
    store = Store(home)
    if encoding is not None:
        store.config.encoding(encoding)
    chosen = [item.part for item in generations.oldest(store, encoding, num_shards=num_shards)]
    if not chosen:
        raise DataError("no latents are encoded yet: run `foundry run --select latents` first")
    deadline = time.time() + 60 * max_minutes if max_minutes is not None else float("inf")
    done: list[str] = []
    with open_instance(home) as instance:
        mirror(instance, store)
        for key in chosen:
            if time.time() > deadline:
                break
            execute(instance, [STAGES["latents"]], [key], tags={REENCODE_TAG: "true"})
            done.append(key)
    return done, chosen[len(done) :]


def reencode_requests(store: Store, tick_s: float) -> list[dg.RunRequest]:
    """A run for each shard that `[reencoding]` wants encoded anew now, the oldest first.

    A shard whose next generation was asked for already and is not there yet is not asked for again.
    """
    config = store.config.reencoding
    deadline = str(round(tick_s + 60 * config.max_minutes))
    return [
        dg.RunRequest(
            partition_key=item.part,
            run_key=f"reencode:{item.part}:{GenerationName(item.generation)}:{deadline}",
            tags={REENCODE_TAG: "true", DEADLINE_TAG: deadline},
        )
        for item in generations.oldest(
            store, num_shards=config.num_shards, min_age_s=3600 * config.min_age_hours
        )
    ]
