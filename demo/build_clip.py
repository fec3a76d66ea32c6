"""The image tower of the demo's CLIP, taught to meet the finished text tower; it judges the
demo's images.

So it sees every concept, every flaw, blurred and noisy copies as a weak generator makes them,
images that went through the VAE, and captions that are wrong in one word.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from demo.build_text import SIDE, contrast, describe, tokens_of
from demo.build_vae import to_tensor
from demo.corpus import CLIP_MEAN, CLIP_STD, SEED, centre_square, picture, place, wording
from demo.progress import steps
from demo.prompts import training_prompt
from demo.saving import save_half
from demo.scenes import COLOURS, SHAPES, Scene, mutate
from training.seeds import Purpose, integer, numpy_generator

MARGIN = 4
MAX_BEND_PX = 2.2
"""Standard deviation of the bending of outlines at 64 px, at most."""
NUM_IMAGES = 6000
VAE_SHARE = 0.2
NUM_STEPS = 3000
FACT_SHARE = 0.6
"""Of the steps, how many ask only direct questions; then the words join. The first half of them
sees easy images."""
BATCH = 64
LEARNING_RATE = 1e-3


class Helpers(nn.Module):
    """Direct questions to the image tower, which only training asks."""

    def __init__(self, hidden: int, projection: int, num_facts: int) -> None:
        super().__init__()
        self.facts = nn.Linear(hidden, num_facts)
        self.quality = nn.Linear(projection, 1)
        self.scale = nn.Parameter(torch.tensor(3.0))


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to CLIP's input (N, 3, H, W)."""
    scaled = (
        torch.from_numpy(np.array(pixels)).float() / 255 - torch.tensor(CLIP_MEAN)
    ) / torch.tensor(CLIP_STD)
    return scaled.movedim(-1, -3)


@torch.no_grad()
def through_vae(vae: AutoencoderKL, image: Image.Image, split: str, index: int) -> Image.Image:
    """The image as the demo's VAE gives it back, bucket-sized."""
    pixels = to_tensor(place(image, wording(split, index, "crop")).pixels)[None]
    made = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].clamp(-1, 1)
    return Image.fromarray(((made.movedim(0, -1) + 1) * 127.5 + 0.5).to(torch.uint8).numpy())


