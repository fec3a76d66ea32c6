"""The one place that decides what is current: which partitions there are, what each would be made
from now, and whether it was made from that."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.graph import Scope, Stage
from resources.workspace import reading
from resources.workspace.checkpoints import Checkpoints
from resources.workspace.models import Models
from resources.workspace.paths import Paths
from resources.workspace.slices import Slices
from resources.workspace.tables import Tables
from training.commit import json_digest, write_json
from training.errors import PipelineError
from training.manifests import Manifest
from training.names import ShardKey
from training.runs.event_log import has_finished
from training.runs.run_folder import EVENTS, READY, checkpoint_folder


@dataclass(frozen=True, kw_only=True)
class Currency:
    """Which partitions of the stages are current."""

    paths: Paths
    tables: Tables
    models: Models
    checkpoints: Checkpoints
    slices: Slices
    others: Callable[[Stage, str], Mapping[str, str]]
    """Digests of a partition's inputs that are no tables."""

    def keys(self, scope: Scope) -> list[str]:
        """The partitions that exist now."""
        match scope:
            case Scope.ALL:
                return ["all"]
            case Scope.SHARD:
                return self.tables.shards()
            case Scope.ENCODING:
                return sorted(self.paths.config.encodings)
            case Scope.ENCODING_SHARD:
                encodings, listed = sorted(self.paths.config.encodings), self.tables.shards()
                return [str(ShardKey(name, shard)) for name in encodings for shard in listed]
            case Scope.MODEL:
                return ["base"]
            case Scope.PROMPT_SET:
                return sorted(self.paths.config.prompt_sets)
            case Scope.RUN:
                return self.paths.runs()
            case Scope.CHECKPOINT:
                return self.checkpoints.to_evaluate()

    def has_key(self, scope: Scope, key: str) -> bool:
        """Whether a partition exists; of checkpoints every one that is there may be evaluated."""
        if scope is not Scope.CHECKPOINT:
            return key in self.keys(scope)
        try:
            return self.checkpoints.exists(key)
        except PipelineError:
            return False

    @reading.beside()
    def basis(self, stage: Stage, key: str) -> dict[str, Any] | None:
        """What the partition would be made from now; None while an input is missing."""
        inputs: dict[str, str] = {}
        for reads in stage.reads:
            digest = self.slices.digest(stage, reads, key)
            if digest is None:
                return None
            inputs[reads.label] = digest
        inputs.update(self.others(stage, key))
        return {
            "version": stage.version,
            "inputs": inputs,
            "config": json_digest(stage.section(self.paths.config, key)),
            "models": {
                name: self.models.digest_of(name, stage.encoding(key)) for name in stage.models
            },
        }

    def is_current(self, stage: Stage, key: str) -> bool:
        """Whether the committed part is what would be made now, and its files are there."""
        manifest = self.tables.manifest(stage.table, stage.part(key))
        return manifest is not None and self.agrees(manifest, self.basis(stage, key))

    def stale(self, stage: Stage) -> list[str]:
        """Partitions whose committed part is missing or made from something else than what is there
        now."""
        return [key for key in self.keys_of(stage) if not self.is_current(stage, key)]

    def keys_of(self, stage: Stage) -> list[str]:
        """The partitions of a stage that exist now: none where the workspace does not want it."""
        return self.keys(stage.scope) if stage.in_use(self.paths.config) else []

    def agrees(self, manifest: Manifest, basis: Mapping[str, Any] | None) -> bool:
        """Whether a committed part was made from this basis, and its files are there."""
        return manifest.basis == basis and not self.missing_files(manifest)

    @reading.beside()
    def missing_files(self, manifest: Manifest) -> list[str]:
        """Files of a committed part that someone deleted, of a run also its log and its last
        checkpoint; damage is found where they are read, and by `verify`."""
        folder = self.tables.folder(manifest.table, manifest.part)
        missing = [entry.name for entry in manifest.files if not (folder / entry.name).is_file()]
        if manifest.table != "checkpoints" or missing:
            return missing
        run = self.paths.run_folder(manifest.part)
        if not has_finished(run / EVENTS):
            return [EVENTS]
        saved = self.tables.read("checkpoints", ["samples_seen"], [manifest.part])
        last = saved["samples_seen"].max()
        ready = checkpoint_folder(run, int(last)) / READY if last is not None else run / READY  # type: ignore[arg-type]
        return [] if ready.is_file() else [str(ready.relative_to(run))]

    def attempts(self, stage: Stage, key: str) -> int:
        """How often this partition was begun and not committed, from what it would be made from
        now."""
        try:
            found = json.loads(self._attempts_file(stage, key).read_bytes())
            is_same = found["basis"] == json_digest(self.basis(stage, key))
            return int(found["attempts"]) if is_same else 0
        except (OSError, ValueError, KeyError):
            return 0

    def begin(self, stage: Stage, key: str, basis: Mapping[str, Any]) -> None:
        """Count an attempt at a partition, before its work begins; a commit forgets it."""
        attempts = self.attempts(stage, key) + 1
        values = {"basis": json_digest(basis), "attempts": attempts}
        write_json(self._attempts_file(stage, key), values)

    def _attempts_file(self, stage: Stage, key: str) -> Path:
        return self.paths.attempts_file(stage.name, stage.part(key))
