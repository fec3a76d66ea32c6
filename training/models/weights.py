"""Decides whether a model folder can be used at all, says what to do where it cannot, and fills
models with weights.

Weights load from safetensors only: a pickle is a program, and a Git LFS pointer says that the
weights are elsewhere. A model is built without memory and filled from the mapped file tensor by
tensor, so that a rank never holds more than the model and one tensor of the file.
"""

import ctypes
import hashlib
import json
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from training.errors import ModelError

DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""The weights in a folder of either library."""
_LFS_HEADER = b"version https://git-lfs"
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_DIGESTED = frozenset({".json", ".model", ".safetensors", ".txt"})
_CHUNK_BYTES = 1 << 20
# diffusers' names of an attention of the VAE before its version 0.15, as in the folders of SD 1.x.
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

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
        pickles = (
            sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
            if folder.is_dir()
            else []
        )
        refused = (
            f" (found {', '.join(pickles)}: pickles can run code and are not loaded)"
            if pickles
            else ""
        )
        state = "" if folder.is_dir() else " (no such folder)"
        raise ModelError(
            f"{name}: missing {', '.join(missing)} in {folder}{state}{refused}; {remedy}"
        )
    pointers = [file for file in files if _is_lfs_pointer(folder / file)]
    if pointers:
        raise ModelError(
            f"{name}: {', '.join(pointers)} in {folder} are Git LFS pointers, not weights; {remedy}"
        )


def model_digest(model: Path) -> str:
    """The SHA-256 that stands for a model: over sorted relative names and contents of weights and
    configs.

    Files that decide nothing (READMEs, pickles, images, hidden files) are left out.

    Args:
        model: A folder, or a single .safetensors file, to which the configs in the folder of its
            name belong.

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
        raise ModelError(
            f"{path} holds a {type(config).__name__}, but a model's configuration is a JSON object"
        )
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, on the CPU.

    Raises:
        ModelError: The file is no safetensors file, is cut, or is a pickle by its name.
    """
    if path.suffix in _PICKLES:
        raise ModelError(
            f"{path.name} is a pickle, which can run code: convert it to safetensors first"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


class Unfilled(TorchFunctionMode):
    """Modules that are built inside have no memory for their weights, which `load_state` gives
    them; buffers have."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Layers begin with `torch.empty` and fill it by `torch.nn.init`, which is left out
        here."""
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **kwargs | {"device": "meta"})
        if "tensor" in kwargs and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def build(model_class: type[Model], folder: Path) -> Model:
    """A diffusers or transformers model after the `config.json` in `folder`, in fp32, its weights
    yet to be loaded.

    Raises:
        ModelError: the configuration is missing or broken.
    """
    try:
        with Unfilled():
            if not issubclass(model_class, transformers.PreTrainedModel):
                model: Model = model_class.from_config(read_config(folder / "config.json"))  # type: ignore[attr-defined]
                return model
            config = model_class.config_class.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
            for part in (config, *(getattr(config, name) for name in config.sub_configs)):
                part.dtype = (
                    torch.float32
                )  # else the model would be of the type that is written there
            return model_class(config)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{model_class.__name__} cannot be loaded from {folder}: {error}"
        ) from error


def load_state(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    origin: Path,
    device: str | torch.device = "cpu",
) -> None:
    """Fill `module` with copies of `state`, whose names and shapes must match it one to one, and
    bring it to `device`.

    Weights leave a mapped file one by one: it lets go of each, and none lies in it as the header's
    length has it, since the last bits of products depend on alignment.

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
    maps, filled = _file_maps(), {}
    for name, value in state.items():
        filled[name] = torch.empty(value.shape, dtype=own[name].dtype, device=device).copy_(value)
        _let_go(value, maps)
    module.load_state_dict(filled, assign=True)
    module.to(device)


def from_pretrained(model_class: type[Model], folder: Path, device: str | torch.device) -> Model:
    """Load a diffusers or transformers model from a local folder in fp32, frozen and in evaluation
    mode.

    Tensors of the file that the model does not have are left out, as the libraries do; weights that
    the file does not have they fill with random numbers and a warning, and here that is an error.

    Raises:
        ModelError: The folder is unusable, or its weights do not fill the model one to one.
    """
    is_diffusers = not issubclass(model_class, transformers.PreTrainedModel)
    model = build(model_class, folder)
    try:
        state = read_tensors(folder / (DIFFUSERS_FILE if is_diffusers else TRANSFORMERS_FILE))
    except ModelError as error:
        raise ModelError(
            f"{model_class.__name__} cannot be loaded from {folder}: {error}"
        ) from error
    own = model.state_dict()
    renamed = {name if name in own else _present_name(name): value for name, value in state.items()}
    load_state(
        model, {name: value for name, value in renamed.items() if name in own}, folder, device
    )
    return model.eval().requires_grad_(False)


def _present_name(name: str) -> str:
    """What the libraries call a tensor that a file has under a name of their earlier versions."""
    # transformers 5.6 dropped the prefix from CLIPTextModel.
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.", name).removeprefix(
        "text_model."
    )


def _file_maps() -> list[tuple[int, int]]:
    """Addresses of this process that lie in safetensors files: begin and end of each map."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []  # not Linux: pages stay in memory until their file is closed
    ranges = [
        line.split(" ", 1)[0]
        for line in maps.read_text().splitlines()
        if line.endswith(".safetensors")
    ]
    return [(int(begin, 16), int(end, 16)) for begin, end in (found.split("-") for found in ranges)]


def _let_go(tensor: torch.Tensor, maps: Sequence[tuple[int, int]]) -> None:
    """Take the pages under a tensor out of this process's memory where a file holds them, to which
    they go back."""
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and any(first <= begin and end <= last for first, last in maps):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
        )


def _relative(path: Path, folder: Path) -> str:
    """The name of a model's file; a single file's own does not count, so that it may be renamed as
    a folder may."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.suffix


def _refuse_mismatch(
    origin: Path, missing: list[str], unknown: list[str], shapes: list[str]
) -> None:
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    problems = [f"{len(keys)} {kind} ({'; '.join(keys[:3])})" for kind, keys in kinds if keys]
    if problems:
        raise ModelError(
            f"weights in {origin} are of another architecture than its config: {', '.join(problems)}"
        )


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_HEADER)) == _LFS_HEADER
