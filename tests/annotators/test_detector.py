"""OWLv2: our pixels equal transformers', our boxes lie in the image and nowhere else."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from training.annotators.detector import CONFIDENCE_FLOOR, Box, Detector, suppress
from training.errors import ModelError


@pytest.fixture(scope="module")
def detector(owlv2_folder):
    return Detector.load(owlv2_folder, "cpu")


@pytest.mark.parametrize(
    "size",
    [
        (96, 96),
        (480, 640),
        (640, 480),
        (97, 95),
        (50, 70),
        (300, 7),
        (7, 300),
        (2, 1),
        (1, 1),
        (1000, 333),
    ],
)
def test_pixels_equal_transformers(detector, noise_image, size):
    image = noise_image(*size)
    processor = Owlv2ImageProcessorPil(size={"height": 96, "width": 96})
    inputs = processor(image, return_tensors="pt", input_data_format="channels_last")
    torch.testing.assert_close(
        detector.preprocess(image), inputs.pixel_values[0], atol=1e-5, rtol=0
    )


def test_boxes_are_mapped_from_the_padded_square_by_hand(detector):
    # An image 50 high and 100 wide lies in the upper half of a square of 100 x 100.
    boxes = torch.tensor([[
        [0.5, 0.25, 0.2, 0.1],    # the middle of the image
        [0.9, 0.45, 0.4, 0.3],    # over the right and the lower border: clamped
        [0.5, 0.8, 0.2, 0.2],     # in the padding: dropped
        [0.1, 0.1, 0.1, 0.1],     # too faint
        [-0.2, 0.25, 0.1, 0.1],   # left of the image: dropped
    ]])  # fmt: skip
    confidences = torch.tensor([[0.6, 0.9, 0.99, 0.04, 0.7]])
    (row,) = detector.postprocess(confidences, boxes, [(50, 100)])
    expected = [
        Box(y0=30, x0=70, y1=50, x1=100, confidence=0.9),
        Box(y0=20, x0=40, y1=30, x1=60, confidence=0.6),
    ]
    for box, want in zip(row, expected, strict=True):
        for name in ("y0", "x0", "y1", "x1", "confidence"):
            assert getattr(box, name) == pytest.approx(getattr(want, name), abs=1e-4), name


@given(
    values=st.lists(st.tuples(*[st.floats(-0.5, 1.5)] * 4, st.floats(0, 1)), max_size=12),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
)
def test_every_box_lies_in_the_image(detector_for_boxes, values, height, width):
    table = torch.tensor(values, dtype=torch.float32).reshape(1, -1, 5)
    (row,) = detector_for_boxes.postprocess(table[:, :, 4], table[:, :, :4], [(height, width)])
    for box in row:
        assert 0 <= box.y0 < box.y1 <= height
        assert 0 <= box.x0 < box.x1 <= width
        assert box.confidence > CONFIDENCE_FLOOR
    assert [box.confidence for box in row] == sorted((box.confidence for box in row), reverse=True)


@pytest.fixture(scope="module")
def detector_for_boxes(owlv2_folder):
    return Detector.load(owlv2_folder, "cpu")


def test_suppression_by_hand():
    boxes = np.array(
        [[0, 0, 10, 10], [0, 0, 10, 6], [0, 5, 10, 15], [20, 20, 30, 30], [0, 0, 10, 10]], float
    )
    confidences = np.array([0.9, 0.8, 0.7, 0.95, 0.9])
    # IoU with box 0: 0.6 (gone), 1/3 (stays), 0, 1 (gone: equal confidence, later).
    assert suppress(boxes, confidences) == [3, 0, 2]
    assert suppress(boxes, confidences, max_iou=0.3) == [3, 0]
    assert suppress(np.zeros((0, 4)), np.zeros(0)) == []


def test_suppression_agrees_with_the_definition():
    generator = np.random.default_rng(0)
    corner, size = generator.uniform(0, 20, (60, 2)), generator.uniform(2, 12, (60, 2))
    boxes, confidences = np.concatenate([corner, corner + size], 1), generator.permutation(60) / 60
    kept = []
    for i in np.argsort(-confidences):
        overlaps = []
        for j in kept:
            low, high = (
                np.maximum(boxes[i, :2], boxes[j, :2]),
                np.minimum(boxes[i, 2:], boxes[j, 2:]),
            )
            shared = np.prod(np.maximum(high - low, 0))
            overlaps.append(shared / (np.prod(size[i]) + np.prod(size[j]) - shared))
        if all(overlap <= 0.5 for overlap in overlaps):
            kept.append(i)
    assert suppress(boxes, confidences) == kept
    assert len(kept) < 60


def test_the_forward_pass_equals_transformers(detector, noise_image):
    images = [noise_image(96, 96, seed=1), noise_image(50, 80, seed=2)]
    batch = torch.stack([detector.preprocess(image) for image in images])
    confidences, boxes = detector.forward(batch)
    tokens = detector.query_ids
    with torch.inference_mode():
        alone = detector.model(
            pixel_values=batch[1:], input_ids=tokens, attention_mask=detector.query_mask
        )
    assert confidences.shape == (2, 36)
    torch.testing.assert_close(
        confidences[1], torch.sigmoid(alone.logits[0, :, 0]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(boxes[1], alone.pred_boxes[0], atol=1e-6, rtol=0)
    results = Owlv2ImageProcessorPil().post_process_object_detection(
        alone, CONFIDENCE_FLOOR, [(50, 80)]
    )[0]
    found = detector(images)[1]
    best = results["scores"].argmax()
    x0, y0, x1, y1 = results["boxes"][best].tolist()
    clamped = (max(y0, 0), max(x0, 0), min(y1, 50), min(x1, 80))
    if clamped[2] > clamped[0] and clamped[3] > clamped[1]:
        assert (found[0].y0, found[0].x0, found[0].y1, found[0].x1) == pytest.approx(
            clamped, abs=1e-3
        )
    assert found


def test_a_preprocessor_of_another_size_is_refused(owlv2_folder, tmp_path):
    folder = shutil.copytree(owlv2_folder, tmp_path / "owlv2")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 960, "width": 960}})
    )
    with pytest.raises(ModelError, match="reads 96x96"):
        Detector.load(folder, "cpu")


def test_missing_weights_say_where_they_come_from(tmp_path):
    with pytest.raises(ModelError, match="hf download google/owlv2-base-patch16-ensemble"):
        Detector.load(tmp_path, "cpu")
