"""What MLflow does not have yet of a workspace, and the one way to send it: whoever has worked
calls `catch_up`.

A note in the workspace says by digest what was sent to which experiment. It decides nothing else:
without it, or with another database behind the same address, all is sent again, which leaves alone
what is there.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from resources.mlflow import calls, views
from resources.mlflow.tracking import Tracking, workspace_tracking
from resources.workspace import reading
from resources.workspace.store import Store
from training import commit
from training.errors import ConfigError, TrackingError
from training.evaluation import champion
from training.names import CheckpointName, VerdictName
from training.runs import release as releasing
from training.runs.run_folder import EVENTS, read_inputs

NOTE = "tracking.json"
PATIENCE_S = 5.0
"""How long failures may take in all before the rest waits for the next call: what MLflow refuses at
once holds up nothing else, a hung server is waited for once."""
"""Begins the parts of table `verdicts` that compare with the base."""
_NUM_NAMED = 4
"""How many of the things that are pending a warning names."""


class _Item(NamedTuple):
    """One thing that MLflow should have."""

    name: str
    """As people read it; equal for the same thing at every call."""
    digest: str
    """Changes with what is to be sent."""
    send: Callable[[], object]
    """Sends it, and does nothing where it has arrived before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """`tracking.json`: what was sent."""

    address: str
    """Digest of MLflow's address; empty for the workspace's own, which moves with it."""
    experiment: str
    """`mlflow_calls.identity` of the experiment; empty while there is none."""
    sent: dict[str, str] = field(default_factory=dict)
    """Name of an item -> digest of what was sent."""


def owes(store: Store) -> list[str]:
    """Names of what MLflow does not have yet, without asking it.

    Raises:
        TrackingError: a table cannot be read.
    """
    with calls.explained("what MLflow lacks cannot be told"):
        tracking = _tracking(store)
        return [item.name for item in _owed(store, tracking, _read(store, tracking))]


@reading.beside()
def catch_up(store: Store, log: logging.Logger) -> bool:
    """Send MLflow what it does not have yet: event logs, scores, verdicts, reports and the
    champion.

    It never fails its caller, and never keeps it for long: MLflow is not even imported where
    nothing is pending, and given up after `PATIENCE_S` of failures. What is still pending then is a
    warning, and sent by the next call.

    Returns:
        Whether MLflow has everything.
    """
    names: list[str] = []
    try:
        if not (names := owes(store)):
            return True
        with (
            calls.explained("MLflow does not catch up"),
            commit.lock(
                store.home / "locks" / "tracking.lock", f"catching up MLflow with {store.home}"
            ),
        ):
            failed = _send(store, _tracking(store))
    except TrackingError as error:
        if not names:
            log.warning(f"MLflow: {error}")
            return False
        failed = dict.fromkeys(names, str(error))
    if failed:
        further = len(failed) - _NUM_NAMED
        listed = ", ".join(list(failed)[:_NUM_NAMED]) + (
            f" and {further} more" if further > 0 else ""
        )
        log.warning(f"MLflow is pending {listed}: {next(iter(failed.values()))}")
    return not failed


def _send(store: Store, tracking: Tracking) -> dict[str, str]:
    """Send what is pending, oldest first; returns what is pending still, and why."""
    identity = tracking.identity()
    note = _read(store, tracking)
    if note.experiment != identity:
        note = _Note(address=note.address, experiment=identity)
    owed, failed, patience_s = list(_owed(store, tracking, note)), dict[str, str](), PATIENCE_S
    for number, item in enumerate(owed):
        began = time.monotonic()
        try:
            with calls.explained(f"{item.name} cannot be sent"):
                item.send()
        except TrackingError as error:
            failed[item.name] = str(error)
            patience_s -= time.monotonic() - began
            if patience_s < 0:
                return failed | {later.name: str(error) for later in owed[number + 1 :]}
        else:
            note.sent[item.name] = item.digest
            _write(store, note)
    return failed


def _owed(store: Store, tracking: Tracking, note: _Note) -> Iterator[_Item]:
    return (item for item in _items(store, tracking) if note.sent.get(item.name) != item.digest)


def _items(store: Store, tracking: Tracking) -> Iterator[_Item]:
    """All that MLflow should have: the experiment under its name, then logs; of each run the newest
    checkpoint last, whose verdict stays on top."""
    if work := list(_work(store, tracking)):
        # A copy, or a workspace that moved, has another name; another version of ours other views.
        plain = [view.state for view in views.views().values()]
        said = commit.json_digest([tracking.workspace, tracking.experiment, plain])
        yield _Item("the experiment", said, partial(_send_experiment, tracking))
    yield from work


def _send_experiment(tracking: Tracking) -> None:
    tracking.identity()
    tracking.views()


