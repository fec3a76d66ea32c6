"""The report stands alone, shows what it says, and lets no prompt write HTML."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from PIL import Image

from training.data.tables import TABLES
from training.evaluation import report, verdict
from training.evaluation.verdict import Protocol, Scores

EVIL = "\"><script>alert(1)</script><img src=http://evil/x onerror=alert(2)>' & {{7*7}}"


def side(folder, name, colour, count=34, shift=0.0):
    folder = folder / name
    folder.mkdir()
    samples, metrics = [], []
    for n in range(count):
        Image.fromarray(np.full((40, 60, 3), colour, np.uint8)).save(folder / f"{n}.png")
        group = "a" if n % 2 else EVIL
        samples.append(
            {"prompt_id": f"p{n:02d}" if n else EVIL, "text": f"{EVIL} {n}", "negative": "", "group": group, "seed": n,
             "height": 40, "width": 60, "file": f"{n}.png", "sha256": ""}
        )  # fmt: skip
        for metric, value in (("clip_score", 0.2 + n * shift), ("aesthetic", 5.0 + shift)):
            metrics.append(
                {
                    "prompt_id": samples[-1]["prompt_id"],
                    "group": group,
                    "metric": metric,
                    "value": value,
                    "embedding": None,
                }
            )
    return report.Side(
        checkpoint=name, folder=folder, samples=pl.DataFrame(samples, schema=TABLES["sample_images"].schema),
        metrics=pl.DataFrame(metrics, schema=TABLES["eval_metrics"].schema),
    )  # fmt: skip


@pytest.fixture
def sides(tmp_path):
    return [side(tmp_path, "base@0", (255, 0, 0)), side(tmp_path, "run@9", (0, 0, 255), shift=0.01)]


def verdicts_of(sides):
    protocol = Protocol(prompts="", sampling="", clip="", aesthetic="", dtype="")
    scores = [Scores(checkpoint=s.checkpoint, protocol=protocol, metrics=s.metrics) for s in sides]
    return verdict.compare(*scores, {"clip_score": 0.003, "aesthetic": 0.05})


class Reader(HTMLParser):
    """Collects what a browser would do with the page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_asks_nothing_of_the_network_and_runs_no_stranger_s_script(sides):
    html = report.render(EVIL, sides, verdicts_of(sides), {EVIL: [(0, 1.0), (10, 0.5)]}, {EVIL: EVIL})
    page = read(html)
    assert page.addresses == []
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.tags.count("input") == 34
    assert "default-src 'none'" in html
    assert any(EVIL in text for text in page.text)


def test_every_picture_is_there_once_and_shown_twice(sides):
    html = report.render("t", sides, verdicts_of(sides), {}, {})
    contents = re.findall(r"\.p(\d+)s(\d)\{background-image:url\(data:image/jpeg;base64,([^)]+)\)\}", html)
    assert len(contents) == 2 * 34
    for _, place, content in contents:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)
        assert picture.shape == (40, 60, 3)
        assert np.abs(picture[20, 30] - ((255, 0, 0) if place == "0" else (0, 0, 255))).max() < 12
    assert html.count('class="pic p0s0"') == html.count('class="pic p0s1"') == 2


def test_the_largest_gains_come_first_and_the_middle_is_left_out(sides):
    html = report.render("t", sides, verdicts_of(sides), {}, {}, max_prompts=4)
    changes = [float(value) for value in re.findall(r"CLIP <span class=\w+>([+-][\d.]+)", html)]
    assert changes == pytest.approx([0.33, 0.32, 0.01, 0.0])


def test_verdicts_and_curves_are_said_in_words(sides):
    html = report.render("t", sides, verdicts_of(sides), {"training loss": [(0, 2.0), (640, 0.5)]}, {"steps": 20})
    assert "<span class='chip better'>better</span>" in html
    assert "too few prompts" in html
    assert "0.5 to 2, last 0.5 at 640 samples" in html
    assert "steps: 20" in html
    bare = report.render("t", sides, TABLES["verdicts"].empty(), {"one point": [(0, 1.0)]}, {})
    assert "Verdict" not in bare
    assert "one point" not in bare


def test_a_missing_picture_leaves_a_gap_and_no_error(sides):
    (sides[1].folder / "3.png").unlink()
    html = report.render("t", sides, verdicts_of(sides), {}, {})
    assert len(re.findall(r"background-image:url", html)) == 2 * 34 - 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_draws_both_halves_of_a_slider(sides, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report.render("t", sides, TABLES["verdicts"].empty(), {}, {}))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900"]
    places = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    subprocess.run(["chromium", *options, *places, path.as_uri()], check=True, capture_output=True, timeout=120)
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    red = (np.abs(shot - (254, 0, 0)).max(axis=2) < 8).nonzero()
    blue = (np.abs(shot - (0, 0, 254)).max(axis=2) < 8).nonzero()
    # In every card the base is on the left and the checkpoint on the right, as large as each other.
    assert len(red[0]) > 10_000
    assert len(blue[0]) == pytest.approx(len(red[0]), rel=0.2)
    assert red[1].min() < blue[1].min()
    assert red[1].max() < blue[1].max()
