"""The demo's two judges of quality on top of its CLIP: the aesthetic head, and the heads used
without judgements."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch.nn import functional as F

from demo.corpus import SEED, picture
from demo.progress import steps
from demo.trouble import draw_junk
from training.annotators import aesthetic
from training.annotators.clip import Clip
from training.annotators.quality_head import QualityModel, fit_junk, fit_utility
from training.config.workspace import QualityConfig
from training.seeds import Purpose, generator, integer

NUM_IMAGES = 3000
NUM_JUNK = 500
NUM_PAIRS = 9000
WIDTHS = (64, 32, 16, 8, 1)
"""Layers of the aesthetic head, as LAION's 1024-128-64-16-1."""


def embed(clip: Clip, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Class tokens (N, 128) before the final norm, and unit embeddings (N, 64)."""
    rows = [
        row
        for start in range(0, len(images), 64)
        for row in clip([np.asarray(i) for i in images[start : start + 64]])
    ]
    return np.stack([row.cls for row in rows]), np.stack([row.embedding for row in rows])


def corpus(split: str, count: int) -> tuple[list[Image.Image], np.ndarray]:
    """Fresh images and their true quality."""
    images, quality = [], []
    for index in steps(count, f"drawing {split}"):
        scene, image, _ = picture(split, index, star_share=0.2)
        images.append(image)
        quality.append(float(scene.quality))
    return images, np.array(quality)


def fit_aesthetic(embeddings: np.ndarray, quality: np.ndarray) -> aesthetic.AestheticHead:
    """The five linear layers, fitted by least squares and full batches."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "aesthetic"))
    head = aesthetic.AestheticHead(embeddings.shape[1], WIDTHS).eval()
    inputs, wanted = torch.from_numpy(embeddings).float(), torch.from_numpy(quality).float()
    with torch.no_grad():
        head.get_parameter("layers.7.bias").fill_(5.0)
    num_steps = 1500
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.mse_loss(head(inputs), wanted).backward()
        optimizer.step()
        lr_scheduler.step()
    return head


def fit_quality(tokens: np.ndarray, quality: np.ndarray, junk: np.ndarray) -> QualityModel:
    """Utility by pairs of images (the better one wins, near equals tie), junk by label; cut
    points of the corpus."""
    rng = generator(SEED, Purpose.DEMO, "head pairs")
    pairs = [rng.sample(range(len(tokens)), 2) for _ in range(NUM_PAIRS)]
    first, second = np.array(pairs).T
    target = np.sign(quality[first] - quality[second]) / 2 + 0.5
    names = [f"corpus-{index}" for index in range(len(tokens))]
    utility, report = fit_utility(
        tokens[first],
        tokens[second],
        target,
        ids_a=[names[i] for i in first],
        ids_b=[names[i] for i in second],
        seed=SEED,
    )
    print("quality head:", report)
    is_junk = np.array([False] * len(tokens) + [True] * len(junk))
    ids = [*names, *(f"junk-{index}" for index in range(len(junk)))]
    junk_head, report = fit_junk(np.concatenate([tokens, junk]), is_junk, ids=ids, seed=SEED)
    print("junk head:", report)
    pool = np.array([row.utility for row in QualityModel(utility, junk_head, (), "cpu")(tokens)])
    return QualityModel(
        utility, junk_head, np.quantile(pool, np.cumsum(QualityConfig().shares)[:-1]), "cpu"
    )


def build(models: Path) -> None:
    """Fit and save `models/aesthetic` and `models/quality_head` on the finished CLIP; prints how
    well they judge."""
    clip = Clip.load(models / "clip", "cpu")
    images, quality = corpus("heads", NUM_IMAGES)
    tokens, embeddings = embed(clip, images)
    junk, _ = embed(
        clip, [draw_junk(SEED, "heads", index) for index in steps(NUM_JUNK, "drawing junk")]
    )
    aesthetic.save(models / "aesthetic", fit_aesthetic(embeddings, quality))
    fit_quality(tokens, quality, junk).save(models / "quality_head")
    print("heads:", check(models))


def check(models: Path, count: int = 300) -> dict[str, float]:
    """Spearman correlation of both judges with true quality on fresh images, and junk recall and
    false alarms."""
    clip = Clip.load(models / "clip", "cpu")
    images, quality = corpus("heads check", count)
    tokens, embeddings = embed(clip, images)
    junk, _ = embed(clip, [draw_junk(SEED, "heads check", index) for index in range(60)])
    scores = aesthetic.Aesthetic.load(models / "aesthetic", "cpu")(embeddings)
    model = QualityModel.load(models / "quality_head", "cpu")
    rows, junk_rows = model(tokens), model(junk)
    alarms = [row.junk_probability is not None and row.junk_probability > 0.5 for row in rows]
    found = [row.junk_probability is not None and row.junk_probability > 0.5 for row in junk_rows]
    return {
        "aesthetic_spearman": float(spearmanr(scores, quality).statistic),
        "aesthetic_min": min(scores),
        "aesthetic_max": max(scores),
        "utility_spearman": float(spearmanr([row.utility for row in rows], quality).statistic),
        "junk_recall": float(np.mean(found)),
        "junk_false_alarms": float(np.mean(alarms)),
    }
