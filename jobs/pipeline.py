"""`foundry run`: make for the graph. Brings stages up to date in order, one in-process Dagster run
per stage."""

import logging
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path

import dagster as dg

from assets import currency, verdicts
from assets.definitions import GRAPH
from assets.partitions import mirror
from assets.registry import STAGES
from resources.graph import Scope, Stage
from resources.instance import instance as open_instance
from resources.mlflow.catch_up import catch_up
from resources.run_coordinator import RANGE_END, RANGE_START
from resources.run_launcher import holder_tags, report_dead_runs
from resources.warehouse import rebuild
from resources.workspace import missing
from resources.workspace.staleness import StageStatus, StalePartition, grouped, reasons
from resources.workspace.staleness import status as status_of_stages
from resources.workspace.store import Store
from training import toml
from training.commit import explain_disk, lock
from training.errors import ConfigError, DataError, PipelineError
from training.names import CheckpointName
from training.runs.run_folder import is_away

Started = Callable[[str, int, Sequence[str]], None]


@dataclass(kw_only=True)
class Outcome:
    """What `foundry run` did for one stage."""

    stage: str
    num_made: int
    num_partitions: int
    seconds: float
    rows_in: int = 0
    rows_out: int = 0
    rows_rejected: int = 0
    unfinished: list[str] = field(default_factory=list)
    """Stale partitions left because time was up."""
    failed: dict[str, str] = field(default_factory=dict)
    """External models that could not be evaluated, and why: everything else went on."""


def bring_up_to_date(
    home: Path,
    *,
    select: str | None = None,
    only: bool = False,
    max_minutes: float | None = None,
    run: str | None = None,
    accept_missing: Sequence[str] = (),
    started: Started = lambda stage, num_partitions, reasons: None,
) -> list[Outcome]:
    """Bring the selected stages, and unless `only` all that they follow from, up to date.

    Args:
        home: The workspace.
        select: Dagster's selection syntax (`latents`, `raw_images+`, `group:curate`), several
            joined by commas; None for everything.
        only: Leave stale stages upstream of the selection alone.
        max_minutes: Start no further partition after this.
        run: Of all training runs, only this one.
        accept_missing: Sources whose missing files are meant to be missing, as their folders are
            now.
        started: Called for each stage that has work, before it begins: its name, partitions, and
            why they are stale.

    Raises:
        LockedError: another `foundry run` works on this workspace.
        PipelineError: a stage failed; what was committed before stays. An external model that fails
            stops nothing: its outcome says why.
    """
    store = Store(home)
    _ = store.config
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    with (
        explain_disk(home),
        lock(home / "locks" / "foundry-run.lock", f"`foundry run` in {home}", wait_s=0.0),
        open_instance(home) as instance,
    ):
        report_dead_runs(instance)
        currency.report_versions(instance, store)
        missing.accept(store, accept_missing)
        outcomes: list[Outcome] = []
        for stages in selected(select, only=only):
            mirror(instance, store)
            failed = {key for outcome in outcomes for key in outcome.failed}
            outcomes.extend(
                _run_body(instance, Store(home), stages, run, deadline, started, failed)
            )
            if any(stage.name == "raw_images" for stage in stages):
                _require_a_image(Store(home))
            if stages[0] is verdicts.verdicts:
                verdicts.promote(
                    Store(home), logging.getLogger(__name__)
                )  # a kill may have come between the two
        currency.report(instance, Store(home), GRAPH.resolve_asset_graph())
    with explain_disk(home):
        rebuild(store)
        catch_up(store, logging.getLogger(__name__))
    return outcomes


def status(home: Path, select: str | None = None) -> list[StageStatus]:
    """What `bring_up_to_date` would do, stage by stage, and why; writes nothing.

    Raises:
        ConfigError: the selection is wrong, or matches nothing.
    """
    graph = GRAPH.resolve_asset_graph()
    parents = {
        name: {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}
        for name in STAGES
    }
    chosen = {stage.name for stages in selected(select, only=True) for stage in stages}
    return [item for item in status_of_stages(Store(home), STAGES, parents) if item.stage in chosen]


def _require_a_image(store: Store) -> None:
    """Stop where no candidate is usable: every later stage would work on nothing.

    Raises:
        DataError: says how many candidates there are and why they were rejected.
    """
    if (
        not store.currency.stale(STAGES["raw_images"])
        and store.read("raw_images", ["image_id"]).is_empty()
    ):
        rejected = store.read("rejected_images", ["stage", "reason"]).filter(stage="raw_images")
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in rejected["reason"].value_counts(sort=True).iter_rows()
        )
        raise DataError(
            f"none of {rejected.height} candidates is a usable image ({reasons}); see them with "
            f'`foundry sql --home {shlex.quote(str(store.home))} "from rejected_images"`'
        )


