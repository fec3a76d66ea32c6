"""Where the models of a workspace lie, and the digests of their files."""

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from resources.workspace.paths import CONFIG_FILE, Paths
from training.commit import json_digest, write_json
from training.errors import ModelError, WorkspaceError
from training.models.base_model import SUFFIX, config_folder, require_file

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


@dataclass(frozen=True)
class Models:
    """The models that foundry.toml names."""

    paths: Paths

    def path(self, key: str) -> Path:
        """Folder of the model under `[models] key`; for `base` also a single .safetensors file.

        Raises:
            ModelError: it is missing; the message says what to do.
        """
        if key == "base":
            return self.base_path(key)
        name = self.paths.config.models.folder(key)
        path = self.paths.resource(name)
        if not path.is_dir():
            raise self._missing(key, name, path, PUBLISHED.get(key))
        return path

    def base_path(self, name: str) -> Path:
        """The model that a run starts from by this name, a diffusers folder or a single
        .safetensors file.

        Raises:
            ConfigError: foundry.toml names no such model.
            ModelError: it is missing; the message says what to do.
        """
        found = self.paths.config.models.base_named(name).path
        path = self.paths.resource(found)
        if path.suffix == SUFFIX:
            require_file(path)
        elif not path.is_dir():
            key = "base" if name == "base" else f"bases.{name}.path"
            raise self._missing(key, found, path, PUBLISHED["base"])
        return path

    def _missing(self, key: str, name: str, path: Path, repository: str | None) -> ModelError:
        fetch = (
            f"fetch it with `hf download {repository} --local-dir {path}`, " if repository else ""
        )
        return ModelError(
            f"[models] {key} = {name!r}: folder {path} is missing; {fetch}set the key in "
            f"{self.paths.home / CONFIG_FILE}, or start with `foundry init --preset demo`, which needs no weights"
        )

    def digest(self, key: str) -> str:
        """Digest of the model under `[models] key`."""
        return self.digest_at(self.path(key))

    def base_digest(self, name: str) -> str:
        """Digest of the model that a run starts from by this name."""
        return self.digest_at(self.base_path(name))

    def vae_folder(self, encoding: str) -> Path:
        """Folder of an encoding's VAE, which may be missing.

        Raises:
            ConfigError: foundry.toml has no such encoding, though a run names it.
        """
        name = self.paths.config.encoding(encoding).vae
        if name == "base":
            return config_folder(self.paths.resource(self.paths.config.models.base)) / "vae"
        return self.paths.resource(name)

    def vae_of_run(self, encoding: str, base: str) -> Path | None:
        """Folder of an encoding's VAE; None where it is that of the model that the run starts from
        itself."""
        folder = self.vae_folder(encoding)
        own = self.paths.resource(self.paths.config.models.base_named(base).path) / "vae"
        return None if folder == own else folder

    def vae_digest(self, encoding: str) -> str:
        """Digest of an encoding's VAE.

        Raises:
            ModelError: it is missing.
        """
        if self.paths.config.encoding(encoding).vae == "base":
            self.path("base")  # says what to do where there is none
        return self.digest_at(self.vae_folder(encoding))

    def name_of(self, name: str, encoding: str) -> str:
        """What foundry.toml says for a model of a stage; for `vae`, for that of the encoding."""
        if name != "vae":
            return self.paths.config.models.folder(name)
        vae = self.paths.config.encoding(encoding).vae
        return f"that of {self.paths.config.models.base}" if vae == "base" else vae

    def digest_of(self, name: str, encoding: str) -> str:
        """Digest of a model of a stage; for `vae`, of that of the encoding."""
        return self.vae_digest(encoding) if name == "vae" else self.digest(name)

    def digest_at(self, folder: Path) -> str:
        """Digest of the files of a model, a folder or a single file; remembered by path, sizes and
        times."""
        if str(folder) not in self._digests:
            files = [folder, *config_folder(folder).rglob("*")]
            stamp = sorted(
                (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()
            )
            name = f"{json_digest([str(folder), stamp])[:16]}.json"
            memo_path = self.paths.home / "cache" / "models" / name
            try:
                digest = str(json.loads(memo_path.read_bytes())["digest"])
            except (OSError, ValueError, KeyError):
                from training.models.weights import model_digest  # takes torch along, for seconds

                digest = model_digest(folder)
                # Where nothing can be written, it is digested each time.
                with contextlib.suppress(WorkspaceError):
                    write_json(memo_path, {"folder": str(folder), "digest": digest})
            self._digests[str(folder)] = digest
        return self._digests[str(folder)]

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}
