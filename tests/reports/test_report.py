"""The report stands alone, shows what it says, stays small, and lets no prompt write HTML."""

import base64
import io
import pathlib
import re
import subprocess
import sys
import zipfile
from html import escape
from html.parser import HTMLParser

import jinja2
import numpy as np
import polars as pl
import pytest
from browser import chromium, needs_chromium
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from training.evaluation import verdict
from training.evaluation.verdict import Protocol, Scores
from training.reports import images, report
from training.reports.charts import Chart, Line, Map
from training.reports.report import Exhibit, Section
from training.reports.scores import Side
from training.tables.schemas import TABLES

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVIL = "\"><script>alert(1)</script><img src=http://evil/x onerror=alert(2)>' & {{7*7}}"
RULE = re.compile(r"\.(\w+)\{background-image:url\(data:image/webp;base64,([^)]+)\)\}")


def side(folder, name, colour, count=34, shift=0.0, evil=EVIL):
    """A checkpoint of one colour, whose CLIP score rises with the prompt's number and whose
    aesthetic falls."""
    folder = folder / name
    folder.mkdir()
    samples, metrics = [], []
    for n in range(count):
        Image.fromarray(np.full((40, 60, 3), colour, np.uint8)).save(folder / f"{n}.png")
        group = "a" if n % 2 else evil
        samples.append(
            {"prompt_id": f"p{n:02d}" if n else evil, "text": f"{evil} {n}", "negative": "", "group": group, "seed": n,
             "height": 40, "width": 60, "file": f"{n}.png", "sha256": ""}
        )  # fmt: skip
        for metric, value in (("clip_score", 0.2 + n * shift), ("aesthetic", 5.0 - n * shift)):
            row = {
                "prompt_id": samples[-1]["prompt_id"],
                "group": group,
                "metric": metric,
                "value": value,
            }
            metrics.append(row)
    return Side(
        checkpoint=name, folder=folder, samples=pl.DataFrame(samples, schema=TABLES["sample_images"].schema),
        metrics=TABLES["eval_metrics"].empty().vstack(
            pl.DataFrame(metrics, schema_overrides={"value": pl.Float64}).select(
                **{
                    name: pl.col(name) if name in metrics[0] else pl.lit(None, dtype)
                    for name, dtype in TABLES["eval_metrics"].schema.items()
                }
            )
        ),
    )  # fmt: skip


@pytest.fixture
def sides(tmp_path):
    return [
        side(tmp_path, "base.0@0", (255, 0, 0)),
        side(tmp_path, "run@9", (0, 0, 255), shift=0.01),
    ]


@pytest.fixture
def calm(tmp_path):
    colours = {"base.0@0": (255, 0, 0), "run@4": (0, 255, 0), "run@9": (0, 0, 255)}
    return [
        side(tmp_path, name, colour, shift=0.005 * n, evil="odd")
        for n, (name, colour) in enumerate(colours.items())
    ]


def verdicts_of(sides):
    protocol = Protocol(prompts="", sampling="", clip="", aesthetic="", dtype="")
    scores = [
        Scores(checkpoint=s.checkpoint, protocol=protocol, metrics=s.metrics)
        for s in (sides[0], sides[-1])
    ]
    return verdict.compare(*scores, {"clip_score": 0.003, "aesthetic": 0.05})


