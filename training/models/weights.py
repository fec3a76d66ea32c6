"""Decides whether a model folder can be used at all, and says what to do where it cannot.

Weights load from safetensors only: a pickle is a program, and a Git LFS pointer says that the weights are
elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.errors import ModelError

_LFS_HEADER = b"version https://git-lfs"
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_DIGESTED = frozenset({".json", ".model", ".safetensors", ".txt"})
_CHUNK_BYTES = 1 << 20

Model = TypeVar("Model", bound=torch.nn.Module)


def require(folder: Path, files: Sequence[str], *, name: str, source: str, command: str) -> None:
    """Check that `folder` holds all `files` of a model, as content and not as pointers.

    Args:
        folder: The local folder of the model.
        files: Names relative to the folder, `/` between parts.
        name: What the model is called in messages, such as "tagger JoyTag".
        source: Where the files come from, such as a hub id.
        command: The shell command that fetches them.

    Raises:
        ModelError: Files are missing, are Git LFS pointers, or exist only as pickles.
    """
    missing = [file for file in files if not (folder / file).is_file()]
    remedy = f"they come from {source}: run `{command}`; `foundry init --preset demo` needs no downloaded weights"
    if missing:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES) if folder.is_dir() else []
        refused = f" (found {', '.join(pickles)}: pickles can run code and are not loaded)" if pickles else ""
        state = "" if folder.is_dir() else " (no such folder)"
        raise ModelError(f"{name}: missing {', '.join(missing)} in {folder}{state}{refused}; {remedy}")
    pointers = [file for file in files if _is_lfs_pointer(folder / file)]
    if pointers:
        raise ModelError(f"{name}: {', '.join(pointers)} in {folder} are Git LFS pointers, not weights; {remedy}")


def model_digest(model: Path) -> str:
    """The SHA-256 that stands for a model: over sorted relative names and contents of weights and configs.

    Files that decide nothing (READMEs, pickles, images, hidden files) are left out.

    Args:
        model: A folder, or a single .safetensors file, to which the configs in the folder of its name belong.

    Raises:
        ModelError: There are no weights or configuration.
    """
    folder = model.with_suffix("") if model.is_file() else model
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix in _DIGESTED
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if model.is_file():
        files = [model, *(path for path in files if path.suffix != ".safetensors")]
    if not files:
        raise ModelError(f"model folder {folder} holds no .safetensors, .json or .txt file")
    hasher = hashlib.sha256()
    for path in sorted(files, key=lambda path: _relative(path, folder)):
        relative = _relative(path, folder).encode()
        hasher.update(len(relative).to_bytes(8, "little") + relative)
        hasher.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
    return hasher.hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ModelError: The file is missing or is no JSON object.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, but a model's configuration is a JSON object")
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, on the CPU.

    Raises:
        ModelError: The file is no safetensors file, is cut, or is a pickle by its name.
    """
    if path.suffix in _PICKLES:
        raise ModelError(f"{path.name} is a pickle, which can run code: convert it to safetensors first")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def load_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor], origin: Path) -> None:
    """Fill `module` with `state`, whose names and shapes must match it one to one.

    Raises:
        ModelError: A name is missing, unknown or of another shape; the message names up to three.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    _refuse_mismatch(origin, missing, unknown, shapes)
    module.load_state_dict(state)


def from_pretrained(model_class: type[Model], folder: Path, device: str | torch.device) -> Model:
    """Load a diffusers or transformers model from a local folder in fp32, frozen and in evaluation mode.

    The libraries fill missing weights with random numbers and a warning; here that is an error.

    Raises:
        ModelError: The folder is unusable, or its weights do not fill the model one to one.
    """
    transformers.utils.logging.disable_progress_bar()
    options = (
        # Mismatches are let through to be named below: transformers' own error only points at a printed table.
        {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        if issubclass(model_class, transformers.PreTrainedModel)
        # Low memory use needs accelerate, which nothing else here does.
        else {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    )
    try:
        model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{model_class.__name__} cannot be loaded from {folder}: {error}") from error
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    _refuse_mismatch(folder, sorted(info["missing_keys"]), [], sorted(mismatched))
    for parameter in model.parameters():
        # Out of the mapped file, where it lies as the header's length has it: products' last bits depend on alignment.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model.to(device).eval().requires_grad_(False)


def _relative(path: Path, folder: Path) -> str:
    """The name of a model's file; a single file's own does not count, so that it may be renamed as a folder may."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.suffix


def _refuse_mismatch(origin: Path, missing: list[str], unknown: list[str], shapes: list[str]) -> None:
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    problems = [f"{len(keys)} {kind} ({'; '.join(keys[:3])})" for kind, keys in kinds if keys]
    if problems:
        raise ModelError(f"weights in {origin} are of another architecture than its config: {', '.join(problems)}")


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_HEADER)) == _LFS_HEADER
