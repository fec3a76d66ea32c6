"""The optimizer, its learning rates, whose clock is samples trained on, and its state as plain
tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training.config.run import EIGHT_BIT, GROUP_NUMBERS, OptimizerConfig
from training.errors import ConfigError, TrainingError
from training.optimization.installed import check_installed

UNET, TEXT_ENCODERS = "unet", "text_encoders"
# What steps change in a group itself: a counter, and Prodigy's estimate of its rate.
_GROUP_STATE = ("step", "d", "d_max", "d_hat", "d_numerator", "d_de_nom")
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "s", "p0"})
# State of torch's Adafactor, which earlier versions trained with.
_TORCH_ADAFACTOR = frozenset({"row_var", "col_var", "variance"})


def make_optimizer(
    config: OptimizerConfig, weights: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    """The optimizer of a run, with the groups of `step_groups`.

    Args:
        config: Name, peak rates and decay.
        weights: The trained ones in fp32, by name; `unet.` opens those of the UNet.

    Raises:
        ConfigError: an option that the optimizer does not take, or a library or device that it
            needs is not there.

    Source: AdamW arXiv:1711.05101, Adafactor arXiv:1804.04235, Lion arXiv:2302.06675, Prodigy
    arXiv:2306.06101.
    """
    groups = [_group(config, weights, names) for names in step_groups(weights)]
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.name == "adamw":
        # Fused: one pass over the weights.
        return torch.optim.AdamW(
            groups, betas=config.betas, eps=config.epsilon, fused=True, **decay
        )
    if config.name in EIGHT_BIT:
        return _make_8bit(config, groups)
    import pytorch_optimizer

    if config.name == "adafactor":
        # The rate is the schedule's alone, and the second moment's decay has no cap: one that no
        # step reaches.
        return pytorch_optimizer.AdaFactor(
            groups, betas=(None, math.nextafter(1, 0)), clip_threshold=config.clip_threshold, scale_parameter=False,
            relative_step=False, **decay,
        )  # fmt: skip
    if config.name == "lion":
        return pytorch_optimizer.Lion(groups, betas=config.betas, **decay)
    return pytorch_optimizer.Prodigy(groups, betas=config.betas, eps=config.epsilon, **decay)


def schedule_factor(config: OptimizerConfig, samples: float, num_samples: int) -> float:
    """The share of its peak that a rate has at a point of the run, in [0, 1].

    Args:
        config: Shape and warm-up.
        samples: Samples trained on; the trainer asks for the middle of a step, so that neither the
            first step nor the last has a rate of 0.
        num_samples: Length of the run.
    """
    if samples < config.warmup_samples:
        return samples / config.warmup_samples
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (samples - config.warmup_samples) / max(1, num_samples - config.warmup_samples))
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give each group its peak rate times `factor`.

    Returns:
        The rates by the log's names, `learning_rate` of the UNet and `text_encoder_learning_rate`
        where it has weights; Prodigy's are the ones that it has come to.
    """
    names = {UNET: "learning_rate", TEXT_ENCODERS: "text_encoder_learning_rate"}
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        rates[names[group["name"]]] = group["lr"] * group.get("d", 1.0)
    return rates


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All that steps change in an optimizer; numbers become 0-d tensors.

    Nothing is computed on the device: it would be done behind the mark that `Offload` waits for,
    and read before.

    Args:
        optimizer: From `make_optimizer`.
        named: The weights that it steps, by name.

    Returns:
        `<key>.<weight>` per weight and `<key>.<group>` per group; nothing before the first step.
        The optimizer's own tensors, of any layout, some of them twice: `Offload.copy` makes what
        safetensors can hold of them.
    """
    tensors = {
        f"{key}.{name}": _tensor(value)
        for name, weight in named.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    for group in optimizer.param_groups if tensors else ():
        tensors |= {
            f"{key}.{group['name']}": _tensor(group[key]) for key in _GROUP_STATE if key in group
        }
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Go on from `optimizer_state`, exactly; names that are not ours are another rank's.

    Raises:
        KeyError: there is state, but not of a weight.
        ValueError: a moment has another shape than its weight.
        TrainingError: it is torch's Adafactor's, which earlier versions trained with.
    """
    fused = bool(optimizer.defaults.get("fused"))
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in state.items():
        key, name = path.split(".", 1)
        by_name.setdefault(name, {})[key] = tensor
        if key in _TORCH_ADAFACTOR:
            raise TrainingError(
                f"the checkpoint's optimizer state ({path}) is that of torch's Adafactor, whose steps are smaller by "
                "the size of the weights; this version trains with optimizer.name=adafactor as bigASP and kohya do: "
                "go on with the version that wrote it, or begin another run with the checkpoint as its base"
            )
    for name, weight in named.items() if state else ():
        for key, value in by_name[name].items():
            expected = _moment_shape(key, weight.shape)
            if expected is not None and value.shape != expected:
                raise ValueError(
                    f"{key} of {name} is {list(value.shape)} instead of {list(expected)}"
                )
        optimizer.state[weight] = {
            key: _restored(value, weight, fused) for key, value in by_name[name].items()
        }
    for group in optimizer.param_groups:
        group |= {key: _number(value) for key, value in by_name.get(group["name"], {}).items()}


