"""The demo's OWLv2: finds watermarks and shapes by name. transformers has no loss for it; here is a
small set loss."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

from demo import build_tokenizer
from demo.corpus import CLIP_MEAN, CLIP_STD, SEED, picture
from demo.progress import steps
from demo.saving import save_half, write_json
from demo.scenes import SHAPES, Scene
from training.annotators.detector import QUERY_LENGTH, Detector
from training.buckets.geometry import Box
from training.seeds import Purpose, integer, numpy_generator

NUM_IMAGES = 6000
NUM_STEPS = 4500
BATCH = 24
SIDE = 96
REPEATS = 3
"""Each truth is matched to this many patches: learns faster, and non-maximum suppression removes
the echoes."""
WATERMARK = "a watermark"
WATERMARK_WEIGHT = 3.0
"""Of the watermark's query in the naming loss: it is what the demo asks for."""
QUERIES = (WATERMARK, *(f"a {shape}" for shape in SHAPES), "a dog", "a person")
"""The last two are never there."""


class Truth(NamedTuple):
    """What is in one image: boxes (T, 4) as cx, cy, w, h of the padded square, and which query
    names each."""

    boxes: torch.Tensor
    queries: list[int]


def new_model(tokenizer: CLIPTokenizer) -> Owlv2ForObjectDetection:
    """An untrained detector of the demo's size (0.8 M parameters)."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": QUERY_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=64)
    )


@torch.no_grad()
def start_calmly(model: Owlv2ForObjectDetection) -> None:
    """First weights of the heads: boxes at their patches, few claims. transformers draws them with
    deviation 1."""
    for head in (model.class_head, model.box_head, model.objectness_head):
        for layer in (module for module in head.modules() if isinstance(module, torch.nn.Linear)):
            torch.nn.init.xavier_uniform_(layer.weight)
    last = (model.box_head.dense2, 0.0), (model.objectness_head.dense2, -4.0)
    scores = (model.class_head.logit_shift, -0.5), (model.class_head.logit_scale, 6.0)
    for layer, bias in (*last, *scores):
        layer.weight.zero_()
        layer.bias.fill_(bias)


def truth_of(scene: Scene, watermark: Box | None) -> Truth:
    """Boxes of the watermark and of every shape, relative to the square that the image is padded
    to."""
    height, width = scene.size
    found, queries = [], []
    if watermark is not None:
        y0, x0, y1, x1 = watermark
        found.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
        queries.append(0)
    for shape in scene.shapes:
        extent = 1.9 * shape.radius * min(height, width)
        found.append((shape.x * width, shape.y * height, extent, extent))
        queries.append(1 + SHAPES.index(shape.kind))
    return Truth(torch.tensor(found) / max(height, width), queries)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1
    )


def generalised_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """GIoU of (…, 4) boxes given as cx, cy, w, h, with broadcasting. Source: arXiv:1902.09630."""
    a, b = _corners(first), _corners(second)
    shared = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared
    return shared / union - (hull - union) / hull


def focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Focal loss per element, gamma 2, alpha 0.4 for what is there. Source: arXiv:1708.02002."""
    chance = torch.sigmoid(logits)
    missed = torch.where(target > 0, 1 - chance, chance)
    weight = torch.where(target > 0, 0.4, 0.6) * missed.square()
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


