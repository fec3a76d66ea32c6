"""Floating-point operations of a training sample, exactly and from configs alone: for MFU, time and
cost.

Every weight that multiplies something does so once per pixel of its level, per text token, or once
per sample; where it does follows from its name in the model. One multiply-add is two operations.
Norms, activations and additions are not counted, as torch's FlopCounterMode does not count them
either. Only `vae_flops` and `peak_flops` need torch.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from training.buckets.plans import VAE_FACTOR
from training.config.run import Precision, RunConfig
from training.errors import ModelError
from training.estimates import gpus
from training.estimates.gradients import attention_products, input_gradients
from training.models.base_model import config_folder, read_json
from training.models.tokens import CHUNK_LENGTH
from training.models.trainable import Trained
from training.models.trainables import trainable_of
from training.models.unet_layers import Layer, unet_layers

if TYPE_CHECKING:
    import torch

Family = Literal["sdxl", "sd1"]
Count = Literal["pixels", "tokens", "once"]


class Flops(NamedTuple):
    """Operations per sample."""

    forward: float = 0.0
    """Of the forward pass."""
    backward: float = 0.0
    """Of the backward pass: gradients of weights and of inputs, where anything asks for them."""
    recompute: float = 0.0
    """Of the forward pass once more, where gradient checkpointing makes it so."""

    @property
    def model(self) -> float:
        """What the training needs at least: MFU counts this and no recomputation. PaLM,
        arXiv:2204.02311, app. B."""
        return self.forward + self.backward

    def plus(self, other: "Flops") -> "Flops":
        """The sum."""
        return Flops(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module of a UNet or of half a VAE works."""

    level: int
    """Of the resolution it writes: 0 is the input's, each further one halves both sides."""
    count: Count
    """How often it works: per pixel of the level, per text token, or once per sample."""
    unit: str
    """The residual or transformer block that gradient checkpointing computes again as one; empty
    for none."""


_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.")
_UNIT = re.compile(r"(.*?(?:resnets|transformer_blocks)\.\d+)\.")


def locate(name: str, num_levels: int, *, at_depth: tuple[str, ...] = ()) -> Place:
    """Where the module of a UNet with a dotted name works; of a VAE, without its `encoder.` or
    `decoder.`.

    Args:
        name: Such as `down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2`.
        num_levels: Resolutions of the model.
        at_depth: First parts of names that lie at the deepest level although they are in no block.

    Raises:
        ModelError: no rule is known for it.
    """
    first = name.split(".", maxsplit=1)[0]
    unit = found.group(1) if (found := _UNIT.match(name)) else ""
    if unit == "mid_block.resnets.0":
        unit = ""  # diffusers leaves the first one out
    count: Count = "pixels"
    if first in ("time_embedding", "add_embedding") or name.endswith("time_emb_proj"):
        count = "once"
    elif name.endswith(("attn2.to_k", "attn2.to_v")):
        count = "tokens"
    block = _BLOCK.match(name)
    if block:
        number = int(block.group(2))
        level = number if block.group(1) == "down" else num_levels - 1 - number
        level += (".downsamplers." in name) - (".upsamplers." in name)
    elif first == "mid_block" or first in at_depth:
        level = num_levels - 1
    elif first in ("conv_in", "conv_norm_out", "conv_out") or count == "once":
        level = 0
    else:
        raise ModelError(
            f"operations of layer {name} are not known: the model is none of SD 1.x or SDXL"
        )
    return Place(level=level, count=count, unit=unit)