def step_groups(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of the weights in groups, which are stepped one after the other: of the UNet, then of
    the text encoders.

    Args:
        weights: By name; `unet.` opens those of the UNet. A group has some 64 million numbers, or
            one larger weight.
    """
    groups: list[list[str]] = []
    for part in (True, False):
        size = GROUP_NUMBERS
        for name, weight in weights.items():
            if name.startswith("unet.") != part:
                continue
            if size + weight.numel() > GROUP_NUMBERS:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += weight.numel()
    return groups


def _group(
    config: OptimizerConfig, weights: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """A group with its peak rate as `initial_lr`, as torch's own schedules call it."""
    part = UNET if names[0].startswith("unet.") else TEXT_ENCODERS
    rate = config.learning_rate
    if part == TEXT_ENCODERS and config.text_encoder_learning_rate is not None:
        rate = config.text_encoder_learning_rate
    return {
        "params": [weights[name] for name in names],
        "name": part,
        "lr": rate,
        "initial_lr": rate,
    }


def _moment_shape(key: str, shape: torch.Size) -> torch.Size | None:
    """The shape of a moment of a weight of this shape; None for what is no moment."""
    if key == "exp_avg_sq_row":
        return shape[:-1]
    if key == "exp_avg_sq_col":
        return shape[:-2] + shape[-1:]
    return shape if key in _MOMENTS else None


def _make_8bit(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW or Lion whose moments are stored in 8 bits, arXiv:2110.02861.

    Raises:
        ConfigError: bitsandbytes is missing or has known errors, or the weights are not on a GPU.
    """
    check_installed(config)
    devices = {weight.device.type for group in groups for weight in group["params"]}
    if devices != {"cuda"}:
        raise ConfigError(
            f"optimizer.name={config.name} needs a GPU, the weights are on {', '.join(sorted(devices))}: take adamw or "
            "lion there"
        )
    import bitsandbytes

    if config.name == "lion_8bit":
        return bitsandbytes.optim.Lion8bit(
            groups, betas=config.betas, weight_decay=config.weight_decay
        )
    return bitsandbytes.optim.AdamW8bit(
        groups, betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay
    )


def _tensor(value: object) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    assert isinstance(value, int | float), f"state of an optimizer that is no number: {value!r}"
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _number(value: torch.Tensor) -> torch.Tensor | int | float:
    """What `_tensor` was given: it makes 0-d tensors of these two types of numbers only."""
    is_number = value.dim() == 0 and value.dtype in (torch.int64, torch.float64)
    return value.item() if is_number else value.clone()


def _restored(value: torch.Tensor, weight: torch.Tensor, fused: bool) -> torch.Tensor | int | float:
    """State of a weight: moments are laid out in memory as it is, and only fused kernels count
    steps on the device."""
    if value.dim() == 0:
        number = _number(value)
        return number.to(weight.device) if fused and isinstance(number, torch.Tensor) else number
    if value.shape == weight.shape:
        return torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(weight.device, copy=True)
