"""The workspace: the only code that builds its paths, and the one place that decides what is
current."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from resources.graph import Per, Reads, Scope, Stage
from training import toml
from training.runs import retention
from training.models.base_model import SUFFIX, config_folder, require_file
from training.names import check_name
from training.commit import (
    Entry,
    Manifest,
    atomic_file,
    check_entry,
    column_digests,
    commit_manifest,
    json_digest,
    lock,
    logical_digest,
    manifests,
    parquet_columns,
    read_manifest,
    read_parquet,
    sha256_file,
    write_json,
    write_parquet,
)
from training.config.workspace import FORMAT, WorkspaceConfig
from training.tables.schemas import TABLES
from training.errors import ConfigError, DataError, ModelError, PipelineError, WorkspaceError
from training.evaluation import champion
from training.evaluation.candidates import RIVAL, due, read_rivals
from training.runs.event_log import has_finished
from training.runs.run_folder import CONFIG, EVENTS, READY, checkpoint_folder, read_config, read_ready
from training.runs.run_folder import checkpoints as ready_checkpoints

CONFIG_FILE = "foundry.toml"
CODE_ROOT = Path(__file__).resolve().parents[2]
DEMO_PREFIX = "demo:"
PUBLISHED = {
    "clip": "openai/clip-vit-large-patch14",
    "aesthetic": "ttj/sac-logos-ava1-l14-linearMSE",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hps_v2": "xswu/HPSv2",
    "image_reward": "zai-org/ImageReward",
    "tagger": "fancyfeast/joytag",
    "detector": "google/owlv2-base-patch16-ensemble",
    "base": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Where the weights under a key of [models] are published; a folder that lacks files says which,
and how to get it."""
_NO_PATH = re.compile(r"[?%\\\x00-\x1f\x7f]")


def find_home(home: Path | None = None, start: Path | None = None) -> Path:
    """The workspace a command works on: `home`, else FOUNDRY_HOME, else the nearest parent with
    foundry.toml, else `./workspace`."""
    if home is not None:
        return home.expanduser().resolve()
    if named := os.environ.get("FOUNDRY_HOME"):
        return Path(named).expanduser().resolve()
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return start / "workspace"