def areas(height: int, width: int, num_levels: int) -> list[int]:
    """Pixels of each level of an image of `height` x `width`; odd sides are rounded up."""
    return [-(-height // 2**level) * -(-width // 2**level) for level in range(num_levels)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A weight, or the two products of an attention."""

    name: str
    """Of the weight's module; of an attention, that of its `to_q`."""
    place: Place
    multiplies: int
    """Multiply-adds per position; of an attention, per pair of a position and a key."""
    keys: Count | None
    """What an attention reads; None for a weight."""
    recomputed: bool
    """Whether its unit, computed again, needs its result: the unit's last product is not
    repeated."""


def whole(layer: Layer) -> Trained:
    """What is trained at a layer of a UNet all of whose weights are."""
    return Trained(own=True)


def unet_flops(
    config: Mapping[str, Any],
    height: int,
    width: int,
    tokens: int,
    *,
    text_gradient: bool = True,
    pooled_gradient: bool = False,
    checkpointed: Sequence[str] = (),
    trained_at: Callable[[Layer], Trained] = whole,
) -> Flops:
    """Operations of a UNet2DConditionModel for one sample.

    Args:
        config: The UNet's, as in its `config.json`.
        height: Of the image, pixels.
        width: Of the image, pixels.
        tokens: Text tokens that it attends to, 77 per chunk.
        text_gradient: Any text encoder is trained.
        pooled_gradient: The one that gives the pooled text is.
        checkpointed: `compute.gradient_checkpointing` of the run.
        trained_at: What is trained at each of its layers.

    Raises:
        ModelError: it is no UNet of SD 1.x or SDXL.
    """
    num_levels = len(config["block_out_channels"])
    counted = areas(-(-height // VAE_FACTOR), -(-width // VAE_FACTOR), num_levels)
    trained = {layer.name: trained_at(layer) for layer in unet_layers(config)}
    needed = input_gradients(trained, text=text_gradient, pooled=pooled_gradient)
    forward = backward = recompute = 0.0
    for layer in _unet_layers(frozen(config)):
        positions, here = 2 * _times(layer, counted, tokens), trained[layer.name]
        added, its_backward = 0, 0.0
        if layer.keys:
            its_backward = layer.multiplies / 2 * attention_products(layer.name, trained, needed)
        else:
            added = sum(here.products)
            its_backward = layer.multiplies * (here.own + needed[layer.name])
            # The weights of what is added, and the inputs of all its products but the first.
            its_backward += 2 * added - (0 if needed[layer.name] else sum(here.products[:1]))
        forward += positions * (layer.multiplies + added)
        backward += positions * its_backward
        if is_checkpointed(layer.place.unit, checkpointed):
            recompute += positions * (layer.recomputed * layer.multiplies + added)
    return Flops(forward, backward, recompute)


def is_checkpointed(unit: str, groups: Sequence[str]) -> bool:
    """Whether a block of the UNet is computed again under `compute.gradient_checkpointing`."""
    return bool(unit) and any(
        group == "all" or f"{unit}.".startswith(f"{group}.") for group in groups
    )


def _times(layer: _Layer, counted: list[int], tokens: int) -> int:
    """Positions that a layer works at; of an attention, pairs."""
    numbers = {"pixels": counted[layer.place.level], "tokens": tokens, "once": 1}
    return numbers[layer.place.count] * (numbers[layer.keys] if layer.keys else 1)


def vae_flops(config: Mapping[str, Any], height: int, width: int) -> tuple[float, float]:
    """Operations of encoding and of decoding one image with an AutoencoderKL.

    Args:
        config: The VAE's, as in its `config.json`.
        height: Pixels, a multiple of 8.
        width: Pixels, a multiple of 8.
    """
    counted = areas(height, width, len(config["block_out_channels"]))
    encode, decode = (
        sum(2.0 * layer.multiplies * _times(layer, counted, 0) for layer in layers)
        for layers in _vae_layers(frozen(config))
    )
    return encode, decode


def text_encoder_flops(
    config: Mapping[str, Any],
    *,
    num_chunks: int,
    num_trained_layers: int,
    projects: bool,
    checkpointed: bool,
) -> Flops:
    """Operations of a CLIP text model for one prompt.

    Args:
        config: The text model's, as in its `config.json`.
        num_chunks: Chunks of 77 tokens.
        num_trained_layers: Layers that a gradient flows through; 0 for a frozen one.
        projects: It ends in a projection of the pooled output (CLIPTextModelWithProjection).
        checkpointed: `text_encoders` is among the run's checkpointed groups.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    last = 2 * CHUNK_LENGTH * width * inner
    layer = 2 * CHUNK_LENGTH * (4 * width**2 + width * inner) + last + 4 * CHUNK_LENGTH**2 * width
    projection = 2 * width * config["projection_dim"] if projects else 0
    return Flops(
        num_chunks * (config["num_hidden_layers"] * layer + projection),
        num_chunks * 2.0 * (num_trained_layers * layer + (projection if num_trained_layers else 0)),
        num_chunks * num_trained_layers * (layer - last) if checkpointed else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfigs:
    """Configs of a base model: all that estimates need, without weights."""

    family: Family
    """What decides conditioning."""
    unet: Mapping[str, Any]
    """Of the UNet."""
    text_encoders: tuple[Mapping[str, Any], ...]
    """Two for SDXL, one for SD 1.x."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """What `compute.gradient_checkpointing` may name."""
        numbers = range(len(self.unet["block_out_channels"]))
        down, up = ([f"{side}_blocks.{number}" for number in numbers] for side in ("down", "up"))
        return ("down_blocks", *down, "mid_block", "up_blocks", *up, "text_encoders", "all")

    def trained_layers(self, number: int, config: RunConfig) -> int:
        """Layers of a text encoder that a run's gradient flows through."""
        num_layers = int(self.text_encoders[number]["num_hidden_layers"])
        if not trainable_of(config).text_encoders[number]:
            return 0
        if number == 1:
            return num_layers
        # SDXL reads the states before the last layer; clip_skip counts from the end.
        return num_layers - (1 if self.family == "sdxl" else config.clip_skip - 1)


def read_model_configs(model: Path) -> ModelConfigs:
    """Configs of a diffusers folder, or of the one beside a single file; weights are not looked at.

    Raises:
        ModelError: a config is missing or no JSON object.
    """
    folder = config_folder(model)
    unet = read_json(folder / "unet" / "config.json")
    family: Family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd1"
    names = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    encoders = tuple(read_json(folder / name / "config.json") for name in names)
    return ModelConfigs(family=family, unet=unet, text_encoders=encoders)


def training_flops(model: ModelConfigs, config: RunConfig) -> Callable[[int, int, int], Flops]:
    """What a run computes for one sample, as a function of (height, width, num_chunks); height and
    width in pixels.

    The function remembers shapes: it can be called for every micro-batch.
    """
    groups = config.compute.gradient_checkpointing
    trainable = trainable_of(config)
    trained = trainable.text_encoders
    encoders_checkpointed = "text_encoders" in groups or "all" in groups

    @functools.cache
    def count(height: int, width: int, num_chunks: int) -> Flops:
        flops = unet_flops(
            model.unet,
            height,
            width,
            num_chunks * CHUNK_LENGTH,
            text_gradient=any(trained),
            pooled_gradient=trained[1],
            checkpointed=groups,
            trained_at=trainable.at,
        )
        for number, encoder in enumerate(model.text_encoders):
            flops = flops.plus(
                text_encoder_flops(
                    encoder,
                    num_chunks=num_chunks,
                    num_trained_layers=model.trained_layers(number, config),
                    projects=number == 1,
                    checkpointed=encoders_checkpointed,
                )
            )
        return flops

    return count


def peak_flops(device: "torch.device", precision: Precision) -> float | None:
    """Operations per second that a device can do at best in a run's arithmetic; None where no data
    sheet is known."""
    if device.type != "cuda":
        return None
    import torch

    return gpus.peak_flops(gpus.detect_gpu(torch.cuda.get_device_name(device)), precision)


def frozen(config: Mapping[str, Any]) -> str:
    """A config as a key of caches."""
    return json.dumps(
        {key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True
    )


@functools.lru_cache(maxsize=8)
def _unet_layers(config: str) -> tuple[_Layer, ...]:
    described = json.loads(config)
    return tuple(_layers(unet_layers(described), len(described["block_out_channels"]), at_depth=()))


@functools.lru_cache(maxsize=8)
def _vae_layers(config: str) -> tuple[tuple[_Layer, ...], tuple[_Layer, ...]]:
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL.from_config(json.loads(config))
    num_levels = len(json.loads(config)["block_out_channels"])
    halves: dict[str, list[_Layer]] = defaultdict(list)
    for half, convolution, at_depth in (
        ("encoder", "quant_conv", ("conv_norm_out", "conv_out")),
        ("decoder", "post_quant_conv", ("conv_in",)),
    ):
        halves[half] += _layers(
            _read_layers(model.get_submodule(half)), num_levels, at_depth=at_depth
        )
        for layer in _read_layers(getattr(model, convolution) or torch.nn.Identity()):
            deepest = Place(level=num_levels - 1, count="pixels", unit="")
            halves[half].append(_weight(deepest, layer, recomputed=False))
    return tuple(halves["encoder"]), tuple(halves["decoder"])


def _read_layers(model: "torch.nn.Module") -> Iterator[Layer]:
    """The products of a model that is there."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            inputs, outputs, kernel = module.in_channels, module.out_channels, module.kernel_size[0]
            yield Layer(name=name, kind="conv", inputs=inputs, outputs=outputs, kernel=kernel)
        elif isinstance(module, torch.nn.Linear):
            yield Layer(
                name=name, kind="linear", inputs=module.in_features, outputs=module.out_features
            )


def _layers(found: Iterable[Layer], num_levels: int, *, at_depth: tuple[str, ...]) -> list[_Layer]:
    """Everything in a model that multiplies."""
    layers = []
    products = {layer.name: layer for layer in found if layer.multiplies}
    for name, layer in products.items():
        place = locate(name, num_levels, at_depth=at_depth)
        last = "conv_shortcut" if f"{place.unit}.conv_shortcut" in products else "conv2"
        recomputed = bool(place.unit) and name not in (
            f"{place.unit}.{last}",
            f"{place.unit}.ff.net.2",
        )
        layers.append(_weight(place, layer, recomputed=recomputed))
        if name.endswith("to_q"):
            keys: Count = "tokens" if name.endswith("attn2.to_q") else "pixels"
            layers.append(
                _Layer(
                    name=name,
                    place=place,
                    multiplies=2 * layer.outputs,
                    keys=keys,
                    recomputed=bool(place.unit),
                )
            )
    return layers


def _weight(place: Place, layer: Layer, *, recomputed: bool) -> _Layer:
    return _Layer(
        name=layer.name,
        place=place,
        multiplies=layer.multiplies,
        keys=None,
        recomputed=recomputed,
    )
