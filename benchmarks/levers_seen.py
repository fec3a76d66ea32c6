"""Whether a lever acts: what one step of a variant shows, and what each lever must change in it.

A lever that is set and does nothing costs nothing and proves nothing, so every benchmark of them
checks.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLASH = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)
"""What `scaled_dot_product_attention` comes to where it keeps no matrix of all pairs."""
NO_CUDA = "no CUDA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a step of a variant showed."""

    num_micro_steps: int
    """Forward and backward passes in it."""
    operations: Counter[str]
    """Calls by the operation's name."""
    host_syncs: tuple[str, ...]
    """Lines at which the host waited for the device."""
    blocking_copies: tuple[str, ...]
    """Lines at which memory that is not pinned was copied to it."""
    optimizer_bytes: int
    """Bytes that the optimizer, clipping and rounding into the model read and wrote."""
    num_attentions: int
    """Attention layers of the UNet."""
    activation: torch.dtype
    """Of the output of a convolution of the UNet,"""
    channels_last: bool
    """whether its channels lie next to each other,"""
    batch_size: int
    """and its length."""
    forwards_per_pass: float
    """How often a transformer block runs forward in a micro-step: twice where it is computed
    again."""
    weights: torch.dtype
    """Of the UNet's weights,"""
    stepped: torch.dtype
    """of those that the optimizer steps,"""
    gradients: torch.dtype
    """and of the gradients that it reads."""
    keeps_own_gradients: bool
    """Whether a 16-bit parameter still holds a gradient of its own after a backward pass."""
    made_ahead: bool
    """Whether batches were made, and begun to be sent, by the prefetch thread."""
    pinned: bool | None
    """Whether all that was sent was pinned; None where nothing was sent to a GPU."""
    num_graphs: int
    """Compiled before the timed steps,"""
    num_graph_breaks: int
    """places at which they end early,"""
    num_late_graphs: int
    """and graphs compiled in the timed steps."""


Check = Callable[[Evidence], str]
"""What contradicts the lever; empty where it is seen to act."""


def _recreated(seen: Evidence) -> str:
    wanted = seen.num_micro_steps + 1
    if len(seen.host_syncs) != wanted:
        return f"{len(seen.host_syncs)} waits of the host instead of {wanted}, one for each loss and the log's"
    if seen.forwards_per_pass != 2:
        return f"blocks ran {seen.forwards_per_pass:g} times a pass instead of twice, as checkpointing makes them"
    return (
        ""
        if seen.activation == torch.float16
        else f"activations are {seen.activation} instead of torch.float16"
    )


def _no_sync(seen: Evidence) -> str:
    if len(seen.host_syncs) == 1:
        return ""
    where = ", ".join(sorted(set(seen.host_syncs)))
    return f"{len(seen.host_syncs)} waits of the host instead of 1, the log's: {where}"


def _fused(seen: Evidence) -> str:
    return "" if seen.operations["aten::_fused_adamw_"] else "no fused kernel of AdamW was called"


def _autocast(seen: Evidence) -> str:
    if seen.activation != torch.bfloat16:
        return f"activations are {seen.activation} instead of torch.bfloat16"
    return (
        ""
        if seen.weights == torch.float32
        else f"weights are {seen.weights} instead of torch.float32"
    )


_MOST_GROUPS = 100
"""Groups that the optimizer steps one after the other, of SDXL, at most; it has 1,680 weights."""


def _bf16(seen: Evidence) -> str:
    for what, found, wanted in (
        ("weights", seen.weights, torch.bfloat16), ("activations", seen.activation, torch.bfloat16),
        ("gradients", seen.gradients, torch.float32), ("the optimizer's weights", seen.stepped, torch.float32),
    ):  # fmt: skip
        if found != wanted:
            return f"{what} are {found} instead of {wanted}"
    if seen.keeps_own_gradients:
        return "a parameter keeps a 16-bit gradient beside the fp32 buffer"
    # Each group of the optimizer is rounded as a whole; the tiny model has one of the UNet and one
    # of the text encoder.
    num_roundings = seen.operations["aten::bitwise_right_shift_"]
    return (
        ""
        if 0 < num_roundings < _MOST_GROUPS
        else f"weights were rounded into the model by {num_roundings} calls"
    )


def _no_checkpointing(seen: Evidence) -> str:
    return (
        ""
        if seen.forwards_per_pass == 1
        else f"blocks ran {seen.forwards_per_pass:g} times a pass instead of once"
    )


def _channels_last(seen: Evidence) -> str:
    return "" if seen.channels_last else "an activation of the UNet does not have its channels last"


def _sent_ahead(seen: Evidence) -> str:
    if not seen.made_ahead:
        return "batches were not made by the prefetch thread"
    if seen.blocking_copies:
        return f"{len(seen.blocking_copies)} copies from memory that is not pinned, at {seen.blocking_copies[0]}"
    return "what was sent was not pinned" if seen.pinned is False else ""


def _compiled(seen: Evidence) -> str:
    if not seen.num_graphs:
        return "nothing was compiled"
    if seen.num_graph_breaks:
        return f"{seen.num_graph_breaks} graph breaks"
    return (
        f"{seen.num_late_graphs} graphs were compiled after warm-up" if seen.num_late_graphs else ""
    )


CHECKS: dict[str, Check] = {
    "bigASP recreated": _recreated,
    "no sync in micro-steps": _no_sync,
    "fused AdamW": _fused,
    "bf16 autocast": _autocast,
    "bf16 weights, fp32 master": _bf16,
    "no checkpointing": _no_checkpointing,
    "channels_last": _channels_last,
    "pinned, sent ahead": _sent_ahead,
    "compile blocks": _compiled,
    "compile whole": _compiled,
}
"""By the lever's name, without what follows a comma and a space of a restriction."""


def contradiction(name: str, seen: Evidence) -> str:
    """What shows that a lever does not act; empty where it is seen to act.

    Args:
        name: The lever's; `micro-batch N` as well. Other names are of variants without a lever of
            their own.
        seen: In a step of the variant that has it.
    """
    flash = sum(seen.operations[kernel] for kernel in FLASH) / seen.num_micro_steps
    if flash < seen.num_attentions:
        return (
            f"attention: {flash:g} calls of a flash kernel a pass instead of {seen.num_attentions}"
        )
    found = next(
        (CHECKS[key](seen) for key in CHECKS if name == key or name.startswith(f"{key}; ")), ""
    )
    if name.startswith("micro-batch ") and seen.batch_size != int(
        name.removeprefix("micro-batch ")
    ):
        found = f"micro-batches have {seen.batch_size} samples"
    return f"{name}: {found}" if found else ""


def not_run(name: str, seen: Evidence) -> str:
    """What of a lever cannot be seen on this machine; empty where all can."""
    pins = name == "pinned, sent ahead" and seen.pinned is None
    return f"pinned memory: {NO_CUDA}" if pins else ""