class Reader(HTMLParser):
    """Collects what a browser would do with the page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text, self.labels = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "action", "data")
        ]
        self.labels += [value for name, value in attributes if name == "aria-label"]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_asks_nothing_of_the_network_and_runs_no_stranger_s_script(sides):
    shown = Exhibit(images=[np.zeros((8, 8, 3), np.uint8)], caption=EVIL)
    html = report.render(
        EVIL, sides, verdicts_of(sides), {EVIL: EVIL},
        charts=[Chart(title=EVIL, lines=[Line(name=EVIL, points=[(0, 1.0), (10, 0.5)])])],
        maps=[Map(title=EVIL, note=EVIL, columns=[0, 1], rows={EVIL: [1.0, 2.0]})],
        sections=[Section(title=EVIL, text=EVIL, exhibits=[shown])],
    )  # fmt: skip
    page = read(html)
    assert all(address.startswith("#h") for address in page.addresses)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "default-src 'none'" in html
    assert "script-src 'sha256-" in html
    assert "unsafe-inline'; script" in html
    assert sum(EVIL[:20] in text for text in page.text) > 40


@settings(max_examples=30, deadline=None)
@given(title=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80))
@example(title=EVIL[:80])
@example(title="{% raw %}{{ 7 * 7 }}{# & #}&amp;&#34;")
def test_any_text_is_read_as_it_was_written(title):
    page = report.page.render("section", section=Section(title="", text=title), exhibit_images=[])
    assert "".join(read(page).text).strip("\n") == title
    chart = Chart(title=title, lines=[Line(name="n", points=[(0, 1.0), (1, 2.0)])])
    reader = read(report.draw_chart(chart))
    assert "".join(reader.text).startswith(title)
    assert reader.labels == [title]


def test_a_template_that_names_an_unknown_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'charts' is undefined"):
        report.page.render("training", maps=[])


def test_every_template_is_filled_in_and_leaves_nothing_of_its_own(sides):
    """No template is forgotten, and no tag of Jinja's is left in the page."""
    folder = ROOT / "training" / "reports" / "templates"
    chart = Chart(title="c", lines=[Line(name="n", points=[(0, 1.0), (1, 2.0)])])
    shown = Map(title="m", note="", columns=[0, 1], rows={"r": [1.0, 2.0]})
    html = report.render("t", sides, verdicts_of(sides), {}, charts=[chart], maps=[shown])
    without = html.replace(escape(EVIL), "")
    for mark in ("{{", "{%", "{#"):
        assert mark not in without
    loaded = {pathlib.PurePath(str(name)).name for _, name in report.page._ENVIRONMENT.cache}
    report.page.render("section", section=Section(title="", text=""), exhibit_images=[])
    loaded |= {"section.html.j2", "report.css", "report.js"}
    assert loaded == {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_the_wheel_holds_the_templates(tmp_path):
    """`make wheel` is what other machines install."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    folder = ROOT / "training" / "reports" / "templates"
    own = {f"training/reports/templates/{path.name}" for path in folder.iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        assert own <= set(archive.namelist())


def test_every_image_is_there_once_for_slider_grid_and_zoom(sides):
    html = report.render("t", sides, verdicts_of(sides), {})
    contents = RULE.findall(html)
    assert len(contents) == len({name for name, _ in contents}) == 2 * 34
    for name, content in contents:
        picture = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
        ).astype(int)
        assert picture.shape == (40, 60, 3)
        assert (
            np.abs(picture[20, 30] - ((255, 0, 0) if name.endswith("s0") else (0, 0, 255))).max()
            < 12
        )
        assert f'<button class="pic {name}" data-name={name} ' in html


def test_winners_and_losers_of_each_metric_come_with_the_largest_change_first(sides):
    html = report.render("t", sides, verdicts_of(sides), {})
    parts = re.split(r"<h3>Largest (\w+) in ([\w ]+)</h3>", html)[1:]
    found = {}
    for word, metric, content in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        own = content.partition("<h2")[0]
        found[metric, word] = [
            float(x) for x in re.findall(rf"{metric} <span class=\w+>([+-][\d.]+)", own)
        ]
    assert found == {
        ("CLIP score", "gains"): [0.33, 0.32, 0.31, 0.3],
        ("LAION aesthetic", "losses"): [-0.33, -0.32, -0.31, -0.3],
    }


def test_a_metric_that_only_verdicts_know_is_shown_like_the_others(sides):
    new = {"metric": pl.lit("pick_score")}
    sides = [
        Side(
            checkpoint=s.checkpoint, samples=s.samples, folder=s.folder,
            metrics=pl.concat([s.metrics, s.metrics.filter(pl.col("metric") == "aesthetic").with_columns(**new)]),
        )
        for s in sides
    ]  # fmt: skip
    verdicts = verdicts_of(sides)
    verdicts = pl.concat(
        [verdicts, verdicts.filter(pl.col("metric") == "aesthetic").with_columns(**new)]
    )
    html = report.render("t", sides, verdicts, {})
    assert html.index("gains in CLIP score") < html.index("losses in LAION aesthetic")
    assert html.index("losses in LAION aesthetic") < html.index("losses in pick score")
    assert html.count("pick score: gains first") == 1


def test_verdicts_are_said_in_words_and_drawn(sides):
    html = report.render("t", sides, verdicts_of(sides), {"steps": 20})
    assert "<span class='chip better'>better</span>" in html
    assert "<span class='chip worse'>worse</span>" in html
    assert "too few prompts" in html
    assert (
        html.count("<svg class=interval") == 2 + 6
    )  # two headlines, and a row per metric and group
    assert "steps: 20" in html
    bare = report.render("t", sides, TABLES["verdicts"].empty(), {})
    assert "Verdict" not in bare
    assert "Training" not in bare
    assert "largest gains in clip score" in bare.lower()


def test_verdicts_over_all_prompts_come_first(sides):
    verdicts = verdicts_of(sides).with_columns(group=pl.col("group").replace("a", "aa"))
    found = re.findall(
        r"<tr><td>([^<]+)</td><td>([^<]+)</td><td><span class='chip",
        report.render("t", sides, verdicts, {}),
    )
    assert found[:2] == [("CLIP score", "all"), ("LAION aesthetic", "all")]
    assert len(found) == 6


def test_groups_have_their_means_on_every_side(calm):
    html = report.render("t", calm, verdicts_of(calm), {})
    # Odd numbers 1 ... 33 have the mean 17, all have 16.5; the last side's score is 0.2 + n / 100.
    assert (
        "<tr><td>a</td><td class=number>17</td><td class=number>0.2000</td><td class=number>0.2850</td>"
        "<td class=number>0.3700</td><td class='number up'>+0.1700</td></tr>" in html
    )
    assert "<td>all</td><td class=number>34</td>" in html


def test_missing_images_and_scores_leave_gaps_and_no_error(sides):
    (sides[1].folder / "3.png").unlink()
    whole = (sides[0].folder / "6.png").read_bytes()
    (sides[0].folder / "6.png").write_bytes(whole[: len(whole) // 2])
    holes = pl.when(pl.col("prompt_id") == "p05").then(float("nan")).otherwise("value")
    file = pl.when(pl.col("prompt_id") != "p07").then("file")  # not drawn
    sides[1] = Side(
        checkpoint="run@9", folder=sides[1].folder, metrics=sides[1].metrics.with_columns(value=holes),
        samples=sides[1].samples.filter(pl.col("prompt_id") != "p04").with_columns(file),
    )  # fmt: skip
    html = report.render("t", sides, TABLES["verdicts"].empty(), {"steps": 20})
    assert len(RULE.findall(html)) == 2 * 34 - 4
    assert html.count("no image") == 4
    assert (
        "steps: 20 · images that are missing or damaged: 2, run foundry verify --repair</p>" in html
    )
    assert ">nan" not in html.lower()


def test_a_checkpoint_of_which_nothing_was_drawn_can_be_shown(sides):
    gone = {"value": pl.lit(None, pl.Float64), "metric": pl.lit("failed")}
    sides[1] = Side(
        checkpoint="run@9", folder=sides[1].folder, metrics=sides[1].metrics.with_columns(**gone),
        samples=sides[1].samples.with_columns(file=pl.lit(None, pl.String)),
    )  # fmt: skip
    html = report.render("t", sides, TABLES["verdicts"].empty(), {})
    assert html.count("no image") == len(RULE.findall(html)) == 34
    assert "missing or damaged" not in html


def test_of_many_checkpoints_the_first_the_last_and_some_between_are_shown(sides):
    many = [sides[0], *[sides[1]] * 20, sides[0]]
    html = report.render("t", many, TABLES["verdicts"].empty(), {})
    assert re.findall(r"<th title='([^']+)'", html) == ["base.0@0", *["run@9"] * 6, "base.0@0"]


@pytest.mark.slow
def test_256_prompts_of_5_checkpoints_stay_below_10_mb_and_no_prompt_beyond_is_shown(tmp_path):
    # Noise is what a JPEG holds worst; texts and names are as long and as full of quotes as they
    # can be.
    rng = np.random.default_rng(0)
    names = [("base.0@0" if n == 0 else f"run@{n}") for n in range(5)]
    made = [
        side(tmp_path, name, (0, 0, 0), count=300, shift=n / 1e4, evil='"' * 900)
        for n, name in enumerate(names)
    ]
    noise = [Image.fromarray(rng.integers(0, 256, (176, 176, 3), dtype=np.uint8)) for _ in range(2)]
    for n, one in enumerate(made):
        noise[n % 2].save(one.folder / "0.png", compress_level=1)
        for number in range(1, 300):
            (one.folder / f"{number}.png").unlink()
            (one.folder / f"{number}.png").hardlink_to(one.folder / "0.png")
    pictures = [
        Exhibit(images=[np.asarray(image) for image in noise], caption="x") for _ in range(10)
    ]
    html = report.render(
        "t",
        made,
        verdicts_of(made),
        {},
        sections=[Section(title="copies", text="", exhibits=pictures)],
    )
    assert len(html.encode()) <= report.MAX_BYTES
    images_take = sum(len(rule[0]) for rule in RULE.finditer(html))
    assert 1_500_000 < images_take <= images.ROOM
    assert len(html.encode()) - images_take <= report.MAX_BYTES - images.ROOM
    assert "256 of 300 prompts" in html
    assert len(RULE.findall(html)) == 5 * 256 + 20
    in_sliders = max(RULE.findall(html), key=lambda item: len(item[1]))
    assert max(Image.open(io.BytesIO(base64.b64decode(in_sliders[1]))).size) == 176


def click(page, selector, number=0):
    page.driver.execute_script(
        "document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number
    )


@needs_chromium
def test_a_browser_shows_slides_zooms_sorts_and_asks_for_nothing(calm, tmp_path):
    path = tmp_path / "report.html"
    chart = Chart(
        title="loss",
        lines=[Line(name="held out", points=[(0, 1.0), (10, 0.5), (20, 0.7)])],
        marks=[10],
    )
    path.write_text(report.render("Run", calm, verdicts_of(calm), {}, charts=[chart]))
    with chromium(1100, 900) as page:
        page.open(path.as_uri())
        shot = look(page, tmp_path)
        red, blue = (where(shot, colour) for colour in ((254, 0, 0), (0, 0, 254)))
        # In every slider the base is on the left and the checkpoint on the right, as large as each
        # other.
        assert len(red[0]) > 10_000
        assert len(blue[0]) == pytest.approx(len(red[0]), rel=0.1)
        assert red[1].min() < blue[1].min()

        script = "const i = document.querySelector('.pair input'); i.value = 100; "
        page.driver.execute_script(script + "i.dispatchEvent(new Event('input', {bubbles: true}))")
        moved = look(page, tmp_path)
        assert len(where(moved, (254, 0, 0))[0]) > len(red[0]) + 5_000

        click(page, ".grid .pic", 1)  # the middle checkpoint of the first prompt
        page.wait(
            lambda: page.driver.execute_script("return document.querySelector('dialog').open"),
            "the zoom",
        )
        assert "run@4" in page.text()
        assert len(where(look(page, tmp_path), (0, 255, 1))[0]) > 100_000
        click(page, "#right")
        assert len(where(look(page, tmp_path), (0, 0, 254))[0]) > 100_000
        click(page, "#close")

        order = "const s = document.querySelector(arguments[0]); s.value = arguments[1]; "
        order += "s.dispatchEvent(new Event('change')); return [...document.querySelectorAll('.grid tr[data-group]')]"
        order += ".filter(r => !r.hidden).map(r => r.querySelector('.ask').textContent)"
        assert page.driver.execute_script(order, "#order", "0")[:2] == ["odd 33", "odd 32"]
        assert page.driver.execute_script(order, "#group", "1")[:2] == ["odd 32", "odd 30"]

        assert page.errors() == []
        assert (
            page.driver.execute_script("return performance.getEntriesByType('resource').length")
            == 0
        )
        page.resize(390, 800)
        width = "return document.documentElement.scrollWidth"
        assert page.driver.execute_script(width) <= 390


@needs_chromium
def test_a_sandboxed_frame_shows_and_zooms_as_well(calm, tmp_path):
    """MLflow shows pages in such a frame, where links to places of the page would leave it."""
    html = report.render("Run", calm, verdicts_of(calm), {})
    (tmp_path / "frame.html").write_text(
        f'<iframe sandbox="allow-scripts" style="width:1000px;height:800px" srcdoc="{escape(html)}"></iframe>'
    )
    with chromium(1040, 860) as page:
        page.open((tmp_path / "frame.html").as_uri())
        page.driver.switch_to.frame(0)
        page.wait_for_text("Winners and losers")
        above = "return document.querySelector('#h3').getBoundingClientRect().top"
        assert page.driver.execute_script(above) > 800
        click(page, "nav a", 3)
        page.wait(lambda: page.driver.execute_script(above) < 700, "the verdict in view")
        click(page, ".grid .pic", 0)
        page.wait(
            lambda: page.driver.execute_script("return document.querySelector('dialog').open"),
            "the zoom",
        )
        assert page.errors() == []


def look(page, tmp_path):
    page.screenshot(tmp_path / "shot.png")
    return np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)


def where(shot, colour):
    return (np.abs(shot - colour).max(axis=2) < 8).nonzero()
