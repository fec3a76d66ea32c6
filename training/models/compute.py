"""How a model is laid out on its device: what is computed again in the backward pass, memory
format, compilation."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.checkpoint import checkpoint

from training.config.run import ComputeConfig
from training.errors import ConfigError
from training.models.unet import PipelineParts

_TEXT_ENCODERS = "text_encoders"
# Names of torch's own loggers: the one of all reasons why a graph was not reused.
_RECOMPILES = "torch._dynamo.guards.__recompiles"
# Graphs of one piece of code before torch gives up on it: 26 buckets, three lengths of text and
# short batches.
_MAX_GRAPHS = 1024


def apply_compute(
    parts: PipelineParts,
    config: ComputeConfig,
    *,
    micro_batch_size: int | None = None,
    backend: str = "inductor",
) -> None:
    """Lay the model out as asked; what it computes stays the same but for rounding.

    Attention always runs in `scaled_dot_product_attention`, whose kernel torch chooses for the
    device.

    Args:
        parts: The model, on its device; changed in place, names of parameters stay.
        config: Blocks to recompute, memory format, compilation; resolved.
        micro_batch_size: Of the run: `whole` compiles whole micro-batches alone, since remainders
            have every smaller size and would each have a graph; None for all sizes.
        backend: What compiles graphs, by torch's name.

    Raises:
        ConfigError: no block has such a name.
    """
    parts.unet.set_attn_processor(AttnProcessor2_0())
    for encoder in parts.text_encoders:
        encoder.set_attn_implementation("sdpa")
    _recompute(parts, config.gradient_checkpointing)
    if config.channels_last:
        parts.unet.to(memory_format=torch.channels_last)
    if config.compile:
        torch._dynamo.config.recompile_limit = _MAX_GRAPHS
        torch._dynamo.config.accumulated_recompile_limit = _MAX_GRAPHS
        # Else a graph holds that two sizes are one because they were equal when it was made.
        torch.fx.experimental._config.use_duck_shape = False
    if config.compile == "whole":
        _compile_whole(parts.unet, micro_batch_size, backend)
    elif config.compile == "blocks":
        for module in parts.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.compile(dynamic=True, backend=backend)


def _compile_whole(unet: torch.nn.Module, micro_batch_size: int | None, backend: str) -> None:
    """Sizes as constants: only so does the compiler choose the layout of convolutions. The batch is
    one of them."""
    plain = unet.forward
    compiled = torch.compile(plain, dynamic=False, backend=backend)

    def forward(noised: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        is_whole = micro_batch_size in (None, len(noised))
        return (compiled if is_whole else plain)(noised, *arguments, **options)

    unet.forward = forward


def why_not_compiled(device: torch.device) -> str:
    """Why nothing can be compiled for a device, in one line; empty where it can: the compiler needs
    other programs."""
    try:
        torch.compile(lambda numbers: numbers * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler, or one that it calls, has to say
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


class Graphs(logging.Handler):
    """Counts the graphs that were compiled, and keeps why others were not reused."""

    def __init__(self) -> None:
        """Begin to listen."""
        super().__init__(logging.DEBUG)
        self._causes: list[str] = []
        self._before = self._total()
        torch._logging.set_logs(recompiles=True)  # type: ignore[attr-defined]
        logger = logging.getLogger(_RECOMPILES)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what torch says of a graph that it could not reuse."""
        self._causes.append(" ".join(record.getMessage().split()))

    def new(self) -> tuple[int, list[str]]:
        """Graphs compiled since the last call, and the causes of those among them that are
        repetitions."""
        total, causes = self._total(), self._causes
        found = total - self._before
        self._before, self._causes = total, []
        return found, causes

    def close(self) -> None:
        """Listen no more."""
        logging.getLogger(_RECOMPILES).removeHandler(self)
        super().close()

    @staticmethod
    def _total() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _recompute(parts: PipelineParts, names: Sequence[str]) -> None:
    blocks = _blocks(parts)
    for name in names:
        if name not in blocks:
            raise ConfigError(
                f"compute.gradient_checkpointing: no block {name!r}; there are {', '.join(blocks)}"
            )
        for block in blocks[name]:
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = _checkpoint
                    # transformers asks for training mode; of the layer alone, so that nothing in it
                    # drops out.
                    module.training = True


def _blocks(parts: PipelineParts) -> dict[str, list[Any]]:
    """Modules by the names that a recipe may use."""
    unet = parts.unet
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    texts = (getattr(encoder, "text_model", encoder) for encoder in parts.text_encoders)
    layers = [layer for text in texts for layer in text.encoder.layers]
    blocks: dict[str, list[Any]] = {"down_blocks": down}
    blocks |= {f"down_blocks.{number}": [block] for number, block in enumerate(down)}
    blocks |= {"mid_block": [unet.mid_block], "up_blocks": up}
    blocks |= {f"up_blocks.{number}": [block] for number, block in enumerate(up)}
    return blocks | {_TEXT_ENCODERS: layers, "all": [*down, unet.mid_block, *up, *layers]}


def _checkpoint(function: torch.nn.Module, *inputs: object) -> object:
    return checkpoint(function, *inputs, use_reentrant=False)
