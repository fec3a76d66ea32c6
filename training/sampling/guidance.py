"""How the UNet's predictions for several readings of one image become one: classifier-free and
perturbed-attention.

Readings follow each other along the batch: without the prompt, with it, and, where that is asked
for, with it but with the self-attention of the middle block replaced by the identity.
"""

import contextlib
from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, PAGCFGIdentitySelfAttnProcessor2_0

from training.config.evaluation import SamplingConfig
from training.errors import EvaluationError


def num_readings(config: SamplingConfig) -> int:
    """How many times the batch is laid side by side for the UNet: each costs as much as one."""
    return 3 if config.pag_scale else 2


def repeat_prompts(conditioning: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Conditioning of all readings from `(2 * B, ...)`, negatives first."""
    if not config.pag_scale:
        return conditioning
    return torch.cat([conditioning, conditioning.chunk(2)[1]])


@contextlib.contextmanager
def perturbed(unet: UNet2DConditionModel, config: SamplingConfig) -> Iterator[None]:
    """Within, the UNet reads the last third of its batch without self-attention in the middle
    block, if so asked.

    Raises:
        EvaluationError: the UNet's middle block has no self-attention.

    Source: Ahn et al., arXiv:2403.17377, section 4.1 (identity attention map) and the appendix (the
    middle block).
    """
    if not config.pag_scale:
        yield
        return
    layers = [
        module
        for name, module in unet.named_modules()
        if name.startswith("mid_block.")
        and isinstance(module, Attention)
        and not module.is_cross_attention
    ]
    if not layers:
        raise EvaluationError(
            f"evaluation.sampling.pag_scale={config.pag_scale}: the UNet's middle block has no self-attention that "
            "could be perturbed"
        )
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


def guide(
    prediction: torch.Tensor, config: SamplingConfig, factors: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """One prediction `(B, ...)` of those of all readings `(num_readings * B, ...)`.

    Args:
        prediction: Of the UNet.
        config: Says how strong both guidances are.
        factors: Of the scale of classifier-free guidance, `(B, 1, 1, 1)` or one for all images.

    Source: Ho and Salimans, arXiv:2207.12598, eq. 6; arXiv:2403.17377, eq. 16 (both guidances at
    once).
    """
    without, with_text, *rest = prediction.chunk(num_readings(config))
    guided = without + config.guidance_scale * factors * (with_text - without)
    for perturbed_text in rest:
        guided = guided + config.pag_scale * (with_text - perturbed_text)
    return guided
