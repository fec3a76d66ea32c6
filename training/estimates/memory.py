"""Bytes of device memory that a training run needs, from configs alone: weights and their copies,
then activations.

Closed forms over a model's layers, without torch; what libraries and kernels take beside them is
one constant.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.buckets.plans import VAE_FACTOR
from training.config.run import GROUP_NUMBERS, SLICE_NUMBERS, OptimizerName, RunConfig
from training.estimates.flops import ModelConfigs, Place, areas, frozen, is_checkpointed, locate
from training.estimates.gradients import input_gradients
from training.models.tokens import CHUNK_LENGTH
from training.models.trainables import trainable_of
from training.models.unet_layers import Layer, unet_layers

Shape = tuple[int, ...]

CONTEXT_BYTES = 3e9
"""CUDA context, libraries and their workspaces: an estimate, not measured on a card."""

# Optimizer state per trained parameter; Adafactor's follows from shapes. Prodigy keeps the first
# weights and a running sum beside AdamW's two moments.
_STATE_BYTES: dict[OptimizerName, int] = {
    "adamw": 8,
    "adamw_8bit": 2,
    "lion": 4,
    "lion_8bit": 1,
    "prodigy": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device."""

    num_parameters: int
    """Of UNet and text encoders, with what is put beside them."""
    num_trained: int
    """Of them, trained."""
    weights: float
    """Trained weights, their fp32 master copy or 16-bit casts, and frozen text encoders."""
    gradients: float
    """Of trained weights, with what summing them over ranks takes."""
    optimizer: float
    """Its state, a rank's mean share where it is sharded."""
    ema: float
    """Averaged weights, fp32, this rank's share where the optimizer is sharded."""
    activations: float
    """What one micro-batch of the largest bucket and prompt keeps for its backward pass."""
    context: float = CONTEXT_BYTES
    """Libraries."""

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.ema
            + self.activations
            + self.context
        )


def estimate_memory(
    model: ModelConfigs,
    config: RunConfig,
    *,
    height: int,
    width: int,
    num_chunks: int,
    num_ranks: int,
) -> MemoryEstimate:
    """Memory of one rank of a run.

    Args:
        model: The base model's configs.
        config: Precision, optimizer, micro-batch, checkpointing and sharding of the run.
        height: Of the largest bucket, pixels.
        width: Of the largest bucket, pixels.
        num_chunks: Text chunks of the longest prompt.
        num_ranks: Devices of the run.
    """
    numbers = range(len(model.text_encoders))
    unet = _unet_shapes(frozen(model.unet))
    total = _count(unet) + sum(
        encoder_parameters(
            encoder, num_layers=encoder["num_hidden_layers"], embeddings=True, projects=number == 1
        )
        + 2 * int(encoder["hidden_size"])
        for number, encoder in enumerate(model.text_encoders)
    )
    found, added = _trained_shapes(model.unet, config)
    shapes = [
        *found,
        *added,
        *(shape for number in numbers for shape in _trained_encoder_shapes(model, number, config)),
    ]
    trained, total = _count(shapes), total + _count(added)
    ranks = num_ranks if config.compute.shard_optimizer else 1
    # Autocast casts fp32 weights once per pass and keeps the casts till its end; fp32 weights
    # beside bf16 ones are 16 bits more, see training/optimization/masters.py.
    copies = {"fp32": 4.0, "tf32": 4.0, "bf16": 2 + 2 / ranks}.get(config.precision, 6.0)
    frozen_bytes = 2 if config.precision == "bf16" else 4
    sample = activation_bytes(model.unet, config, height, width, num_chunks * CHUNK_LENGTH)
    sample += num_chunks * sum(
        _encoder_activation_bytes(model, number, config) for number in numbers
    )
    return MemoryEstimate(
        num_parameters=total,
        num_trained=trained,
        weights=trained * copies
        + _joined_bytes(trained, config)
        + (total - trained) * frozen_bytes,
        gradients=_gradient_bytes(trained, config, num_ranks),
        optimizer=state_bytes(config.optimizer.name, shapes) / ranks,
        ema=trained * 4 / ranks if config.optimizer.ema_half_life_samples else 0,
        activations=sample * config.batch.micro_batch_size,
    )


def _joined_bytes(trained: int, config: RunConfig) -> float:
    """The fp32 weights of a group that is stepped, made of both halves, and what halving them again
    takes."""
    if config.precision != "bf16":
        return 0.0
    return 8.0 * (trained if config.optimizer.name == "prodigy" else min(trained, GROUP_NUMBERS))


