"""Whether the library of an optional optimizer is installed. Needs no torch."""

import re
from importlib import metadata

from training.config.run import EIGHT_BIT, OptimizerConfig
from training.errors import ConfigError

# Kohaku XL Delta's page.
_FIRST_BROKEN, _LAST_BROKEN = (0, 36, 0), (0, 41, 0)


def check_installed(config: OptimizerConfig) -> None:
    """Check that the library of an optimizer is there, where it is an optional one.

    Raises:
        ConfigError: bitsandbytes is missing, or a version with known errors.
    """
    if config.name not in EIGHT_BIT:
        return
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"optimizer.name={config.name} needs bitsandbytes, which is not installed: run `pip install "
            "'diffusion-foundry[gpu8bit]'`, or take adamw or lion"
        ) from None
    if (
        _FIRST_BROKEN
        <= tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
        <= _LAST_BROKEN
    ):
        raise ConfigError(
            f"bitsandbytes {version}: 8-bit optimizers of 0.36.0 to 0.41.0 are known to be wrong; install a newer one"
        )