def _warped(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn, scale and, for three of four, bend (N, 3, S, S) smoothly: a generator's outlines are
    never straight."""
    count, side = len(images), images.shape[-1]
    reach = rng.uniform(0, MAX_BEND_PX, count) * (rng.random(count) >= 0.25) * 2 / side
    field = torch.from_numpy(rng.normal(size=(count, 2, 6, 6))).float()
    field = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True)
    field *= torch.from_numpy(reach).float().view(-1, 1, 1, 1)
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    angle = torch.from_numpy(rng.normal(0, 0.15, count)).float().view(-1, 1, 1)
    scale = torch.from_numpy(rng.uniform(0.85, 1.2, count)).float().view(-1, 1, 1)
    across = (xs * torch.cos(angle) - ys * torch.sin(angle)) * scale + field[:, 0]
    down = (xs * torch.sin(angle) + ys * torch.cos(angle)) * scale + field[:, 1]
    grid = torch.stack([across, down], dim=-1)  # (N, S, S, 2)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=True
    )


def _augmented(pixels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Random shift, mirror, bend, and for some a slight blur or noise."""
    top, left = rng.integers(2 * MARGIN + 1, size=2)
    cut = pixels[:, top : top + SIDE, left : left + SIDE]
    images = normalised(cut[:, :, ::-1] if rng.random() < 0.5 else cut)
    share = torch.from_numpy(rng.random(len(images)))
    soft = share < 0.15
    images[soft] = F.avg_pool2d(F.pad(images[soft], (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = share > 0.9
    images[noisy] += 0.12 * torch.from_numpy(rng.normal(size=images[noisy].shape)).float()
    return _warped(images, rng)


def _corpus(vae: AutoencoderKL) -> tuple[list[Scene], np.ndarray]:
    side = SIDE + 2 * MARGIN
    scenes, pixels = [], np.empty((NUM_IMAGES, side, side, 3), np.uint8)
    for index in steps(NUM_IMAGES, "drawing clip"):
        scene, image, _ = picture("clip", index, star_share=0.18)
        if wording("clip", index, "vae").random() < VAE_SHARE:
            image = through_vae(vae, image, "clip", index)
        scenes.append(scene)
        pixels[index] = centre_square(image, side)
    return scenes, pixels


def build(models: Path, num_steps: int = NUM_STEPS) -> None:
    """Train the image tower of `models/clip`, whose text tower `demo.build_text` made and which
    stays as it is."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "clip"))
    vae = AutoencoderKL.from_pretrained(models / "base" / "vae")
    scenes, pixels = _corpus(vae)
    tokenizer = CLIPTokenizer.from_pretrained(models / "clip")
    clip = CLIPModel.from_pretrained(models / "clip", dtype=torch.float32).train()
    for part in (clip.text_model, clip.text_projection):
        part.requires_grad_(False)
    facts = torch.tensor([describe(scene) for scene in scenes])
    quality = torch.tensor([float(scene.quality) for scene in scenes])
    helpers = Helpers(
        clip.config.vision_config.hidden_size, clip.config.projection_dim, facts.shape[1]
    )
    parameters = [
        *clip.vision_model.parameters(),
        *clip.visual_projection.parameters(),
        *helpers.parameters(),
    ]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.03
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, num_steps, pct_start=0.08
    )
    rng = numpy_generator(SEED, Purpose.DEMO, "clip batches")
    easy = np.array(
        [i for i, scene in enumerate(scenes) if scene.quality >= 5 and len(scene.shapes) == 1]
    )
    words_from = round(FACT_SHARE * num_steps)
    for step in (bar := steps(num_steps, "clip")):
        pool = easy if step < words_from // 2 else np.arange(NUM_IMAGES)
        chosen = rng.choice(pool, BATCH, replace=False)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = clip.vision_model(_augmented(pixels[chosen], rng)).pooler_output
            image, known = clip.visual_projection(pooled).float(), helpers.facts(pooled).float()
        guess = helpers.quality(F.normalize(image, dim=-1))[:, 0] * 4 + 5
        wrong = F.mse_loss(guess, quality[chosen])
        asked = question_loss(known, facts[chosen])
        loss = asked + 0.15 * wrong
        if step >= words_from:
            text = _texts(clip, tokenizer, [scenes[i] for i in chosen], step)
            loss = loss + contrast(image, text, helpers.scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        bar.note(
            loss=float(loss.detach()), asked=float(asked.detach()), quality=float(wrong.detach())
        )
        if step % 500 == 499 or step + 1 == num_steps:
            clip.logit_scale.data = helpers.scale.data.clone()
            save_half(clip, models / "clip")
    print("clip:", check(clip, tokenizer))


def question_loss(known: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Which shape comes first (weighted most: nothing is harder to learn), and all else as yes or
    no."""
    kinds = len(SHAPES)
    rest = F.binary_cross_entropy_with_logits(known[:, kinds:], facts[:, kinds:])
    return 2 * F.cross_entropy(known[:, :kinds], facts[:, :kinds].argmax(dim=1)) + 4 * rest


@torch.no_grad()
def _texts(
    clip: CLIPModel, tokenizer: CLIPTokenizer, scenes: list[Scene], step: int
) -> torch.Tensor:
    """Projected prompts of the scenes, then of the same scenes wrong in one word."""
    true, wrong = [], []
    for place_in_batch, scene in enumerate(scenes):
        rng = wording("clip words", step, place_in_batch)
        other = mutate(scene, rng)
        state = rng.getstate()
        true.append(training_prompt(scene, rng, drop=0.1))
        rng.setstate(state)
        wrong.append(training_prompt(other, rng, drop=0.1))
    return clip.get_text_features(input_ids=tokens_of(tokenizer, [*true, *wrong])).pooler_output


@torch.no_grad()
def check(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 400) -> dict[str, float]:
    """Shares of fresh images whose own words beat all words with another shape, another colour,
    or anything wrong."""
    clip.eval()
    wins: dict[str, list[float]] = {"shape": [], "colour": [], "any": []}
    for index in range(count):
        scene, image, _ = picture("clip check", index, star_share=0.3)
        if scene.quality < 5 or len(scene.shapes) == 2:
            continue
        shape = scene.shapes[0]
        kinds = [replace(shape, kind=kind) for kind in SHAPES if kind != shape.kind]
        colours = [
            replace(shape, colour=c) for c in COLOURS if c not in (shape.colour, scene.background)
        ]
        rng = wording("clip check", index, "words")
        rivals = [replace(scene, shapes=(other,)) for other in (*kinds, *colours)]
        rivals += [mutate(scene, rng) for _ in range(4)]
        state = rng.getstate()
        texts = []
        for one in (scene, *rivals):
            rng.setstate(state)
            texts.append(training_prompt(one, rng, drop=0.0, alias_prob=0.0))
        inputs = normalised(centre_square(image, SIDE)[None])
        vision = F.normalize(clip.get_image_features(pixel_values=inputs).pooler_output, dim=-1)
        text = F.normalize(
            clip.get_text_features(input_ids=tokens_of(tokenizer, texts)).pooler_output, dim=-1
        )
        scores = (text @ vision[0]).tolist()
        wins["shape"].append(float(scores[0] > max(scores[1 : 1 + len(kinds)])))
        wins["colour"].append(float(scores[0] > max(scores[1 + len(kinds) : -4])))
        wins["any"].append(float(scores[0] > max(scores[1:])))
    clip.train()
    return {name: float(np.mean(values)) for name, values in wins.items()}