def _gradient_bytes(trained: int, config: RunConfig, num_ranks: int) -> float:
    """The fp32 buffer; where ranks' micro-batches are added one by one, their sum and a slice of
    every rank beside."""
    if config.reduction == "fast" or num_ranks == 1:
        return 4.0 * trained
    return 4.0 * (2 * trained + num_ranks * min(trained, SLICE_NUMBERS))


def state_bytes(optimizer: OptimizerName, shapes: Sequence[Shape]) -> int:
    """What an optimizer keeps of trained weights of these shapes from its first step on.

    Adafactor keeps two means of the squared gradient, over the last side of a shape and over the
    one before, and all of it for vectors: next to nothing of a linear layer, two thirds of a 3x3
    convolution. arXiv:1804.04235, section 4.
    """
    if optimizer != "adafactor":
        return _count(shapes) * _STATE_BYTES[optimizer]
    kept = [part for shape in shapes for part in _factors(shape)]
    return 4 * _count(kept)


def _factors(shape: Shape) -> tuple[Shape, ...]:
    return (shape[:-1], (*shape[:-2], shape[-1])) if len(shape) > 1 else (shape,)


def activation_bytes(
    unet: Mapping[str, Any], config: RunConfig, height: int, width: int, tokens: int
) -> float:
    """What the UNet's forward pass of one sample keeps for the backward pass.

    With gradient checkpointing a block keeps its input alone, and the largest of them is there
    once, computed again.

    Args:
        unet: The UNet's config.
        config: Precision and `compute.gradient_checkpointing` of the run.
        height: Of the image, pixels.
        width: Of the image, pixels.
        tokens: Text tokens.

    Source: counted by torch's saved-tensor hooks, tests/estimates/test_memory.py, which also covers
    autocast.
    """
    counted = areas(
        -(-height // VAE_FACTOR), -(-width // VAE_FACTOR), len(unet["block_out_channels"])
    )
    plain = _plain_bytes(config)
    norm = 2 if config.precision == "bf16" else 4  # autocast computes norms in fp32
    trainable = trainable_of(config)
    first, second = trainable.text_encoders
    trained = {layer.name: trainable.at(layer) for layer in unet_layers(unet)}
    needed = input_gradients(trained, text=first or second, pooled=second)
    kept, again = 0.0, dict[str, float]()
    for saved in _unet_saved(frozen(unet)):
        if not any(needed[name] or trained[name] for name in saved.names):
            continue
        positions = tokens if saved.place.count == "tokens" else counted[saved.place.level]
        size = positions * (plain * saved.plain + norm * saved.norm)
        if not saved.readers or any(trained[name] for name in saved.readers):
            size += positions * plain * (saved.read + (saved.recast if norm > plain else 0))
        if is_checkpointed(saved.place.unit, config.compute.gradient_checkpointing):
            again[saved.place.unit] = again.get(saved.place.unit, 0.0) + size
            kept += positions * plain * saved.unit_input
        else:
            kept += size
    return kept + max(again.values(), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """Numbers per position that a module keeps for the backward pass."""

    place: Place
    names: tuple[str, ...]
    """The layer's; of a query, key or value, those of all three, which one attention keeps."""
    readers: tuple[str, ...]
    """Layers for the gradients of whose weights `read` and `recast` are kept; none where they are
    kept in any case."""
    plain: float
    """In the arithmetic of products, whatever is trained."""
    read: float
    """In the arithmetic of products, where a reader is trained."""
    norm: float
    """In the arithmetic of norms."""
    recast: float
    """As `read`, where a norm's has to be cast to the arithmetic of products: autocast does so for
    each reader apart."""
    unit_input: float
    """All that a checkpointed unit keeps; stands in its first norm."""


@functools.lru_cache(maxsize=8)
def _unet_saved(config: str) -> tuple[_Saved, ...]:
    described = json.loads(config)
    found = []
    for layer in unet_layers(described):
        plain = read = norm = recast = unit_input = 0.0
        names = _attention_names(layer.name)
        readers = names if layer.name.endswith("attn1.to_q") else (layer.name,)
        match layer.kind:
            case "group_norm" | "layer_norm":
                in_residual = ".resnets." in layer.name or layer.name == "conv_norm_out"
                norm = layer.outputs * (
                    2 if in_residual else 1
                )  # there its output is kept too, for the SiLU behind it
                unit_input = layer.outputs if layer.name.endswith(".norm1") else 0.0
            # torch keeps the input of a convolution even for the gradient of that input alone.
            case "conv" if layer.name.endswith("conv_shortcut"):
                recast, readers = layer.inputs, ()  # else it reads what norm1 has kept
            case "conv":
                plain = layer.inputs * layer.stride**2
            case "linear":
                plain, read = _linear_saved(layer)
                recast = layer.inputs if layer.name.endswith(("attn1.to_k", "attn1.to_v")) else 0.0
        if plain or read or norm or recast:
            place = locate(layer.name, len(described["block_out_channels"]))
            found.append(
                _Saved(
                    place=place,
                    names=names,
                    readers=readers,
                    plain=plain,
                    read=read,
                    norm=norm,
                    recast=recast,
                    unit_input=unit_input,
                )
            )
    return tuple(item for item in found if item.place.count != "once")


def _attention_names(name: str) -> tuple[str, ...]:
    """The layers that one attention reads, if this is one of them; else the layer alone."""
    attention, _, last = name.rpartition(".")
    inputs = ("to_q", "to_k", "to_v")
    return tuple(f"{attention}.{each}" for each in inputs) if last in inputs else (name,)


def _linear_saved(layer: Layer) -> tuple[float, float]:
    """Numbers per position that a linear layer and what follows it keep: whatever is trained, and
    for the gradient of its weight; shared inputs are counted once."""
    if layer.name.endswith("to_q"):
        return layer.outputs, layer.inputs
    if layer.name.endswith(("to_k", "to_v")):
        return layer.outputs, 0.0
    if layer.name.endswith("to_out.0"):
        return layer.inputs, 0.0  # the attention keeps it
    if layer.name.endswith("ff.net.0.proj"):
        # Both halves, and the gate after its GELU.
        return 1.5 * layer.outputs, layer.inputs
    return 0.0, layer.inputs


def _count(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _trained_shapes(unet: Mapping[str, Any], config: RunConfig) -> tuple[list[Shape], list[Shape]]:
    """Of the UNet's own weights that are trained, and of what is put beside them."""
    own, added = list[Shape](), list[Shape]()
    trainable = trainable_of(config)
    for layer in unet_layers(unet):
        here = trainable.at(layer)
        own += layer.shapes if here.own else ()
        added += here.added
    return own, added


@functools.lru_cache(maxsize=8)
def _unet_shapes(config: str) -> tuple[Shape, ...]:
    return tuple(shape for layer in unet_layers(json.loads(config)) for shape in layer.shapes)


def encoder_parameters(
    config: Mapping[str, Any], *, num_layers: int, embeddings: bool, projects: bool
) -> int:
    """Parameters of a CLIP text model but for its final norm, or of a part of it.

    Args:
        config: The text model's, as in its `config.json`.
        num_layers: Layers to count.
        embeddings: Count token and position embeddings.
        projects: Count the projection of the pooled output.
    """
    return _count(
        _encoder_shapes(config, num_layers=num_layers, embeddings=embeddings, projects=projects)
    )


def _encoder_shapes(
    config: Mapping[str, Any], *, num_layers: int, embeddings: bool, projects: bool
) -> list[Shape]:
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    attention = [(width, width), (width,)] * 4
    norms = [(width,)] * 4
    shapes: list[Shape] = [
        *attention,
        (inner, width),
        (inner,),
        (width, inner),
        (width,),
        *norms,
    ] * num_layers
    if embeddings:
        shapes += [(int(config[rows]), width) for rows in ("vocab_size", "max_position_embeddings")]
    return [*shapes, (int(config["projection_dim"]), width)] if projects else shapes


def _trained_encoder_shapes(model: ModelConfigs, number: int, config: RunConfig) -> list[Shape]:
    encoder, num_layers = model.text_encoders[number], model.trained_layers(number, config)
    if not num_layers:
        return []
    shapes = _encoder_shapes(
        encoder,
        num_layers=num_layers,
        embeddings=not config.freeze_embeddings,
        projects=number == 1,
    )
    # SDXL reads its first encoder before the final norm.
    return (
        shapes
        if model.family == "sdxl" and number == 0
        else [*shapes, *[(int(encoder["hidden_size"]),)] * 2]
    )


def _encoder_activation_bytes(model: ModelConfigs, number: int, config: RunConfig) -> float:
    """What one chunk keeps in a text encoder."""
    encoder, num_layers = model.text_encoders[number], model.trained_layers(number, config)
    width, inner = encoder["hidden_size"], encoder["intermediate_size"]
    groups = config.compute.gradient_checkpointing
    numbers = width if "all" in groups or "text_encoders" in groups else 8 * width + 4 * inner
    return CHUNK_LENGTH * num_layers * numbers * float(_plain_bytes(config))


def _plain_bytes(config: RunConfig) -> int:
    return 4 if config.precision in ("fp32", "tf32") else 2
