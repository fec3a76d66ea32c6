"""Evaluating checkpoints when asked to, also on another machine, and comparing any two of them."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import polars as pl

from assets import sample_images, verdicts
from assets.partitions import checkpoints as checkpoint_partitions
from assets.partitions import mirror
from jobs import pipeline
from jobs.evaluate import STAGES, keep
from resources.engine.workers import Workers, WorkerSpec
from resources.instance import instance as open_instance
from resources.mlflow.catch_up import catch_up
from resources.warehouse import rebuild
from resources.workspace.staleness import StalePartition, grouped, reasons
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import toml
from training.commit import lock, write_bytes
from training.config.workspace import DevicesConfig
from training.errors import DataError, EvaluationError, PipelineError
from training.evaluation import candidates, champion
from training.names import EXTERNAL, CheckpointName, VerdictName
from training.progress import report
from training.runs.run_folder import READY, read_ready
from training.runs.run_folder import checkpoints as ready_checkpoints

FOLDER = "comparisons"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `foundry compare` found."""

    a: str
    b: str
    verdicts: pl.DataFrame
    """Rows of table `verdicts`."""
    report: Path
    """The HTML page."""


def resolve(store: Store, name: str) -> str:
    """A checkpoint's full name for what people type: `base`, `champion`, a run for its last, an
    external model, or itself.

    Raises:
        DataError: there is no such checkpoint.
    """
    if name == "base":
        if base := store.checkpoints.base():
            return base
        raise DataError("the base model is not recorded yet: run `foundry run --select base_model`")
    if name == "champion":
        now = champion.read(store.home)
        if now is None:
            raise DataError("there is no champion yet: run `foundry evaluate`")
        name = now.checkpoint
    elif name.startswith(EXTERNAL) or name in candidates.read_external_models(store.home):
        name = str(CheckpointName.of_external(name.removeprefix(EXTERNAL).removesuffix("@0")))
    elif "@" not in name:
        saved = ready_checkpoints(store.paths.run_folder(name))
        if not saved:
            raise DataError(f"run {name!r} has no checkpoint")
        return read_ready(saved[-1]).checkpoint
    if not store.checkpoints.exists(name):
        raise DataError(
            f"checkpoint {name} is not there (any more): {store.checkpoints.folder(name)}"
        )
    return name


def evaluate(home: Path, names: Sequence[str] = (), *, started: pipeline.Started) -> list[str]:
    """Draw, score and judge checkpoints, those of runs that are still training too; what is current
    stays.

    Args:
        home: The workspace.
        names: As people type them; none for the base and every checkpoint that is due.
        started: Told of each stage that has work before it begins.

    Returns:
        The checkpoints.

    Raises:
        DataError: there is no such checkpoint, or no base model or prompt set yet.
        EvaluationError: some could not be evaluated; all others are.
    """
    pipeline.bring_up_to_date(home, select="base_model,prompt_sets", only=True, started=started)
    store = Store(home)
    base = store.checkpoints.base()
    assert base is not None, "bring_up_to_date has recorded it"
    chosen = [resolve(store, name) for name in names] or store.checkpoints.to_evaluate(
        training=True
    )
    keys = list(dict.fromkeys([base, *chosen]))
    with (
        lock(home / "locks" / "foundry-run.lock", f"`foundry evaluate` in {home}", wait_s=0.0),
        open_instance(home) as instance,
    ):
        _name_partitions(instance, store, keys)
        for key in keys:
            keep(store, key)
        failed: dict[str, str] = {}
        for stage in STAGES:
            stale = [
                key
                for key in keys
                if key not in failed and not Store(home).currency.is_current(stage, key)
            ]
            if stale:
                found = [StalePartition(key, reasons(Store(home), stage, key)) for key in stale]
                started(stage.name, len(stale), grouped(found))
            for key in stale:
                try:
                    pipeline.execute(instance, [stage], [key])
                except Exception as error:  # what comes from outside may fail in any way
                    if key == base or not (
                        isinstance(error, PipelineError) or CheckpointName.parse(key).is_external
                    ):
                        raise  # nothing can be judged without the base
                    failed[key] = pipeline.reason_of(error)
        verdicts.promote(
            Store(home), logging.getLogger(__name__)
        )  # a kill may have come between verdicts and champion
    rebuild(store)
    catch_up(store, logging.getLogger(__name__))
    if failed:
        raise EvaluationError(
            "; ".join(f"{key} is not evaluated: {error}" for key, error in failed.items())
        )
    return keys


def _name_partitions(instance: dg.DagsterInstance, store: Store, keys: Sequence[str]) -> None:
    mirror(instance, store)
    assert checkpoint_partitions.name is not None
    known = set(instance.get_dynamic_partitions(checkpoint_partitions.name))
    if new := [key for key in keys if key not in known]:
        instance.add_dynamic_partitions(checkpoint_partitions.name, new)


