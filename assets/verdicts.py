"""`verdicts`: whether a checkpoint's images are better than those of its base, of the champion,
or of any other."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.eval_metrics import eval_metrics
from assets.metadata import materialize
from resources.graph import Per, Reads, Scope, Stage
from resources.mlflow.catch_up import catch_up
from resources.mlflow.tracking import workspace_tracking
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import toml
from training.commit import lock
from training.config.workspace import WorkspaceConfig
from training.errors import DataError, EvaluationError, FailedImagesError
from training.evaluation import champion
from training.names import CheckpointName, VerdictName
from training.runs import retention, run_folder
from training.tables.schemas import TABLES

if TYPE_CHECKING:
    from training.evaluation.verdict import Scores


def _base_scores(store: Store, key: str) -> dict[str, str]:
    """Digest of the base model's scores, which every verdict compares with."""
    base = store.checkpoints.base()
    manifest = store.manifest("eval_metrics", base) if base else None
    return {"base": manifest.digest if manifest else "absent"}


def _pair_scores(store: Store, key: str) -> dict[str, str]:
    """Digests of both sides' scores."""
    found = {name: store.manifest("eval_metrics", name) for name in VerdictName.parse(key)}
    return {name: manifest.digest if manifest else "absent" for name, manifest in found.items()}


def _margins(config: WorkspaceConfig) -> dict[str, Any]:
    """Differences that matter, by the names of their settings."""
    margins = toml.dump(config.evaluation.verdicts)
    return {name: margins[name] for name in ("clip_margin", "aesthetic_margin", "further_margins")}


CHAMPION = "champion"
"""Under which the champion is kept from retention."""


def _pairs(*, one_of_many: bool) -> Stage:
    """Verdicts between any two checkpoints, under the key `a~b`."""
    return replace(
        verdicts,
        reads=(),
        config=lambda config, key: _margins(config) | {"one_of_many": one_of_many},
        others=_pair_scores,
        prefix="",
    )


