"""`verdicts`: whether a checkpoint's pictures are better than those of its base, of the champion, or of any other."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from assets.eval_metrics import METRICS
from assets.metadata import describe, materialize
from assets.partitions import checkpoints
from resources.stages import Per, Reads, Scope, Stage
from resources.store import Made, Store
from resources.tracking import workspace_tracking
from training import retention
from training.commit import Manifest, lock
from training.data.tables import TABLES
from training.errors import DataError, EvaluationError, TrackingError
from training.evaluation import champion
from training.evaluation.contenders import RIVAL

if TYPE_CHECKING:
    from training.evaluation.verdict import Scores


def _base_scores(store: Store, key: str) -> dict[str, str]:
    """Digest of the base model's scores, which every verdict compares with."""
    base = store.base_checkpoint()
    manifest = store.manifest("eval_metrics", base) if base else None
    return {"base": manifest.digest if manifest else "absent"}


def _pair_scores(store: Store, key: str) -> dict[str, str]:
    """Digests of both sides' scores."""
    found = {name: store.manifest("eval_metrics", name) for name in key.split("~")}
    return {name: manifest.digest if manifest else "absent" for name, manifest in found.items()}


VERDICTS = Stage(
    name="verdicts",
    version=2,
    scope=Scope.CHECKPOINT,
    reads=(Reads("eval_metrics", per=Per.KEY),),
    config=lambda config, key: {"margins": config.evaluation.verdicts.margins},
    models=("clip", "aesthetic"),
    others=_base_scores,
    prefix="base~",
)
PAIRS = replace(VERDICTS, reads=(), others=_pair_scores, prefix="")
"""Verdicts between any two checkpoints, under the key `a~b`."""


