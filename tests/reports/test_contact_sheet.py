"""The grid puts every image in its place and stays below its size."""

import io

import numpy as np
from PIL import Image

from training.reports import contact_sheet
from training.reports.contact_sheet import MAX_BYTES, Row, grid


def test_images_stand_in_the_cell_of_their_prompt_and_checkpoint():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), None]]
    rows = [
        Row(
            title=f"p{number}", text="a prompt that wraps over several lines beside its images",
            images=[None if c is None else np.full((32, 32, 3), c, np.uint8) for c in line],
        )
        for number, line in enumerate(colours)
    ]  # fmt: skip
    sheet = np.asarray(
        Image.open(io.BytesIO(grid(rows, ["base@0", "run@9"], cell_px=100))).convert("RGB")
    ).astype(int)
    left, top = 16 + 190, 16 + 26
    assert sheet.shape == (top + 2 * 108 + 16, left + 2 * 108 + 16, 3)
    for number, line in enumerate(colours):
        for column, colour in enumerate(line):
            found = sheet[top + number * 108 + 20, left + column * 108 + 80]
            assert np.abs(found - (colour or (243, 244, 246))).max() < 12


def test_captions_get_room_and_hostile_text_is_only_drawn():
    row = Row(
        title="../x\n" * 50,
        text="<script>" + "w" * 5000,
        images=[np.zeros((9, 90, 3), np.uint8)],
        captions=["é 猫" * 99],
    )
    with Image.open(io.BytesIO(grid([row], ["n" * 500], cell_px=64))) as image:
        assert image.height == 16 + 26 + 72 + 16 + 16


def test_a_large_grid_gives_way_in_quality_and_size(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        Row(title="t", text="x", images=[rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)] * 3)
        for _ in range(6)
    ]
    whole = grid(rows, ["a", "b", "c"])
    assert len(whole) <= MAX_BYTES
    monkeypatch.setattr(contact_sheet, "MAX_BYTES", len(whole) // 4)
    assert len(grid(rows, ["a", "b", "c"])) <= len(whole) // 4
