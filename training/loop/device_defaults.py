"""What `auto` in a run's config comes to on the machine that trains: decided once, recorded, kept
by every resume."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import records, toml
from training.config.run import RunConfig
from training.errors import ConfigError

RECORD = "resolved.json"
"""In a run's folder: what it came to at the first step, for people and estimates; a resume asks the
checkpoint."""
_FORMAT = 1
_KEYS = ("precision", "compute.channels_last", "compute.compile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What is asked of a device."""

    name: str
    """`cpu`, or what a card calls itself."""
    is_gpu: bool
    """Whether it is a CUDA device."""
    has_bf16: bool
    """Whether bf16 is as quick on it as fp16; a CPU computes it too, slowly."""
    has_tf32: bool
    """Whether it can round fp32 products to TF32."""
    not_compiled: Callable[[], str] = lambda: ""
    """Tries to compile for it: why nothing can be, or an empty string. Takes seconds, so it is
    asked only by need."""


CPU = Device(name="cpu", is_gpu=False, has_bf16=True, has_tf32=False)


def resolve(config: RunConfig, device: Device, recorded: Mapping[str, Any]) -> RunConfig:
    """The config without `auto`: a recorded value where there is one, else what suits the device.

    Args:
        config: As it stands in the run's folder.
        device: The one that trains.
        recorded: What the run came to at its first step, by dotted key; empty before it.

    Raises:
        ConfigError: the device lacks the precision that the config or the record names, or cannot
            be compiled for.
    """
    suitable: dict[str, Any] = {
        "precision": "fp32",
        "compute.channels_last": False,
        "compute.compile": False,
    }
    if device.is_gpu:
        half = "bf16_amp" if device.has_bf16 else "fp16_amp"
        suitable = {"precision": half, "compute.channels_last": True, "compute.compile": "blocks"}
    asked = toml.flatten(toml.dump(config))
    values = {
        key: asked[key] if asked[key] != "auto" else recorded.get(key, suitable[key])
        for key in _KEYS
    }
    _check_precision(
        values["precision"],
        device,
        recorded="precision" in recorded and asked["precision"] == "auto",
    )
    if values["compute.compile"] and (reason := device.not_compiled()):
        if asked["compute.compile"] != "auto":
            raise ConfigError(
                f'compute.compile="{values["compute.compile"]}": nothing can be compiled for {device.name} here '
                f"({reason}); set it to false, or install what is missing"
            )
        values["compute.compile"] = False
    compute = dataclasses.replace(
        config.compute,
        channels_last=values["compute.channels_last"],
        compile=values["compute.compile"],
    )
    return dataclasses.replace(config, precision=values["precision"], compute=compute)


def has_auto(config: RunConfig) -> list[str]:
    """The keys that are left to the device."""
    values = toml.flatten(toml.dump(config))
    return [key for key in _KEYS if values[key] == "auto"]


def recorded_in(checkpoint_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run came to, by the config that a checkpoint of it holds, also one of an older
    version."""
    flat = toml.flatten(checkpoint_config)
    return {key: flat[key] for key in _KEYS if flat.get(key, "auto") != "auto"}


def record(folder: Path, resolved: RunConfig, device_name: str) -> None:
    """Say in a run's folder what its config came to; called by one process before the step that
    begins the run."""
    values = toml.flatten(toml.dump(resolved))
    content = {"device": device_name, "values": {key: values[key] for key in _KEYS}}
    records.write_record(folder / RECORD, _FORMAT, content)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run came to at its first step, by dotted key; None before it.

    Raises:
        DamageError: the record is damaged or of another format.
    """
    damaged = "{subject}: what the run came to cannot be read ({error})"
    try:
        return records.read_record(
            folder / RECORD, _FORMAT, lambda values: dict(values["values"]), damaged=damaged
        )
    except FileNotFoundError:
        return None


def _check_precision(precision: str, device: Device, *, recorded: bool) -> None:
    whose = "recorded at the run's first step" if recorded else "as configured"
    if precision in ("bf16", "bf16_amp") and not device.has_bf16:
        raise ConfigError(
            f'precision="{precision}" ({whose}): {device.name} has no bf16; take "fp16_amp" or "fp32", or another card'
        )
    if precision == "tf32" and not device.has_tf32:
        raise ConfigError(
            f'precision="tf32" ({whose}): {device.name} cannot round products to TF32; take "fp32", or a GPU from '
            "Ampere on"
        )