@torch.no_grad()
def match(logits: torch.Tensor, boxes: torch.Tensor, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest one-to-one assignment of patches (P) to truths (T, each REPEATS times): two
    index arrays."""
    chance = torch.sigmoid(logits[:, truth.queries])
    distance = torch.cdist(boxes, truth.boxes, p=1)
    overlap = generalised_iou(boxes[:, None], truth.boxes[None])
    cost = 5 * distance - 2 * overlap - 2 * chance
    patches, truths = linear_sum_assignment(cost.repeat(1, REPEATS).numpy())
    return patches, truths % len(truth.queries)


def set_loss(
    logits: torch.Tensor, objectness: torch.Tensor, boxes: torch.Tensor, truths: list[Truth]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Naming loss (queries and objectness) and box loss (L1 and GIoU) per true box, over a
    batch."""
    named, there = torch.zeros_like(logits), torch.zeros_like(objectness)
    made, wanted = [], []
    for image, truth in enumerate(truths):
        patches, chosen = match(logits[image], boxes[image], truth)
        named[image, patches, [truth.queries[i] for i in chosen]] = 1.0
        there[image, patches] = 1.0
        made.append(boxes[image, patches])
        wanted.append(truth.boxes[chosen])
    true, guessed = torch.cat(wanted), torch.cat(made)
    claims = focal(logits, named)
    claims[..., 0] *= WATERMARK_WEIGHT
    naming = (claims.sum() + focal(objectness, there).sum()) / len(true)
    placing = (
        5 * (guessed - true).abs().sum(-1).mean() + 2 * (1 - generalised_iou(guessed, true)).mean()
    )
    return naming, placing


def build(models: Path, num_steps: int = NUM_STEPS) -> None:
    """Train and save `models/owlv2`; prints recall, precision and IoU for watermarks on fresh
    images."""
    torch.manual_seed(integer(SEED, Purpose.INIT, "owlv2"))
    folder = models / "owlv2"
    tokenizer = build_tokenizer.build(folder, padding="!", max_length=QUERY_LENGTH)
    model = new_model(tokenizer)
    start_calmly(model)
    write_json(folder / "preprocessor_config.json", preprocessor())
    inputs, truths = _corpus(
        Detector(new_model(tokenizer), tokenizer, preprocessor(), WATERMARK, "cpu")
    )
    encoded = tokenizer(
        list(QUERIES), padding="max_length", max_length=QUERY_LENGTH, return_tensors="pt"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.08)
    rng = numpy_generator(SEED, Purpose.DEMO, "owlv2 batches")
    for step in (bar := steps(num_steps, "owlv2")):
        chosen = rng.choice(NUM_IMAGES, BATCH, replace=False)
        features = model.image_embedder(inputs[chosen].float())[0]
        flat = features.flatten(1, 2)
        text = model.owlv2.get_text_features(**encoded).pooler_output
        logits, _ = model.class_predictor(flat, text.expand(BATCH, -1, -1))
        boxes = model.box_predictor(flat, features)
        naming, placing = set_loss(
            logits, model.objectness_predictor(flat), boxes, [truths[i] for i in chosen]
        )
        optimizer.zero_grad()
        (naming + placing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        bar.note(naming=float(naming.detach()), placing=float(placing.detach()))
        if step % 300 == 299 or step + 1 == num_steps:
            save_half(model, folder)
    calibrate(folder)
    print("owlv2:", check(folder))


def calibrate(folder: Path, count: int = 250, threshold: float = 0.3) -> None:
    """Shift all logits so that the best confidence for watermarks (by F1, on images of its own)
    is `threshold`."""
    detector = Detector.load(folder, "cpu")
    claims, there = [], 0
    for index in range(count):
        _, image, box = picture("owlv2 calibration", index, watermark_share=0.4)
        there += box is not None
        for one in detector([np.asarray(image)])[0]:
            true = box is not None and iou(box, Box(one.y0, one.x0, one.y1, one.x1)) > 0.4
            claims.append((one.confidence, true))
    claims.sort(reverse=True)
    hits = np.cumsum([true for _, true in claims])
    best = int(np.argmax(2 * hits / (np.arange(1, len(hits) + 1) + there)))
    model = Owlv2ForObjectDetection.from_pretrained(folder, dtype=torch.float32)
    head = model.class_head
    found = np.log(claims[best][0] / (1 - claims[best][0]))
    with torch.no_grad():
        shift = (found - np.log(threshold / (1 - threshold))) / float(
            F.elu(head.logit_scale.bias) + 1
        )
        head.logit_shift.bias -= float(shift)
    save_half(model, folder)


def _corpus(detector: Detector) -> tuple[torch.Tensor, list[Truth]]:
    inputs, truths = torch.empty(NUM_IMAGES, 3, SIDE, SIDE, dtype=torch.float16), []
    for index in steps(NUM_IMAGES, "drawing owlv2"):
        scene, image, box = picture("owlv2", index, star_share=0.15, watermark_share=0.55)
        inputs[index] = detector.preprocess(np.asarray(image)).half()
        truths.append(truth_of(scene, box))
    return inputs, truths


def preprocessor() -> dict[str, object]:
    """OWLv2's `preprocessor_config.json` for the demo's size."""
    return {
        "image_processor_type": "Owlv2ImageProcessor",
        "processor_class": "Owlv2Processor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_pad": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def check(folder: Path, count: int = 300, threshold: float = 0.3) -> dict[str, float]:
    """Recall and precision (a hit overlaps by IoU > 0.4) and mean IoU of hits for watermarks on
    fresh images."""
    detector = Detector.load(folder, "cpu")
    hits, said, there, overlaps = 0, 0, 0, []
    for index in range(count):
        _, image, box = picture("owlv2 check", index, watermark_share=0.4)
        found = [one for one in detector([np.asarray(image)])[0] if one.confidence > threshold]
        said += len(found)
        there += box is not None
        if box is not None and found:
            best = max(iou(box, Box(one.y0, one.x0, one.y1, one.x1)) for one in found)
            hits += best > 0.4
            overlaps += [best] if best > 0.4 else []
    return {
        "recall": hits / there,
        "precision": hits / max(1, said),
        "iou": float(np.mean(overlaps or [0.0])),
    }


def iou(first: Box, second: Box) -> float:
    """Intersection over union."""
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    shared = max(0.0, height) * max(0.0, width)
    areas = sum((box.y1 - box.y0) * (box.x1 - box.x0) for box in (first, second))
    return shared / (areas - shared)