def selected(select: str | None, *, only: bool) -> Iterator[list[Stage]]:
    """The chosen stages in the order of the graph; those that one body makes come together."""
    graph = GRAPH.resolve_asset_graph()
    chosen = set(STAGES)
    if select is not None:
        for part in select.split(","):
            name = part.strip().strip("+*")
            if name.isidentifier() and name not in STAGES:
                raise ConfigError(
                    f"--select {select!r}: no asset is named {name!r}; {toml.nearest(name, list(STAGES))}"
                )
        try:
            selections = [dg.AssetSelection.from_string(part.strip()) for part in select.split(",")]
            selection = reduce(or_, selections)
            keys = (selection if only else selection.upstream()).resolve(graph)
        except (dg.DagsterError, ValueError) as error:
            why = str(error).strip().splitlines()[0].removesuffix(":")
            raise ConfigError(
                f"--select {select!r}: {why}; see `foundry status` for the names of assets"
            ) from None
        chosen = {key.to_user_string() for key in keys}
        if not chosen:
            raise ConfigError(
                f"--select {select!r} matches no asset; there are: {', '.join(sorted(STAGES))}"
            )
    bodies: dict[int, list[Stage]] = {}
    for name, stage in STAGES.items():
        if name in chosen:
            bodies.setdefault(id(graph.get(dg.AssetKey(name)).assets_def), []).append(stage)
    yield from bodies.values()


def _run_body(
    instance: dg.DagsterInstance,
    store: Store,
    stages: list[Stage],
    run: str | None,
    deadline: float | None,
    started: Started,
    without: Collection[str],
) -> list[Outcome]:
    """Run one body over the stale partitions of its stages, but those in `without`."""
    begin = time.monotonic()
    stale = {
        stage.name: [key for key in store.currency.stale(stage) if key not in without]
        for stage in stages
    }
    if stages[0].scope is Scope.RUN:
        here = (
            [run]
            if run
            else [
                key
                for key in store.currency.keys(Scope.RUN)
                if not is_away(store.paths.run_folder(key))
            ]
        )
        stale = {name: [key for key in keys if key in here] for name, keys in stale.items()}
    keys = sorted(set().union(*stale.values()))
    left: list[str] = []
    failed: dict[str, str] = {}
    if keys:
        chosen = [stage for stage in stages if stale[stage.name]]
        why = [
            StalePartition(key, reasons(store, stage, key))
            for stage in chosen
            for key in stale[stage.name]
        ]
        started(" + ".join(stage.name for stage in chosen), len(keys), grouped(why))
        for batch in _batches(chosen[0], keys, one_by_one=deadline is not None):
            if deadline is not None and time.monotonic() > deadline:
                left.extend(batch)
                continue
            try:
                execute(instance, chosen, batch)
            except Exception as error:
                if (
                    chosen[0].scope is not Scope.CHECKPOINT
                    or not CheckpointName.parse(batch[0]).is_external
                ):
                    raise
                failed[batch[0]] = reason_of(error)
    seconds = time.monotonic() - begin
    return [
        _outcome(Store(store.home), stage, stale[stage.name], [*left, *failed], seconds, failed)
        for stage in stages
    ]


def reason_of(error: Exception) -> str:
    """Why something failed, in one line; a failure that no rule of ours names says what kind it
    is."""
    said = " ".join(str(error).split())
    return said if isinstance(error, PipelineError) else f"{type(error).__name__}: {said}"


def _batches(stage: Stage, keys: list[str], *, one_by_one: bool) -> list[list[str]]:
    """How stale partitions are put into runs: shards as one range, of one encoding each; everything
    else singly."""
    if one_by_one or stage.scope not in (Scope.SHARD, Scope.ENCODING_SHARD):
        return [[key] for key in keys]
    if stage.scope is Scope.SHARD:
        return [keys]
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(stage.encoding(key), []).append(key)
    return list(groups.values())


def execute(
    instance: dg.DagsterInstance,
    stages: Sequence[Stage],
    keys: list[str],
    *,
    tags: Mapping[str, str] | None = None,
) -> None:
    """One in-process Dagster run; a failure is raised as the error that caused it."""
    tags = {**holder_tags(), **(tags or {})}
    partition = None
    if stages[0].scope is not Scope.ALL:
        if len(keys) == 1:
            partition = keys[0]
        else:
            tags |= {RANGE_START: keys[0], RANGE_END: keys[-1]}
    job = GRAPH.resolve_implicit_global_asset_job_def()
    try:
        job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(stage.name) for stage in stages],
            partition_key=partition,
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    except PipelineError as error:
        raise type(error)(f"{stages[0].name}: {error}") from None
    except dg.DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None


def _outcome(
    store: Store,
    stage: Stage,
    stale: list[str],
    left: list[str],
    seconds: float,
    failed: dict[str, str],
) -> Outcome:
    """Numbers of a stage from its committed manifests."""
    keys = store.currency.keys_of(stage)
    outcome = Outcome(
        stage=stage.name,
        num_made=len([key for key in stale if key not in left]),
        num_partitions=len(keys),
        seconds=seconds if stale else 0.0,
        unfinished=[key for key in stale if key in left and key not in failed],
        failed=failed,
    )
    for key in keys:
        manifest = store.manifest(stage.table, stage.part(key))
        if manifest is not None:
            outcome.rows_in += manifest.report.get("rows_in") or 0
            outcome.rows_out += manifest.rows
            outcome.rows_rejected += manifest.report.get("rows_rejected") or 0
    return outcome
