"""What the UNet is told beside the noised latents: the text, and SDXL's six numbers of size and
crop."""

from collections.abc import Sequence

import torch

from training.models.text_encoders import encode_sd1, encode_sdxl
from training.models.unet import PipelineParts


def make_time_ids(
    original_size: torch.Tensor, crop_top_left: torch.Tensor, target_size: torch.Tensor
) -> torch.Tensor:
    """SDXL's size and crop conditioning, `(B, 6)` fp32, height before width.

    Args:
        original_size: `(B, 2)` upright source size, pixels.
        crop_top_left: `(B, 2)` rows and columns cut off, pixels of the resized image; of a mirrored
            one as it is seen.
        target_size: `(B, 2)` the bucket, pixels.

    Source: SDXL report, arXiv:2307.01952, section 2.2. Never rounded to 16 bits: 1,023 is no
    bfloat16.
    """
    assert original_size.shape == crop_top_left.shape == target_size.shape, (
        "one row of each per sample"
    )
    return torch.cat([original_size, crop_top_left, target_size], dim=1).to(torch.float32)  # (B, 6)


def predict(
    parts: PipelineParts,
    noised: torch.Tensor,
    timesteps: torch.Tensor,
    ids: Sequence[torch.Tensor],
    time_ids: torch.Tensor,
    *,
    clip_skip: int = 1,
    zeroed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The UNet's prediction `(B, 4, h, w)` for noised latents; gradients flow where parameters ask
    for them.

    Args:
        parts: The model.
        noised: `(B, 4, h, w)`.
        timesteps: `(B,)` int64.
        ids: Token ids `(B, n, 77)` per text encoder.
        time_ids: `(B, 6)` fp32; SD 1.x, which has no such input, ignores them.
        clip_skip: Layer of SD 1.x's text encoder, from the end.
        zeroed: `(B,)` bool, samples that read zeros in place of their text; size and crop are told
            all the same.
    """
    if parts.family == "sd1":
        text = encode_sd1(parts.text_encoders[0], ids[0], clip_skip)
    else:
        text = encode_sdxl(*parts.text_encoders, *ids)
    hidden_states, pooled = text.hidden_states, text.pooled
    if zeroed is not None:
        hidden_states = hidden_states.masked_fill(zeroed.view(-1, 1, 1), 0)  # (B, n * 77, d)
        pooled = (
            None if pooled is None else pooled.masked_fill(zeroed.view(-1, 1), 0)
        )  # (B, d_projection)
    # The embedder turns time_ids into sines in fp32, whatever type the weights have, as long as
    # they come in fp32.
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
    return parts.unet(
        noised.to(parts.unet.dtype),
        timesteps,
        encoder_hidden_states=hidden_states,
        added_cond_kwargs=added,
    ).sample