def check_home(home: Path) -> None:
    """Refuse a path that a part of the workspace could not use: DuckDB and the URLs of SQLite give
    some characters a meaning of their own.

    Raises:
        WorkspaceError: names the path and what it must not hold.
    """
    text = str(home)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WorkspaceError(f"the path of a workspace must be UTF-8, {os.fsencode(home)!r} is not") from None
    if found := _NO_PATH.search(text):
        raise WorkspaceError(
            f"the path of a workspace must hold no ?, %, backslash or control character, {text!r} holds {found[0]!r}; "
            "choose or rename a folder"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage made of one partition."""

    frame: pl.DataFrame
    """Rows of the stage's table."""
    rejected: pl.DataFrame | None = None
    """Rows of `rejected_images`; None where the stage cannot reject."""
    rows_in: int | None = None
    """Rows it was given: checked against rows out plus rejected."""
    files: tuple[Entry, ...] = ()
    """Further content files in the table's folder."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Numbers, pictures and links for the UI."""


@dataclass(frozen=True)
class Store:
    """Reads and commits the parts of one workspace."""

    home: Path
    run_id: str = ""
    """Dagster run on whose behalf parts are committed."""

    @cached_property
    def config(self) -> WorkspaceConfig:
        """The workspace's foundry.toml.

        Raises: WorkspaceError: there is no workspace here, its path cannot be used, or a newer
            version made it. ConfigError: a key or value is wrong.
        """
        check_home(self.home)
        path = self.home / CONFIG_FILE
        if not path.is_file():
            raise WorkspaceError(
                f"{self.home} is no workspace ({CONFIG_FILE} is missing); make one with `foundry init`"
            )
        values = toml.load(path)
        found = values.get("format")
        if not isinstance(found, int) or found > FORMAT:
            raise WorkspaceError(
                f"{path}: format={found!r}, this version reads format {FORMAT}; "
                "install the version of Diffusion Foundry that made the workspace, or a newer one"
            )
        return toml.build(WorkspaceConfig, values, origin=path)

    # --- paths
    # -------------------------------------------------------------------------------------------------

    def table_folder(self, table: str, part: str) -> Path:
        """Folder with the content files and the manifest of a part."""
        if table == "latents":
            encoding, _, shard = part.partition("|")
            return self.home / "latents" / encoding / shard
        return self.home / "tables" / table

    def run_folder(self, run: str) -> Path:
        """Folder of a training run."""
        return self.home / "runs" / check_name("run", run)

    def sample_folder(self, checkpoint: str) -> Path:
        """Folder of a checkpoint's sample images."""
        return self.home / "sample_images" / checkpoint

    def sheet_file(self, run: str) -> Path:
        """Contact sheet of all that the report on a run shows."""
        return self.home / "sample_images" / f"{run}_contact_sheet.jpg"

    def source_root(self, source: str) -> Path:
        """Folder of a source.

        Raises:
            DataError: it is not there.
        """
        config = next((item for item in self.config.sources if item.name == source), None)
        if config is None:
            raise ConfigError(f"{self.home / CONFIG_FILE}: no source is named {source!r}")
        root = (self.home / Path(config.path).expanduser()).resolve()
        if not root.is_dir():
            raise DataError(f"source {source!r}: {root} is not a folder; mend its path in {self.home / CONFIG_FILE}")
        return root

    def resource_path(self, name: str) -> Path:
        """A path from the configuration: relative to the workspace, or embedded (`demo:NAME`)."""
        if name.startswith(DEMO_PREFIX):
            return CODE_ROOT / "demo" / name.removeprefix(DEMO_PREFIX)
        return (self.home / Path(name).expanduser()).resolve()

    def model_path(self, key: str) -> Path:
        """Folder of the model under `[models] key`; for `base` also a single .safetensors file.

        Raises:
            ModelError: it is missing; the message says what to do.
        """
        if key == "base":
            return self.base_path(key)
        name = self.config.models.folder(key)
        path = self.resource_path(name)
        if not path.is_dir():
            raise self._missing_model(key, name, path, PUBLISHED.get(key))
        return path

    def _missing_model(self, key: str, name: str, path: Path, repository: str | None) -> ModelError:
        fetch = f"fetch it with `hf download {repository} --local-dir {path}`, " if repository else ""
        return ModelError(
            f"[models] {key} = {name!r}: folder {path} is missing; {fetch}set the key in "
            f"{self.home / CONFIG_FILE}, or start with `foundry init --preset demo`, which needs no weights"
        )

    def base_path(self, name: str) -> Path:
        """The model that a run starts from by this name, a diffusers folder or a single
        .safetensors file.

        Raises:
            ConfigError: foundry.toml names no such model.
            ModelError: it is missing; the message says what to do.
        """
        found = self.config.models.base_named(name).path
        path = self.resource_path(found)
        if path.suffix == SUFFIX:
            require_file(path)
        elif not path.is_dir():
            key = "base" if name == "base" else f"bases.{name}.path"
            raise self._missing_model(key, found, path, PUBLISHED["base"])
        return path

    # --- manifests
    # ---------------------------------------------------------------------------------------------

    def manifest_path(self, table: str, part: str) -> Path:
        """The manifest of a part; for latents, of its current generation."""
        folder = self.table_folder(table, part)
        if table != "latents":
            return folder / f"{part}.json"
        return max(folder.glob("g[0-9][0-9][0-9][0-9].json"), default=folder / "g0001.json")

    def manifest(self, table: str, part: str) -> Manifest | None:
        """The committed manifest of a part, or None."""
        return read_manifest(self.manifest_path(table, part))

    def parts(self, table: str) -> list[str]:
        """Names of all committed parts of a table, sorted."""
        if table == "latents":
            found = {path.parent for path in (self.home / "latents").glob("*/*/g[0-9][0-9][0-9][0-9].json")}
            return sorted(f"{path.parent.name}|{path.name}" for path in found)
        return [path.stem for path in manifests(self.home / "tables" / table)]

    def table_file(self, table: str, part: str) -> Path:
        """The Parquet file of a committed part, checked against its manifest on the first open of
        this process.

        Raises:
            DataError: the part is not committed.
            DamageError: the file does not match its manifest.
        """
        manifest = self.manifest(table, part)
        if manifest is None:
            raise DataError(f"table {table} has no part {part!r} yet; run `foundry run --select {table}`")
        entry = manifest.files[0]
        folder = self.table_folder(table, part)
        if (path := folder / entry.name) not in self._checked:
            check_entry(folder, entry)
            self._checked.add(path)
        return path

    @cached_property
    def _checked(self) -> set[Path]:
        return set()

    @cached_property
    def _rows_digests(self) -> dict[tuple[str, str, tuple[str, ...]], dict[str, str]]:
        return {}

    @cached_property
    def _model_digests(self) -> dict[str, str]:
        return {}

    # --- reading
    # -----------------------------------------------------------------------------------------------

    def read(self, table: str, columns: Sequence[str] = (), parts: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of the given parts (default: all), sorted by the table's key; null in columns
        younger than a part."""
        schema = TABLES[table].schema
        names = list(columns) or list(schema)
        wanted = self.parts(table) if parts is None else list(parts)
        frames = [_read_columns(self.table_file(table, part), names, schema) for part in wanted]
        return pl.concat(frames) if frames else pl.DataFrame(schema={name: schema[name] for name in names})

    def read_slice(self, stage: Stage, table: str, key: str) -> pl.DataFrame:
        """Exactly the slice of `table` that the stage declares to read for partition `key`."""
        reads = next(item for item in stage.reads if item.table == table)
        frame = self.read(table, self._columns_with_shard(reads), self._parts_of(stage, reads, key))
        if reads.per in (Per.ROWS, Per.ENCODING_ROWS):
            frame = frame.filter(pl.col("shard") == stage.shard(key))
        return frame.select(list(reads.columns) or list(TABLES[table].schema))

    def _columns_with_shard(self, reads: Reads) -> tuple[str, ...]:
        by_rows = reads.per in (Per.ROWS, Per.ENCODING_ROWS)
        if not reads.columns or not by_rows or "shard" in reads.columns:
            return reads.columns
        return (*reads.columns, "shard")

    def _parts_of(self, stage: Stage, reads: Reads, key: str) -> list[str]:
        """The committed parts that a slice covers."""
        parts = self.parts(reads.table)
        match reads.per:
            case Per.ALL | Per.ROWS:
                return parts
            case Per.SHARD:
                shard = stage.shard(key)
                return [part for part in parts if part == shard or part.startswith(f"{shard}.")]
            case Per.KEY:
                return [part for part in parts if part == key]
            case Per.ENCODING | Per.ENCODING_ROWS:
                return [part for part in parts if part == stage.encoding(key)]
            case Per.ENCODING_ALL:
                return [part for part in parts if part.startswith(f"{stage.encoding(key)}|")]

    # --- currency
    # ----------------------------------------------------------------------------------------------

    def keys(self, scope: Scope) -> list[str]:
        """The partitions that exist now."""
        match scope:
            case Scope.ALL:
                return ["all"]
            case Scope.SHARD:
                return self.shards()
            case Scope.ENCODING:
                return sorted(self.config.encodings)
            case Scope.ENCODING_SHARD:
                return [f"{name}|{shard}" for name in sorted(self.config.encodings) for shard in self.shards()]
            case Scope.MODEL:
                return ["base"]
            case Scope.PROMPT_SET:
                return sorted(self.config.prompt_sets)
            case Scope.RUN:
                return sorted(path.parent.name for path in (self.home / "runs").glob("*/config.toml"))
            case Scope.CHECKPOINT:
                return self.checkpoints_to_evaluate()

    def has_key(self, scope: Scope, key: str) -> bool:
        """Whether a partition exists; of checkpoints every one that is there may be evaluated."""
        if scope is not Scope.CHECKPOINT:
            return key in self.keys(scope)
        try:
            return self.is_there(key)
        except PipelineError:
            return False

    def shards(self) -> list[str]:
        """All shards of the listing, sorted."""
        if self.manifest("source_listing", "all") is None:
            return []
        return sorted(self.read("source_listing", ["shard"])["shard"].unique().to_list())

    def base_checkpoint(self) -> str | None:
        """Name of the base model as a checkpoint, once it is recorded."""
        if self.manifest("base_model", "base") is None:
            return None
        return str(self.read("base_model", ["checkpoint"], ["base"])["checkpoint"][0])

    def checkpoints_to_evaluate(self, *, training: bool = False) -> list[str]:
        """The base model, rivals, of each run that has ended the first, every N-th and the last
        checkpoint, and the champion, so that its scores are always of the protocol of those that
        challenge it.

        Args:
            training: Those of runs that are still training as well.
        """
        base = self.base_checkpoint()
        names = [base, *(f"{RIVAL}{name}@0" for name in read_rivals(self.home))] if base else []
        for run in self.keys(Scope.RUN) if training else self.finished_runs():
            folder = self.run_folder(run)
            config = read_config(folder)
            saved = [read_ready(path).samples_seen for path in ready_checkpoints(folder)]
            every, interval = self.config.evaluation.every, config.checkpoints.every_samples
            found = due(saved, interval=interval, every=every, num_samples=config.num_samples)
            names.extend(f"{run}@{samples_seen}" for samples_seen in found)
        now = champion.read(self.home)
        if now is not None and self.is_of_run(now.checkpoint) and self.is_there(now.checkpoint):
            names.append(now.checkpoint)
        return list(dict.fromkeys(names))

    def finished_runs(self) -> list[str]:
        """Runs whose checkpoints are committed; a run whose folder was removed since, or that is
        trained anew, is none of them."""
        folders = {run: self.run_folder(run) for run in self.parts("checkpoints")}
        return [run for run, path in folders.items() if (path / CONFIG).is_file() and has_finished(path / EVENTS)]

    def is_of_run(self, checkpoint: str) -> bool:
        """Whether a checkpoint is a run's, and no base model or rival."""
        return not checkpoint.startswith(("base.", RIVAL))

    def is_external(self, checkpoint: str) -> bool:
        """Whether a checkpoint is a model from outside: what becomes of it must not hold up
        anything else."""
        return checkpoint.startswith(RIVAL)

    def is_there(self, checkpoint: str) -> bool:
        """Whether a checkpoint's weights are still there; retention removes those of runs.

        Raises:
            DataError: no checkpoint of this workspace has that name.
        """
        folder = self.checkpoint_folder(checkpoint)
        return (folder / READY).is_file() if self.is_of_run(checkpoint) else folder.exists()

    def keep(self, checkpoint: str, purpose: str) -> None:
        """Keep a checkpoint of a run from retention until it is let go for the same purpose; other
        models stay anyway.

        Raises:
            DataError: retention was faster.
        """
        if not self.is_of_run(checkpoint):
            return
        try:
            retention.want(self.checkpoint_folder(checkpoint), purpose)
        except FileNotFoundError:
            raise DataError(f"checkpoint {checkpoint} is not there any more: its run's retention removed it") from None

    def let_go(self, checkpoint: str, purpose: str) -> None:
        """End what `keep` began."""
        if self.is_of_run(checkpoint):
            retention.release(self.checkpoint_folder(checkpoint), purpose)

    def last_checkpoint(self, run: str) -> str | None:
        """The last checkpoint of a run that has ended; None while it has not."""
        if run not in self.finished_runs():
            return None
        rows = self.read("checkpoints", ["checkpoint", "samples_seen"], [run]).sort("samples_seen")
        return str(rows["checkpoint"][-1]) if rows.height else None

    def rival_path(self, checkpoint: str) -> Path | None:
        """Model of the rival `rival.<name>@0`; None for other checkpoints.

        Raises:
            DataError: there is no such rival, or its model is gone.
        """
        run, _, samples = checkpoint.rpartition("@")
        if not run.startswith(RIVAL) or samples != "0":
            return None
        name, rivals = run.removeprefix(RIVAL), read_rivals(self.home)
        if name not in rivals:
            raise DataError(f"there is no rival {name!r}; there are: {', '.join(rivals) or 'none'}")
        path = Path(rivals[name])
        if not path.exists():
            raise DataError(
                f"external model {name!r}: {path} is missing; bring it back, or `foundry rival remove {name}`"
            )
        return path

    def checkpoint_folder(self, checkpoint: str) -> Path:
        """Model folder of `<run>@<samples_seen>`, or of a base model.

        Raises:
            DataError: there is no such checkpoint.
        """
        run, _, samples = checkpoint.rpartition("@")
        if checkpoint == self.base_checkpoint():
            return self.model_path("base")
        if rival := self.rival_path(checkpoint):
            return rival
        if not samples.isdigit() or run.startswith("base."):
            raise DataError(f"{checkpoint!r} is no checkpoint of this workspace (<run>@<samples_seen>)")
        return checkpoint_folder(self.run_folder(run), int(samples))

    def checkpoint_digest(self, checkpoint: str) -> str:
        """Digest of a checkpoint's weights."""
        if checkpoint == self.base_checkpoint():
            return self.model_digest("base")
        if rival := self.rival_path(checkpoint):
            return self._folder_digest(rival)
        return read_ready(self.checkpoint_folder(checkpoint)).digest

    def slice_digest(self, stage: Stage, reads: Reads, key: str) -> str | None:
        """Logical digest of the slice that partition `key` reads; None while a needed part is
        missing."""
        parts = self._parts_of(stage, reads, key)
        if not parts:
            return None
        digests = {}
        for part in parts:
            manifest = self.manifest(reads.table, part)
            assert manifest is not None
            if reads.per in (Per.ROWS, Per.ENCODING_ROWS):
                digests[part] = self._rows_digest(manifest, reads, stage.shard(key))
            elif reads.columns:
                chosen = {name: manifest.columns[name] for name in reads.columns}
                digests[part] = logical_digest(chosen, manifest.rows)
            else:
                digests[part] = manifest.digest
        return json_digest(digests)

    def _rows_digest(self, manifest: Manifest, reads: Reads, shard: str) -> str:
        """Digest of one shard's rows of a whole table; all shards are digested in one pass and
        remembered."""
        memo_key = (manifest.table, f"{manifest.part}:{manifest.digest}", reads.columns)
        if memo_key not in self._rows_digests:
            columns = list(reads.columns) or list(TABLES[reads.table].schema)
            frame = self.read(reads.table, self._columns_with_shard(reads), [manifest.part])
            self._rows_digests[memo_key] = {
                str(name): logical_digest(column_digests(rows.select(columns)), rows.height)
                for (name,), rows in frame.partition_by("shard", as_dict=True).items()
            }
        return self._rows_digests[memo_key].get(shard, "no rows")

    def basis(self, stage: Stage, key: str) -> dict[str, Any] | None:
        """What the partition would be made from now; None while an input is missing."""
        inputs: dict[str, str] = {}
        for reads in stage.reads:
            digest = self.slice_digest(stage, reads, key)
            if digest is None:
                return None
            inputs[reads.label] = digest
        inputs.update(stage.others(self, key))
        return {
            "version": stage.version,
            "inputs": inputs,
            "config": json_digest(self.section(stage, key)),
            "models": {name: self._stage_model(stage, name, key) for name in stage.models},
        }

    def section(self, stage: Stage, key: str) -> Any:
        """The stage's section of the configuration as plain values."""
        section = stage.config(self.config, key)
        return section if isinstance(section, Mapping) else toml.dump(section)

    def is_current(self, stage: Stage, key: str) -> bool:
        """Whether the committed part is what would be made now, and its files are there."""
        manifest = self.manifest(stage.table, stage.part(key))
        return manifest is not None and self.agrees(manifest, self.basis(stage, key))

    def attempts(self, stage: Stage, key: str) -> int:
        """How often this partition was begun and not committed, from what it would be made from
        now."""
        path = self._attempts_file(stage, key)
        try:
            found = json.loads(path.read_bytes())
            return int(found["attempts"]) if found["basis"] == json_digest(self.basis(stage, key)) else 0
        except (OSError, ValueError, KeyError):
            return 0

    def begin(self, stage: Stage, key: str, basis: Mapping[str, Any]) -> None:
        """Count an attempt at a partition, before its work begins; `commit` forgets it."""
        attempts = self.attempts(stage, key) + 1
        write_json(self._attempts_file(stage, key), {"basis": json_digest(basis), "attempts": attempts})

    def _attempts_file(self, stage: Stage, key: str) -> Path:
        return self.home / "cache" / "attempts" / f"{stage.name}.{stage.part(key)}.json"

    def agrees(self, manifest: Manifest, basis: Mapping[str, Any] | None) -> bool:
        """Whether a committed part was made from this basis, and its files are there."""
        return manifest.basis == basis and not self.missing_files(manifest)

    def missing_files(self, manifest: Manifest) -> list[str]:
        """Files of a committed part that someone deleted, of a run also its log and its last
        checkpoint; damage is found where they are read, and by `verify`."""
        folder = self.table_folder(manifest.table, manifest.part)
        missing = [entry.name for entry in manifest.files if not (folder / entry.name).is_file()]
        if manifest.table != "checkpoints" or missing:
            return missing
        run = self.run_folder(manifest.part)
        if not has_finished(run / EVENTS):
            return [EVENTS]
        last = self.read("checkpoints", ["samples_seen"], [manifest.part])["samples_seen"].max()
        ready = checkpoint_folder(run, int(last)) / READY if last is not None else run / READY  # type: ignore[arg-type]
        return [] if ready.is_file() else [str(ready.relative_to(run))]

    def stale(self, stage: Stage) -> list[str]:
        """Partitions whose committed part is missing or made from something else than what is there
        now."""
        return [key for key in self.keys_of(stage) if not self.is_current(stage, key)]

    def keys_of(self, stage: Stage) -> list[str]:
        """The partitions of a stage that exist now: none where the workspace does not want it."""
        return self.keys(stage.scope) if stage.in_use(self.config) else []

    def model_digest(self, key: str) -> str:
        """Digest of the model under `[models] key`."""
        return self._folder_digest(self.model_path(key))

    def base_digest(self, name: str) -> str:
        """Digest of the model that a run starts from by this name."""
        return self._folder_digest(self.base_path(name))

    def vae_folder(self, encoding: str) -> Path:
        """Folder of an encoding's VAE, which may be missing.

        Raises:
            ConfigError: foundry.toml has no such encoding, though a run names it.
        """
        name = self.config.encoding(encoding).vae
        if name == "base":
            return config_folder(self.resource_path(self.config.models.base)) / "vae"
        return self.resource_path(name)

    def model_name(self, name: str, encoding: str) -> str:
        """What foundry.toml says for a model of a stage; for `vae`, for that of the encoding."""
        if name != "vae":
            return self.config.models.folder(name)
        vae = self.config.encoding(encoding).vae
        return f"that of {self.config.models.base}" if vae == "base" else vae

    def vae_of_run(self, encoding: str, base: str) -> Path | None:
        """Folder of an encoding's VAE; None where it is that of the model that the run starts from
        itself."""
        folder = self.vae_folder(encoding)
        return None if folder == self.resource_path(self.config.models.base_named(base).path) / "vae" else folder

    def vae_digest(self, encoding: str) -> str:
        """Digest of an encoding's VAE.

        Raises:
            ModelError: it is missing.
        """
        if self.config.encoding(encoding).vae == "base":
            self.model_path("base")  # says what to do where there is none
        return self._folder_digest(self.vae_folder(encoding))

    def _stage_model(self, stage: Stage, name: str, key: str) -> str:
        return self.vae_digest(stage.encoding(key)) if name == "vae" else self.model_digest(name)

    def _folder_digest(self, folder: Path) -> str:
        """Digest of the files of a model, a folder or a single file; remembered by path, sizes and
        times."""
        if str(folder) not in self._model_digests:
            files = [folder, *config_folder(folder).rglob("*")]
            stamp = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file())
            memo_path = self.home / "cache" / "models" / f"{json_digest([str(folder), stamp])[:16]}.json"
            try:
                digest = str(json.loads(memo_path.read_bytes())["digest"])
            except (OSError, ValueError, KeyError):
                from training.models.weights import model_digest  # takes torch along, for seconds

                digest = model_digest(folder)
                with contextlib.suppress(WorkspaceError):  # where nothing can be written, it is digested each time
                    write_json(memo_path, {"folder": str(folder), "digest": digest})
            self._model_digests[str(folder)] = digest
        return self._model_digests[str(folder)]

    # --- writing
    # -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, table: str, part: str) -> Iterator[None]:
        """Hold the part's lock: one writer at a time, and a dead one holds nothing."""
        path = self.home / "locks" / f"{table}.{part}.lock"
        with lock(path, f"{table} {part} in {self.home}"):
            yield

    def commit(self, stage: Stage, key: str, made: Made, basis: Mapping[str, Any], seconds: float) -> Manifest:
        """Write content, then replace the manifest of partition `key`.

        Raises:
            DataError: rows do not add up, or do not fit the table's schema.
        """
        table = TABLES[stage.table]
        part = stage.part(key)
        frame = table.conform(made.frame)
        num_rejected = 0 if made.rejected is None else made.rejected.height
        if made.rows_in is not None and made.rows_in != frame.height + num_rejected:
            raise DataError(
                f"{stage.name} {key}: {made.rows_in} rows in, but {frame.height} out and {num_rejected} rejected"
            )
        config = self.section(stage, key)
        rejected = {}
        if made.rejected is not None:
            rejected = self.commit_rejected(stage.name, stage.version, key, made.rejected, config=config, basis=basis)
        folder = self.table_folder(stage.table, part)
        stem, path = part, folder / f"{part}.json"
        if stage.name == "latents":
            stem = str(made.report["generation"])
            path = folder / f"{stem}.json"
        digests = column_digests(frame)
        manifest = Manifest(
            table=stage.table,
            part=part,
            version=stage.version,
            files=(write_parquet(folder, stem, frame), *made.files),
            rows=frame.height,
            digest=logical_digest(digests, frame.height),
            columns=digests,
            inputs=basis["inputs"],
            config=config,
            models=basis["models"],
            rejected=rejected,
            report={
                **made.report,
                "rows_in": made.rows_in,
                "rows_rejected": num_rejected,
                "seconds": round(seconds, 2),
            },
            provenance=self._provenance(),
        )
        commit_manifest(path, manifest)
        self._attempts_file(stage, key).unlink(missing_ok=True)
        return manifest

    def commit_rejected(
        self,
        stage: str,
        version: int,
        key: str,
        rejected: pl.DataFrame,
        *,
        config: Any,
        basis: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Commit what a stage could not use of a partition; returns what the stage's manifest says
        of it.

        Both manifests carry what they follow from: equal where they were made together.
        """
        table = TABLES["rejected_images"]
        part = f"{stage}.{key}"
        frame = table.conform(rejected).sort(list(table.columns), nulls_last=True)
        digests = column_digests(frame)
        digest = logical_digest(digests, frame.height)
        folder = self.table_folder("rejected_images", part)
        manifest = Manifest(
            table="rejected_images",
            part=part,
            version=version,
            files=(write_parquet(folder, part, frame),),
            rows=frame.height,
            digest=digest,
            columns=digests,
            inputs=basis["inputs"],
            config=config,
            models=basis["models"],
            provenance=self._provenance(),
        )
        commit_manifest(folder / f"{part}.json", manifest)
        return {"part": part, "digest": digest, "rows": frame.height}

    def _provenance(self) -> dict[str, Any]:
        return {
            "git": git_revision(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "dagster_run": self.run_id,
        }

    def resume_batches(
        self,
        table: str,
        key: str,
        identity: str,
        batches: Sequence[Any],
        run: Callable[[Iterable[Any]], Iterator[pl.DataFrame]],
    ) -> Iterator[pl.DataFrame]:
        """Yield the frame of every batch in order; those that an earlier, killed attempt finished
        are read back.

        Args: table: What is being made. key: Its partition. identity: Digest of everything the
            frames follow from; finished batches of another identity are dropped. batches: All
            batches, in order. run: Works off the batches it is given, in order.
        """
        folder = self._partial_folder(table, key)
        mine = folder / identity[:16]
        if folder.is_dir():
            for other in folder.iterdir():
                if other != mine:
                    shutil.rmtree(other)
        paths = [mine / f"{number:06d}.parquet" for number in range(len(batches))]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        fresh = run([batches[number] for number in missing])
        for number, path in enumerate(paths):
            if number not in missing:
                yield read_parquet(path)
                continue
            frame = next(fresh)
            with atomic_file(path) as temporary:
                frame.write_parquet(temporary)
            yield frame

    def clear_partial(self, table: str, key: str) -> None:
        """Drop the finished batches of a partition: it is committed."""
        shutil.rmtree(self._partial_folder(table, key), ignore_errors=True)

    def _partial_folder(self, table: str, key: str) -> Path:
        return self.home / "tables" / table / f"{key}.partial"

    # --- what people forbid
    # ------------------------------------------------------------------------------------

    def forgotten(self) -> frozenset[str]:
        """Image ids that must never return."""
        path = self.home / "forget.txt"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return frozenset(line.split("#")[0].strip() for line in lines if line.split("#")[0].strip())


def git_revision() -> str:
    """Revision of the code that runs, or an empty string outside a checkout."""
    command = ["git", "-C", str(CODE_ROOT), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _read_columns(path: Path, names: Sequence[str], schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Columns of a part; those that it lacks, because an older version wrote it, are null."""
    there = parquet_columns(path)
    frame = read_parquet(path, [name for name in names if name in there])
    missing = [pl.lit(None, dtype=schema[name]).alias(name) for name in names if name not in there]
    return frame.with_columns(missing).select(names)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or `absent`."""
    return sha256_file(path) if path.is_file() else "absent"
