"""The layers of a UNet that have weights, from its config alone: for estimates that need neither
torch nor diffusers.

It is diffusers' `UNet2DConditionModel` with the blocks of SD 1.x and SDXL; tests hold it against
the class itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.errors import ModelError

_DOWN, _UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_MIDDLE = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# Of a config that names none.
_BLOCK_TYPES = {
    "down": (_DOWN[1], _DOWN[1], _DOWN[1], _DOWN[0]),
    "up": (_UP[0], _UP[1], _UP[1], _UP[1]),
}
# Options that would change the layers and that no model of these families has: the one value that
# is read here.
_FIXED: dict[str, object] = {
    "attention_type": "default", "class_embed_type": None, "class_embeddings_concat": False,
    "cross_attention_norm": None, "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None, "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "time_embedding_dim": None, "time_embedding_type": "positional",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module with weights, under its name in the model."""

    name: str
    """Such as `down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2`."""
    kind: Literal["conv", "linear", "group_norm", "layer_norm"]
    """What it does."""
    inputs: int
    """Channels or features that it reads; of a norm, those that it keeps."""
    outputs: int
    """Channels or features that it writes."""
    kernel: int = 1
    """Side of a convolution, pixels."""
    stride: int = 1
    """Of a convolution, pixels."""
    has_bias: bool = True
    """Whether it adds one."""

    @property
    def multiplies(self) -> int:
        """Multiply-adds per position, the numbers of its weight; a norm's are not counted."""
        return 0 if self.kind.endswith("norm") else self.inputs * self.outputs * self.kernel**2

    @property
    def num_parameters(self) -> int:
        """Numbers of weight and bias."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its weight and bias."""
        weight: tuple[int, ...] = (self.outputs,)
        if not self.kind.endswith("norm"):
            weight = (
                self.outputs,
                self.inputs,
                *((self.kernel, self.kernel) if self.kind == "conv" else ()),
            )
        return (weight, (self.outputs,)) if self.has_bias else (weight,)


def unet_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """All layers of a UNet with weights.

    Args:
        config: The UNet's, as in its `config.json`.

    Raises:
        ModelError: it is no UNet of SD 1.x or SDXL.
    """
    down, up = (
        config.get(f"{side}_block_types") or default for side, default in _BLOCK_TYPES.items()
    )
    _check(config, down, up)
    channels = list(config.get("block_out_channels", (320, 640, 1280, 1280)))
    last = len(channels) - 1
    num_resnets = _per_level(config.get("layers_per_block", 2), channels)
    depths = _per_level(config.get("transformer_layers_per_block", 1), channels)
    depths_up = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    heads = _per_level(config.get("attention_head_dim", 8), channels)  # the library's name for it
    text = _per_level(config.get("cross_attention_dim", 1280), channels)
    linear, embedded = bool(config.get("use_linear_projection", False)), 4 * channels[0]

    def attention(name: str, level: int, depth: int) -> Iterator[Layer]:
        return _transformer(name, channels[level], heads[level], depth, text[level], linear=linear)

    def resnet(name: str, inputs: int, outputs: int) -> Iterator[Layer]:
        return _resnet(name, inputs, outputs, embedded)

    yield _conv(
        "conv_in", config.get("in_channels", 4), channels[0], config.get("conv_in_kernel", 3)
    )
    yield from _embedding("time_embedding", channels[0], embedded)
    if config.get("addition_embed_type") == "text_time":
        yield from _embedding(
            "add_embedding", config["projection_class_embeddings_input_dim"], embedded
        )
    for level, kind in enumerate(down):
        block = f"down_blocks.{level}"
        for number, depth in enumerate(_each(depths[level], num_resnets[level])):
            inputs = channels[max(level - 1, 0)] if number == 0 else channels[level]
            yield from resnet(f"{block}.resnets.{number}", inputs, channels[level])
            if kind.startswith("CrossAttn"):
                yield from attention(f"{block}.attentions.{number}", level, depth)
        if level < last:
            yield _conv(
                f"{block}.downsamplers.0.conv", channels[level], channels[level], 3, stride=2
            )
    middle = config.get("mid_block_type", _MIDDLE[0])
    if middle is not None:
        yield from resnet("mid_block.resnets.0", channels[-1], channels[-1])
    if middle == "UNetMidBlock2DCrossAttn":
        yield from attention("mid_block.attentions.0", last, _each(depths[-1], 1)[0])
        yield from resnet("mid_block.resnets.1", channels[-1], channels[-1])
    for number, kind in enumerate(up):
        block, level = f"up_blocks.{number}", last - number
        # Each residual block reads what the one before wrote, and what its mirror image on the way
        # down did.
        mirrored = [channels[level]] * num_resnets[level] + [channels[max(level - 1, 0)]]
        for place, depth in enumerate(_each(depths_up[number], len(mirrored))):
            before = channels[min(level + 1, last)] if place == 0 else channels[level]
            yield from resnet(f"{block}.resnets.{place}", before + mirrored[place], channels[level])
            if kind.startswith("CrossAttn"):
                yield from attention(f"{block}.attentions.{place}", level, depth)
        if level:
            yield _conv(f"{block}.upsamplers.0.conv", channels[level], channels[level], 3)
    yield _norm("conv_norm_out", channels[0], "group_norm")
    yield _conv(
        "conv_out", channels[0], config.get("out_channels", 4), config.get("conv_out_kernel", 3)
    )