def _work(store: Store, tracking: Tracking) -> Iterator[_Item]:
    for path in sorted((store.home / "runs").glob(f"*/{EVENTS}")):
        yield _Item(
            f"the log of run {path.parent.name}",
            str(path.stat().st_size),
            partial(tracking.forward, path.parent),
        )
    for run in store.tables.parts("checkpoints"):
        manifest = store.manifest("checkpoints", run)
        if manifest is not None and (
            dagster_run := str(manifest.provenance.get("dagster_run", ""))
        ):
            send = partial(tracking.log_dagster_run, run, dagster_run)
            yield _Item(f"the link from {run} to Dagster", dagster_run, send)
    for checkpoint in sorted(store.tables.parts("eval_metrics"), key=CheckpointName.parse):
        digests = [_digest(store, table, checkpoint) for table in ("eval_metrics", "sample_images")]
        yield _Item(
            f"scores of {checkpoint}",
            "+".join(digests),
            partial(_send_scores, store, tracking, checkpoint),
        )
    for run, base in _bases(store).items():
        send = partial(_send_base_images, store, tracking, run, base)
        yield _Item(f"the base's images beside {run}", _digest(store, "sample_images", base), send)
    verdicts: dict[str, list[str]] = {}
    pairs = (VerdictName.parse(part) for part in store.tables.parts("verdicts"))
    judged = sorted(CheckpointName.parse(pair.b) for pair in pairs if pair.is_against_base)
    for name in judged:
        part = str(VerdictName.against_base(str(name)))
        verdicts.setdefault(name.run, []).append(part)
    for run, parts in verdicts.items():
        digest = commit.json_digest([_digest(store, "verdicts", part) for part in parts])
        yield _Item(f"verdicts on {run}", digest, partial(_send_verdicts, store, tracking, parts))
    for run in store.tables.parts("release"):
        yield _Item(
            f"the report of {run}",
            _digest(store, "release", run),
            partial(_send_report, store, tracking, run),
        )
    now = champion.read(store.home)
    if now is not None and now.verdict:
        send = partial(tracking.set_champion, now.checkpoint, now.sentence)
        yield _Item("the champion", commit.json_digest([now.checkpoint, now.sentence]), send)


def _bases(store: Store) -> dict[str, str]:
    """Run -> its base model as a checkpoint, where the base drew the same prompts as a checkpoint
    of the run."""
    drawn, found = store.tables.parts("sample_images"), {}
    for checkpoint in drawn:
        name = CheckpointName.parse(checkpoint)
        if not name.is_of_run:
            continue
        with contextlib.suppress(
            ConfigError
        ):  # the run's own log cannot be sent then, and says why
            digest = read_inputs(store.paths.run_folder(name.run)).base_digest
            base = str(CheckpointName.of_base(digest))
            if base in drawn and _prompts(store, base) == _prompts(store, checkpoint):
                found[name.run] = base
    return found


def _prompts(store: Store, checkpoint: str) -> str | None:
    """Digest of the prompts that a checkpoint's images were drawn of."""
    manifest = store.manifest("sample_images", checkpoint)
    return manifest.inputs.get("prompts") if manifest else None


def _digest(store: Store, table: str, part: str) -> str:
    manifest = store.manifest(table, part)
    return manifest.digest if manifest else "absent"


def _send_scores(store: Store, tracking: Tracking, checkpoint: str) -> None:
    drawn = store.manifest("sample_images", checkpoint) is not None
    tracking.log_evaluation(
        checkpoint,
        metrics=store.read("eval_metrics", parts=[checkpoint]),
        samples=store.read("sample_images", parts=[checkpoint] if drawn else []),
        folder=store.paths.sample_folder(checkpoint),
    )


def _send_base_images(store: Store, tracking: Tracking, run: str, base: str) -> None:
    tracking.log_base_images(
        run, store.read("sample_images", parts=[base]), store.paths.sample_folder(base)
    )


def _send_verdicts(store: Store, tracking: Tracking, parts: list[str]) -> None:
    for part in parts:
        manifest = store.manifest("verdicts", part)
        note = str(manifest.report.get("numbers", {}).get("note", "")) if manifest else ""
        tracking.log_verdict(VerdictName.parse(part).b, store.read("verdicts", parts=[part]), note)


def _send_report(store: Store, tracking: Tracking, run: str) -> None:
    manifest = store.manifest("release", run)
    assert manifest is not None, "it is a committed part"
    checkpoint, report = (
        manifest.report["numbers"]["checkpoint"],
        store.home / "release" / run / releasing.REPORT,
    )
    tracking.log_file(checkpoint, report.name, report.read_bytes())
    if (sheet := store.paths.sheet_file(run)).is_file():
        tracking.log_file(checkpoint, "contact_sheet.jpg", sheet.read_bytes())


def _tracking(store: Store) -> Tracking:
    return workspace_tracking(store.home, store.config.tracking.uri)


def _read(store: Store, tracking: Tracking) -> _Note:
    """What was sent to the experiment that is there now; nothing where the note is of another, or
    damaged."""
    address = "" if tracking.artifacts is not None else commit.json_digest(tracking.uri)
    try:
        there = tracking.on_disk()
        found = calls.identity(there.experiment_id, there.created_ms) if there else ""
    except LookupError:
        found = None
    try:
        values = json.loads((store.home / NOTE).read_bytes())
        note = _Note(
            address=values["address"], experiment=values["experiment"], sent=dict(values["sent"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return _Note(address=address, experiment=found or "")
    same = note.address == address and found in (None, note.experiment)
    return note if same else _Note(address=address, experiment=found or "")


def _write(store: Store, note: _Note) -> None:
    commit.write_json(
        store.home / NOTE,
        {"address": note.address, "experiment": note.experiment, "sent": note.sent},
    )
