"""The shell command that turns weights published as a pickle into the safetensors that we load."""

from pathlib import Path


def pickle_command(repository: str, file: str, folder: Path, *, key: str = "") -> str:
    """Fetch `file` of a hub repository and write its tensors as `model.safetensors` into `folder`.

    Args:
        repository: Hub id.
        file: A pickle; it is read as tensors only, so that no code in it runs.
        folder: Where both go.
        key: Under which the tensors stand in the pickle; empty where it holds nothing else.
    """
    chosen = f"['{key}']" if key else ""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"state = torch.load('{folder / file}', map_location='cpu', weights_only=True){chosen}; "
        f"save_file({{name: value.clone() for name, value in state.items()}}, '{folder / 'model.safetensors'}')"
    )
    return f'hf download {repository} {file} --local-dir {folder} && python -c "{code}"'
