"""The demo's tagger: JoyTag's architecture at tiny size, taught the demo's tags by binary
cross-entropy."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from demo.build_clip import normalised
from demo.corpus import SEED, centred_on_white, picture
from demo.progress import steps
from demo.scenes import SHAPES, all_tags, tags_of
from training.annotators import tagger
from training.seeds import Purpose, integer, numpy_generator

NUM_IMAGES = 6000
NUM_STEPS = 2400
BATCH = 48
SIDE = 96
THRESHOLD = 0.4  # JoyTag's.
HARD_WEIGHT = 8.0
"""Of shapes and the watermark in the loss: by far the hardest to learn, they drown among the
colours unweighted."""


def new_model(num_tags: int) -> tagger.JoyTagViT:
    """An untrained tagger of the demo's size (0.5 M parameters)."""
    stem = "conv:c=24;ln;relu;conv:c=48;ln;relu;conv:c=80;ln;relu;conv:c=96;ln;relu;conv:c=96,s=1,k=1,p=0"
    return tagger.JoyTagViT(
        n_tags=num_tags,
        image_size=SIDE,
        num_blocks=3,
        patch_size=16,
        d_model=96,
        mlp_dim=288,
        num_heads=4,
        cnn_stem=stem,
    )


def _augmented(pixels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Mirror, small shifts, slight noise."""
    if rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    down, right = rng.integers(-4, 5, size=2)
    images = normalised(np.roll(pixels, (int(down), int(right)), axis=(1, 2)))
    return images + 0.05 * torch.from_numpy(rng.normal(size=images.shape)).float() * float(
        rng.random()
    )


def build(models: Path, num_steps: int = NUM_STEPS) -> None:
    """Train and save `models/tagger`; prints micro and macro F1 on fresh images."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "tagger"))
    names = all_tags()
    model = new_model(len(names))
    pixels = np.empty((NUM_IMAGES, SIDE, SIDE, 3), np.uint8)
    truth = torch.zeros(NUM_IMAGES, len(names))
    for index in steps(NUM_IMAGES, "drawing tagger"):
        scene, image, _ = picture("tagger", index, star_share=0.16, watermark_share=0.25)
        pixels[index] = centred_on_white(image, SIDE)
        truth[index, [names.index(tag) for tag in tags_of(scene)]] = 1.0
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.03
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, num_steps, pct_start=0.1)
    weight = torch.tensor(
        [HARD_WEIGHT if name in (*SHAPES, "watermark") else 1.0 for name in names]
    )
    rng = numpy_generator(SEED, Purpose.DEMO, "tagger batches")
    for step in (bar := steps(num_steps, "tagger")):
        chosen = rng.choice(NUM_IMAGES, BATCH, replace=False)
        logits = model(_augmented(pixels[chosen], rng))
        loss = F.binary_cross_entropy_with_logits(logits, truth[chosen], weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        bar.note(loss=float(loss.detach()))
        if step % 300 == 299 or step + 1 == num_steps:
            tagger.save(models / "tagger", model, names, torch.float16)
    print("tagger:", check(models / "tagger"))


def check(folder: Path, count: int = 300) -> dict[str, float]:
    """Micro F1, macro F1 and the watermark tag's F1 at 0.4, on fresh images of quality 3 and
    better."""
    adapter = tagger.Tagger.load(folder, "cpu")
    hits = np.zeros((3, len(adapter.tags)))
    for index in range(count):
        scene, image, _ = picture("tagger check", index)
        if scene.quality < 3:
            continue
        found = {
            tag for tag, probability in adapter([np.asarray(image)])[0] if probability > THRESHOLD
        }
        for number, tag in enumerate(adapter.tags):
            there, said = tag in tags_of(scene), tag in found
            hits[:, number] += (there and said, said, there)
    f1 = 2 * hits[0] / np.maximum(1, hits[1] + hits[2])
    micro = float(2 * hits[0].sum() / (hits[1].sum() + hits[2].sum()))
    return {
        "micro_f1": micro,
        "macro_f1": float(f1.mean()),
        "watermark_f1": float(f1[adapter.tags.index("watermark")]),
    }