def _check(config: Mapping[str, Any], down: Sequence[str], up: Sequence[str]) -> None:
    """Refuse what no UNet of these families has.

    Raises:
        ModelError: names the key, its value, and the values that are known.
    """
    allowed: dict[str, tuple[object, ...]] = {key: (value,) for key, value in _FIXED.items()}
    allowed |= {"addition_embed_type": (None, "text_time"), "mid_block_type": _MIDDLE}
    found = [(key, config[key]) for key in allowed if key in config]
    found += [("down_block_types", kind) for kind in down] + [
        ("up_block_types", kind) for kind in up
    ]
    allowed |= {"down_block_types": _DOWN, "up_block_types": _UP}
    for key, value in found:
        if value not in allowed[key]:
            raise ModelError(
                f"unet/config.json: {key}={value!r} is in no UNet of SD 1.x or SDXL; known: "
                f"{', '.join(map(repr, allowed[key]))}"
            )


def _per_level(value: Any, channels: Sequence[int]) -> list[Any]:
    """A setting of each level, where one stands for all."""
    return list(value) if isinstance(value, Sequence) else [value] * len(channels)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    """A setting of each layer of a level, where one stands for all."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def _conv(name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> Layer:
    return Layer(
        name=name, kind="conv", inputs=inputs, outputs=outputs, kernel=kernel, stride=stride
    )


def _linear(name: str, inputs: int, outputs: int, *, has_bias: bool = True) -> Layer:
    return Layer(name=name, kind="linear", inputs=inputs, outputs=outputs, has_bias=has_bias)


def _norm(name: str, channels: int, kind: Literal["group_norm", "layer_norm"]) -> Layer:
    return Layer(name=name, kind=kind, inputs=channels, outputs=channels)


def _embedding(name: str, inputs: int, width: int) -> Iterator[Layer]:
    yield _linear(f"{name}.linear_1", inputs, width)
    yield _linear(f"{name}.linear_2", width, width)


def _resnet(name: str, inputs: int, outputs: int, embedded: int) -> Iterator[Layer]:
    yield _norm(f"{name}.norm1", inputs, "group_norm")
    yield _conv(f"{name}.conv1", inputs, outputs, 3)
    yield _linear(f"{name}.time_emb_proj", embedded, outputs)
    yield _norm(f"{name}.norm2", outputs, "group_norm")
    yield _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield _conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _transformer(
    name: str, channels: int, heads: int, depth: int, text: int, *, linear: bool
) -> Iterator[Layer]:
    inner = heads * (channels // heads)
    project = _linear if linear else lambda name, inputs, outputs: _conv(name, inputs, outputs, 1)
    yield _norm(f"{name}.norm", channels, "group_norm")
    yield project(f"{name}.proj_in", channels, inner)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for place, attention, keys in ((1, "attn1", inner), (2, "attn2", text)):
            yield _norm(f"{block}.norm{place}", inner, "layer_norm")
            yield _linear(f"{block}.{attention}.to_q", inner, inner, has_bias=False)
            yield _linear(f"{block}.{attention}.to_k", keys, inner, has_bias=False)
            yield _linear(f"{block}.{attention}.to_v", keys, inner, has_bias=False)
            yield _linear(f"{block}.{attention}.to_out.0", inner, inner)
        yield _norm(f"{block}.norm3", inner, "layer_norm")
        yield _linear(
            f"{block}.ff.net.0.proj", inner, 8 * inner
        )  # GEGLU: values and gates of four widths
        yield _linear(f"{block}.ff.net.2", 4 * inner, inner)
    yield project(f"{name}.proj_out", inner, channels)