@dg.asset(deps=["eval_metrics"], partitions_def=checkpoints, **describe(VERDICTS, "evaluate"))
def verdicts(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One row per metric and prompt group: is this checkpoint better than its base, by how much, how surely?"""

    def make(key: str) -> Made:
        from training.evaluation.verdict import compare

        base = store.base_checkpoint()
        if base is None or store.manifest("eval_metrics", base) is None:
            raise DataError(f"verdicts {key}: the base model {base or ''} has no eval_metrics yet; run that first")
        if key == base:
            return Made(frame=TABLES["verdicts"].empty(), report={"numbers": {"note": "the base is not compared"}})
        return _made(compare(scores_of(store, base), scores_of(store, key), store.config.evaluation.verdicts.margins))

    result = materialize(context, store, VERDICTS, make)
    for key in context.partition_keys:
        _track(context, store, key)
    crown(store, context.log)
    _link_views(context, store)
    return result


def _made(frame: pl.DataFrame) -> Made:
    from training.evaluation.verdict import sentence

    return Made(
        frame=frame,
        report={
            "numbers": {f"{row['metric']} ({row['group']})": row["verdict"] for row in frame.iter_rows(named=True)},
            "tables": {"verdicts": [{"verdict": sentence(row)} for row in frame.iter_rows(named=True)]},
        },
    )


def scores_of(store: Store, checkpoint: str) -> "Scores":
    """A checkpoint's committed scores, with the protocol that its manifests say they were made by.

    Raises:
        DataError: they are not committed, or its pictures have been drawn anew since.
    """
    from training.evaluation.clip_score import DTYPE
    from training.evaluation.verdict import Protocol, Scores

    pictures, metrics = (store.manifest(table, checkpoint) for table in ("sample_images", "eval_metrics"))
    if pictures is None or metrics is None:
        raise DataError(f"checkpoint {checkpoint} has no scores yet: run `foundry evaluate {checkpoint}`")
    drawn = next(reads.label for reads in METRICS.reads if reads.table == "sample_images")
    if metrics.inputs[drawn] != store.slice_digest(METRICS, METRICS.reads[0], checkpoint):
        raise DataError(f"checkpoint {checkpoint}: its pictures are newer than its scores; run `foundry run` first")
    protocol = Protocol(
        prompts=pictures.inputs["prompts"],
        sampling=json.dumps([pictures.config, _named(pictures.inputs, "lora:")], sort_keys=True),
        clip=metrics.models["clip"],
        aesthetic=metrics.models["aesthetic"],
        scorers=json.dumps(_named(metrics.inputs, "scorer:"), sort_keys=True),
        dtype=DTYPE,
    )
    return Scores(checkpoint=checkpoint, protocol=protocol, metrics=store.read("eval_metrics", parts=[checkpoint]))


def _named(inputs: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name.startswith(prefix)}


def judge_pair(store: Store, a: str, b: str, *, one_of_many: bool = False) -> Manifest:
    """Commit the verdict of b against a under the part `a~b`, where it is not current.

    Args:
        store: The workspace.
        a: Checkpoint compared against.
        b: Checkpoint judged.
        one_of_many: It was chosen among several, so the held-out half of the prompts is judged as well.

    Raises:
        DataError: one of them has no scores.
        EvaluationError: their scores were made by different protocols.
    """
    stage = replace(
        PAIRS, config=lambda config, key: {"margins": config.evaluation.verdicts.margins, "one_of_many": one_of_many}
    )
    key = f"{a}~{b}"
    with store.writing(stage.name, key):
        manifest, basis = store.manifest(stage.name, key), store.basis(stage, key)
        assert basis is not None, "pairs read no table by slices"
        if manifest is not None and manifest.basis == basis:
            return manifest
        started = time.monotonic()
        frame = champion.challenge(
            scores_of(store, a), scores_of(store, b), store.config.evaluation.verdicts.margins, one_of_many=one_of_many
        )
        return store.commit(stage, key, _made(frame), basis, seconds=time.monotonic() - started)


def crown(store: Store, log: logging.Logger) -> None:
    """Let the checkpoints that have not yet stood against the champion challenge it, once all verdicts are current.

    Each challenger's verdict against the champion is committed before `champion.json` moves; MLflow follows. Whoever is
    killed on the way leaves the old champion, and the next call begins again.
    """
    from training.evaluation.verdict import sentence

    if not store.parts("verdicts"):
        return
    if waiting := store.stale(VERDICTS):
        log.info(f"the champion waits for verdicts on {', '.join(waiting)}")
        return
    with lock(store.home / "locks" / "champion.lock", f"the champion of {store.home}"):
        base = store.base_checkpoint()
        assert base is not None, "verdicts have a base"
        now = champion.read(store.home) or champion.Champion(checkpoint=base, digest=store.checkpoint_digest(base))
        found = {name: store.manifest("eval_metrics", name) for name in store.parts("eval_metrics")}
        scores = {name: manifest for name, manifest in found.items() if manifest is not None}
        ours = {name for name in scores if name not in (base, now.checkpoint) and not name.startswith(RIVAL)}
        fresh = [name for name in sorted(ours) if scores[name].digest != now.challenged.get(name)]
        if not fresh:
            return
        try:
            titleholder = scores_of(store, now.checkpoint)
            sides = [side for name in fresh if (side := scores_of(store, name)).protocol == titleholder.protocol]
        except (DataError, EvaluationError) as error:
            log.warning(f"the champion {now.checkpoint} is not challenged: {error}")
            return
        if not sides:
            return
        best = champion.choose(titleholder, sides, store.config.evaluation.verdicts.margins)
        many = len(sides) > 1 or bool(now.challenged)
        for side in sides:
            judge_pair(store, now.checkpoint, side.checkpoint, one_of_many=many and side is best)
        part = f"{now.checkpoint}~{best.checkpoint}"
        rows = store.read("verdicts", parts=[part])
        stood = {side.checkpoint: scores[side.checkpoint].digest for side in sides}
        said = "; ".join(sentence(row) for row in champion.decisive(rows).iter_rows(named=True))
        if champion.wins(rows, store.config.evaluation.verdicts.deciding):
            _move(store, now, best.checkpoint)
            now = champion.Champion(
                checkpoint=best.checkpoint, digest=store.checkpoint_digest(best.checkpoint), verdict=part,
                sentence=said, challenged=now.challenged,
            )  # fmt: skip
            log.info(f"new champion {best.checkpoint}: {said}")
        else:
            log.info(f"{now.checkpoint} stays champion against {best.checkpoint}: {said}")
        champion.write(store.home, replace(now, challenged={**now.challenged, **stood}))
        _track_champion(store, now, log)


def _move(store: Store, old: champion.Champion, new: str) -> None:
    """Keep the new champion's folder from retention, and let go of the old one's."""
    for name, mark in ((new, retention.want), (old.checkpoint, retention.release)):
        folder = store.checkpoint_folder(name)
        if folder.is_dir():
            mark(folder, "champion")


def _track(context: dg.AssetExecutionContext, store: Store, key: str) -> None:
    """Send scores, verdicts and a handful of pictures to MLflow; when it is away, say so and go on."""
    try:
        tracking = workspace_tracking(store.home, store.config.tracking.uri)
        tracking.log_evaluation(
            key,
            metrics=store.read("eval_metrics", parts=[key]),
            samples=store.read("sample_images", parts=[key]),
            folder=store.sample_folder(key),
        )
        if VERDICTS.part(key) in store.parts("verdicts"):
            tracking.log_verdicts(store.read("verdicts", parts=[VERDICTS.part(key)]))
    except TrackingError as error:
        context.log.warning(f"MLflow: {error}")


def _link_views(context: dg.AssetExecutionContext, store: Store) -> None:
    """Show beside the verdicts where MLflow shows runs, curves and pictures side by side."""
    views = workspace_tracking(store.home, store.config.tracking.uri).views()
    links = {f"MLflow: {name}": dg.MetadataValue.url(url) for name, url in views.items()}
    for key in context.partition_keys if links else ():
        context.add_asset_metadata(links, partition_key=key)


def _track_champion(store: Store, now: champion.Champion, log: logging.Logger) -> None:
    """Let MLflow's alias follow; when it is away, say so and go on."""
    if not now.verdict:
        return
    try:
        workspace_tracking(store.home, store.config.tracking.uri).set_champion(now.checkpoint, now.sentence)
    except TrackingError as error:
        log.warning(f"MLflow: {error}")
