"""What a checkpoint's images follow from beside its weights and the prompts: averaged weights,
clip skip, LoRA files.

Free of torch, because Dagster asks for the digests whenever it looks at what is current.
"""

import functools
from pathlib import Path

from training import commit
from training.config.evaluation import SamplingConfig
from training.runs import run_folder

_EMA_FOLDER = "ema"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model_folder(checkpoint: Path, config: SamplingConfig) -> Path:
    """The folder that is drawn with: the averaged weights where they are asked for and there, else
    the checkpoint."""
    averaged = checkpoint / _EMA_FOLDER
    return averaged if config.weights == "ema" and averaged.is_dir() else checkpoint


def clip_skip(checkpoint: Path, config: SamplingConfig) -> int:
    """The layer of SD 1.x's text encoder, from the end: as configured, else as the checkpoint's run
    had it, else 1."""
    if config.clip_skip:
        return config.clip_skip
    if not (checkpoint / run_folder.READY).is_file():
        return 1
    return int(run_folder.read_ready(checkpoint).config.get("clip_skip", 1))


def input_digests(checkpoint: Path, config: SamplingConfig, home: Path) -> dict[str, str]:
    """Digests of what a stage's other inputs do not cover: the averaged weights that are used, and
    the LoRA files.

    Args:
        checkpoint: Model folder or file.
        config: Of the sampling.
        home: What relative paths of LoRAs start from.

    Returns:
        Empty where neither is used. A LoRA that is not there is `absent`.
    """
    digests = {}
    if (folder := model_folder(checkpoint, config)) != checkpoint:
        files = run_folder.read_ready(checkpoint).files
        mine = [
            [entry.name, entry.sha256]
            for entry in files
            if entry.name.startswith(f"{folder.name}/")
        ]
        digests["ema"] = commit.json_digest(mine)
    for lora in config.loras:
        digests[f"lora:{lora.path}"] = _lora_digest(home / lora.path)
    return digests


def _lora_digest(path: Path) -> str:
    files = [path, path.with_name(_PEFT_CONFIG)] if path.name == _PEFT_FILE else [path]
    stats = [file.stat() for file in files if file.is_file()]
    if not path.is_file():
        return "absent"
    return _digest_files(tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@functools.lru_cache(maxsize=64)
def _digest_files(files: tuple[Path, ...], changed: tuple[tuple[int, int], ...]) -> str:
    """Read again only after a change: files have hundreds of megabytes and Dagster asks often."""
    return commit.json_digest([commit.sha256_file(file) for file in files if file.is_file()])