def compare(home: Path, a: str, b: str, *, started: pipeline.Started) -> Comparison:
    """Judge checkpoint b against a and write a page that shows both; evaluates what is not
    evaluated yet.

    Raises:
        DataError: there is no such checkpoint.
        EvaluationError: they are the same, or one could not be evaluated, or an image failed.
    """
    store = Store(home)
    names = [resolve(store, name) for name in (a, b)]
    if names[0] == names[1]:
        raise EvaluationError(
            f"{a} and {b} are both checkpoint {names[0]}: there is nothing to compare"
        )
    evaluate(home, names, started=started)
    store = Store(home)
    rows = store.read("verdicts", parts=[verdicts.judge_pair(store, *names)])
    path = store.home / FOLDER / f"{VerdictName(*names)}.html"
    write_bytes(path, render(store, names, rows).encode())
    rebuild(store)
    return Comparison(a=names[0], b=names[1], verdicts=rows, report=path)


def render(store: Store, names: Sequence[str], rows: pl.DataFrame) -> str:
    """The page of a comparison."""
    from assets.release_report import protocol_facts, sides
    from training.reports.report import render as render_page

    return render_page(
        f"{names[1]} against {names[0]}", sides(store, names), rows, protocol_facts(store, names[1])
    )


def export(store: Store, path: Path) -> int:
    """Write the workspace's prompts and how they are drawn, for another machine; returns the number
    of prompts."""
    from training.evaluation import remote_sampling

    prompts = sample_images.prompts_of(store)
    remote_sampling.write_prompts(path, prompts, store.config.evaluation.sampling)
    return prompts.height


def draw_elsewhere(checkpoint: Path, prompts: Path, out: Path) -> int:
    """Draw a checkpoint's images without a workspace; returns their number."""
    from training.evaluation import remote_sampling
    from training.sampling.sampling import ImageSampler

    with Workers(WorkerSpec(make=ImageSampler, kind="evaluate"), DevicesConfig(), out) as workers:
        remote_sampling.draw(
            checkpoint,
            prompts,
            out,
            map_batches=workers.map,
            progress=lambda done, total: report("sample images", done, total),
        )
    return len(list((out / remote_sampling.IMAGES).glob("*.png")))


def _further(inputs: Mapping[str, str]) -> dict[str, str]:
    return {
        name: digest for name, digest in inputs.items() if name not in ("checkpoint", "prompts")
    }


def _name_here(store: Store, name: str, digest: str) -> str | None:
    """Name in this workspace of the model that another machine knows by `name` and by the digest of
    its weights.

    Elsewhere a model without a run is called a base, and one of another workspace's runs by that
    run: here it may be the base or an external model.
    """
    base = store.checkpoints.base()
    externals = [
        str(CheckpointName.of_external(other))
        for other in candidates.read_external_models(store.home)
    ]
    for key in [name, *([base] if base else []), *externals]:
        with contextlib.suppress(
            DataError
        ):  # no name of this workspace, or an external model whose model is gone
            folder = store.checkpoints.folder(key)
            ready = (folder / READY).is_file()
            if folder.exists() and digest == (
                read_ready(folder).digest if ready else store.checkpoints.digest(key)
            ):
                return key
    return None


def adopt(store: Store, folder: Path) -> str:
    """Take images that were drawn elsewhere into the workspace; returns their checkpoint.

    Raises:
        DamageError: the folder is unfinished or damaged.
        EvaluationError: they are of a checkpoint that is not here, or were drawn otherwise than
            this workspace does.
    """
    from training.evaluation import remote_sampling

    record = remote_sampling.read_record(folder)
    stage, key = sample_images.sample_images, _name_here(store, record.checkpoint, record.digest)
    if key is None:
        raise EvaluationError(
            f"{folder} holds images of {record.checkpoint} with weights {record.digest:.8}, and no checkpoint, base "
            f"or external model of {store.home} has these"
        )
    basis = store.currency.basis(stage, key)
    assert basis is not None, "images read no table by slices"
    here = {
        "prompts": (basis["inputs"]["prompts"], record.prompts),
        "weights and LoRAs": (_further(basis["inputs"]), record.further),
        "sampling": (toml.dump(store.config.evaluation.sampling), record.sampling),
    }
    unlike = [
        f"{name}: here {ours!s:.200}, there {theirs!s:.200}"
        for name, (ours, theirs) in here.items()
        if ours != theirs
    ]
    if unlike:
        raise EvaluationError(
            f"{folder} was drawn otherwise than this workspace would: {'; '.join(unlike)}"
        )
    with store.writer.holding(stage.name, key):
        samples = remote_sampling.bring_home(folder, record, store.paths.sample_folder(key))
        store.writer.commit(
            stage, key, Made(frame=samples, rows_in=samples.height), basis, seconds=0.0
        )
    store.checkpoints.let_go(key, sample_images.WANTED_BY)
    with open_instance(store.home) as instance:
        _name_partitions(instance, store, [key])
    rebuild(store)
    return key