@Stage(
    version=3,
    scope=Scope.CHECKPOINT,
    group="evaluate",
    reads=(Reads("eval_metrics", per=Per.KEY),),
    config=lambda config, key: _margins(config),
    settings="evaluation.verdicts",
    models=("clip", "aesthetic"),
    others=_base_scores,
    prefix=str(VerdictName.against_base("")),
)
def verdicts(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per metric and prompt group: is this checkpoint better than its base, by how much,
    how surely?"""

    result = materialize(context, store, verdicts, lambda key: judge(store, key))
    promote(store, context.log)
    if catch_up(store, context.log):
        _link_views(context, store)
    return result


def judge(store: Store, key: str) -> Made:
    """The verdict of a checkpoint against the base; for one with failed images, a note that there
    is none and why.

    Raises:
        DataError: the base or the checkpoint has no scores.
        EvaluationError: their scores were made by different protocols.
    """
    from training.evaluation.verdict import compare

    base = store.checkpoints.base()
    if base is None or store.manifest("eval_metrics", base) is None:
        raise DataError(
            f"verdicts {key}: the base model {base or ''} has no eval_metrics yet; run that first"
        )
    if key == base:
        return _without("the base is not compared")
    try:
        return _made(
            compare(
                scores_of(store, base),
                scores_of(store, key),
                store.config.evaluation.verdicts.margins,
            )
        )
    except (
        FailedImagesError
    ) as error:  # an outcome as any other: it can be looked at, and later checkpoints go on
        return _without(str(error))


def _without(note: str) -> Made:
    return Made(frame=TABLES["verdicts"].empty(), report={"numbers": {"note": note}})


def _made(frame: pl.DataFrame) -> Made:
    from training.evaluation.verdict import sentence

    return Made(
        frame=frame,
        report={
            "numbers": {
                f"{row['metric']} ({row['group']})": row["verdict"]
                for row in frame.iter_rows(named=True)
            },
            "tables": {
                "verdicts": [{"verdict": sentence(row)} for row in frame.iter_rows(named=True)]
            },
        },
    )


def scores_of(store: Store, checkpoint: str) -> "Scores":
    """A checkpoint's committed scores, with the protocol that its manifests say they were made by.

    Raises:
        DataError: they are not committed, or its images have been drawn anew since.
    """
    from training.evaluation.verdict import Protocol, Scores
    from training.sampling.image_files import DTYPE

    images, metrics = (
        store.manifest(table, checkpoint) for table in ("sample_images", "eval_metrics")
    )
    if images is None or metrics is None:
        raise DataError(
            f"checkpoint {checkpoint} has no scores yet: run `foundry evaluate {checkpoint}`"
        )
    drawn = next(reads.label for reads in eval_metrics.reads if reads.table == "sample_images")
    if metrics.inputs[drawn] != store.slices.digest(
        eval_metrics, eval_metrics.reads[0], checkpoint
    ):
        raise DataError(
            f"checkpoint {checkpoint}: its images are newer than its scores; run `foundry run` first"
        )
    protocol = Protocol(
        prompts=images.inputs["prompts"],
        sampling=json.dumps([images.config, _named(images.inputs, "lora:")], sort_keys=True),
        clip=metrics.models["clip"],
        aesthetic=metrics.models["aesthetic"],
        scorers=json.dumps(_named(metrics.inputs, "scorer:"), sort_keys=True),
        dtype=DTYPE,
    )
    return Scores(
        checkpoint=checkpoint,
        protocol=protocol,
        metrics=store.read("eval_metrics", parts=[checkpoint]),
    )


def _named(inputs: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name.startswith(prefix)}


def judge_pair(store: Store, a: str, b: str, *, one_of_many: bool = False) -> str:
    """Commit the verdict of b against a, where it is not current; returns its part.

    Against the base that is `base~b`, else `a~b`; the held-out half against the base stands in
    `a~b` alone, so that no row is there twice.

    Args:
        store: The workspace.
        a: Checkpoint compared against.
        b: Checkpoint judged.
        one_of_many: It was chosen among several, so the held-out half of the prompts is judged as
            well. Whoever does not ask for that half is content with a verdict that has it.

    Raises:
        DataError: one of them has no scores.
        FailedImagesError: an image of either has no scores.
        EvaluationError: their scores were made by different protocols.
    """
    ours, theirs, margins = (
        scores_of(store, a),
        scores_of(store, b),
        store.config.evaluation.verdicts.margins,
    )
    against_base, pair = a == store.checkpoints.base(), str(VerdictName(a, b))
    stage, key = (
        (verdicts, b)
        if against_base and not one_of_many
        else (_pairs(one_of_many=one_of_many), pair)
    )
    part = stage.part(key)
    with store.writer.holding(stage.table, part):
        manifest, basis = store.manifest(stage.table, part), store.currency.basis(stage, key)
        assert basis is not None, "both have scores"
        serving = (basis, store.currency.basis(_pairs(one_of_many=True), pair))
        if manifest is None or not manifest.rows or manifest.basis not in serving:
            started = time.monotonic()
            frame = champion.challenge(ours, theirs, margins, one_of_many=one_of_many)
            made = _made(champion.decisive(frame) if against_base and one_of_many else frame)
            store.writer.commit(stage, key, made, basis, seconds=time.monotonic() - started)
    return part


def promote(store: Store, log: logging.Logger) -> None:
    """Let the checkpoints that have not yet stood against the champion challenge it, once all
    verdicts are current.

    Each challenger's verdict against the champion is committed before `champion.json` moves; MLflow
    follows. Whoever is killed on the way leaves the old champion, and the next call begins again.
    """
    if not store.tables.parts("verdicts"):
        return
    if waiting := [
        name
        for name in store.currency.stale(verdicts)
        if not CheckpointName.parse(name).is_external
    ]:
        log.info(f"the champion waits for verdicts on {', '.join(waiting)}")
        return
    with lock(store.home / "locks" / "champion.lock", f"the champion of {store.home}"):
        now = _reigning(store)
        _keep_only(store, now.checkpoint)
        if (after := _contest(store, now, log)) is None:
            return
        if after.checkpoint != now.checkpoint:
            store.checkpoints.keep(after.checkpoint, CHAMPION)
        champion.write(store.home, after)
        _keep_only(store, after.checkpoint)


def _reigning(store: Store) -> champion.Champion:
    """The champion; the present base model while nothing has been better."""
    base, now = store.checkpoints.base(), champion.read(store.home)
    assert base is not None, "verdicts have a base"
    if now is None or (not now.verdict and now.checkpoint != base):
        return champion.Champion(checkpoint=base, digest=store.checkpoints.digest(base))
    return now


def _contest(store: Store, now: champion.Champion, log: logging.Logger) -> champion.Champion | None:
    """Judge whoever has not yet stood against the champion; returns the champion after that, None
    if no one could."""
    from training.evaluation.verdict import sentence

    found = {
        name: store.manifest("eval_metrics", name) for name in store.tables.parts("eval_metrics")
    }
    ours = {
        name: manifest.digest
        for name, manifest in found.items()
        if manifest is not None and CheckpointName.parse(name).is_of_run
    }
    ours.pop(now.checkpoint, None)
    fresh = [name for name in sorted(ours) if ours[name] != now.challenged.get(name)]
    if gone := [name for name in fresh if not store.checkpoints.exists(name)]:
        log.info(f"{', '.join(gone)} cannot challenge the champion: retention removed the weights")
        fresh = [name for name in fresh if name not in gone]
    if not fresh:
        return None
    try:
        titleholder = scores_of(store, now.checkpoint)
    except DataError as error:
        log.warning(f"the champion {now.checkpoint} is not challenged: {error}")
        return None
    sides = _challengers(store, titleholder, fresh, log)
    if not sides:
        hint = (
            ""
            if store.checkpoints.exists(now.checkpoint)
            else "; its weights are missing: remove champion.json to begin anew"
        )
        log.warning(
            f"the champion {now.checkpoint} stays, for none of {', '.join(fresh)} can challenge it{hint}"
        )
        return None
    best = champion.choose(titleholder, sides, store.config.evaluation.verdicts.margins)
    many = len(sides) > 1 or bool(now.challenged)
    parts = {
        side.checkpoint: judge_pair(
            store, now.checkpoint, side.checkpoint, one_of_many=many and side is best
        )
        for side in sides
    }
    part = parts[best.checkpoint]
    rows = store.read("verdicts", parts=[part])
    said = "; ".join(sentence(row) for row in champion.decisive(rows).iter_rows(named=True))
    if champion.wins(rows, store.config.evaluation.verdicts.deciding):
        log.info(f"new champion {best.checkpoint}: {said}")
        digest = store.checkpoints.digest(best.checkpoint)
        now = replace(now, checkpoint=best.checkpoint, digest=digest, verdict=part, sentence=said)
    else:
        log.info(f"{now.checkpoint} stays champion against {best.checkpoint}: {said}")
    return replace(now, challenged={**now.challenged, **{name: ours[name] for name in parts}})


def _challengers(
    store: Store, titleholder: "Scores", names: Sequence[str], log: logging.Logger
) -> list["Scores"]:
    """Those of the checkpoints that can be judged against the champion; of each other it is said
    why not."""
    from training.evaluation.verdict import compare

    sides = []
    for name in names:
        try:
            side = scores_of(store, name)
            compare(titleholder, side, store.config.evaluation.verdicts.margins)
        except (DataError, EvaluationError) as error:
            log.warning(f"{name} does not challenge the champion {titleholder.checkpoint}: {error}")
            continue
        sides.append(side)
    return sides


def _keep_only(store: Store, checkpoint: str) -> None:
    """Keep the champion from retention, and let go of all that were champion before."""
    if store.checkpoints.exists(checkpoint):
        store.checkpoints.keep(checkpoint, CHAMPION)
    kept = store.checkpoints.folder(checkpoint)
    for run in store.currency.keys(Scope.RUN):
        for folder in run_folder.checkpoints(store.paths.run_folder(run)):
            if folder != kept:
                retention.release(folder, CHAMPION)


def _link_views(context: dg.AssetExecutionContext, store: Store) -> None:
    """Show beside the verdicts where MLflow shows runs, curves and images side by side."""
    views = workspace_tracking(store.home, store.config.tracking.uri).views()
    links = {f"MLflow: {name}": dg.MetadataValue.url(url) for name, url in views.items()}
    for key in context.partition_keys if links else ():
        context.add_asset_metadata(links, partition_key=key)
