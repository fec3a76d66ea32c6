"""The seeded views as people see them: three runs in a served workspace, each view opened in
Chromium and looked at."""

import pytest
from browser import Page, chromium, needs_chromium
from mlflow_world import PROMPTS, RUNS, fill, served

from resources.mlflow.colors import COLORS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs_chromium,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]

HIGH = """return [...document.images].filter(e => e.complete && e.naturalWidth > 1)
    .filter(e => e.getBoundingClientRect().height >= 100).length"""
"""How many images are large enough to look at."""
LEFT = """return [...document.images].filter(e => e.closest('.ag-row')).map(e => [e.getBoundingClientRect(),
    e.closest('.ag-row').getBoundingClientRect()]).filter(([b, row]) => b.height >= 100 && row.height > 0)
    .map(([b, row]) => row.bottom - b.top - b.height / 2)"""
"""Of each image in a table, how much of its row is left below the upper half of its square,
px."""
FRAME = "return [...document.querySelectorAll('iframe')].length > 0"
LINES = "return document.querySelectorAll('.scatterlayer path.js-line').length"

ASSISTANT = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}
"""What the browser remembers of a person who has closed MLflow's assistant once; it takes a third
of the page."""


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Addresses of the views of a workspace with three runs and their base, while it is served."""
    home = tmp_path_factory.mktemp("views") / "space"
    home.mkdir()
    tracking = fill(home)
    with served(home) as url:
        yield {name: url + link.removeprefix("/mlflow") for name, link in tracking.views().items()}


@pytest.fixture(scope="module")
def page(views):
    with chromium(1600, 1000) as page:
        page.open(next(iter(views.values())).partition("/#")[0] + "/robots.txt")
        for name, value in ASSISTANT.items():
            page.driver.execute_script(
                "localStorage.setItem(arguments[0], arguments[1])", name, value
            )
        yield page


def look(page: Page, address: str, *texts: str) -> str:
    """Open a view; returns what it says once it says `texts`."""
    page.open("about:blank")
    page.open(address)
    page.wait(lambda: all(text in words(page) for text in texts), f"{texts}", 120)
    assert "Error loading shared view" not in words(page)
    return words(page)


def words(page: Page) -> str:
    """What the page says, in one line."""
    return " ".join(page.text().split())


def test_the_table_has_what_matters_and_the_best_run_first(page, views):
    shown = look(
        page, views["Runs, best images first"], "4 matching runs", "two-colours", "Sort: eval/"
    )
    shown = shown.partition("Run Name")[2]
    places = [
        shown.index(name) for name in ("two-colours", "first ", "slow-rate", "base model sdxl")
    ]
    assert places == sorted(places)
    for column in (
        "Created",
        "learning_rate",
        "foundry.champion",
        "verdict",
        "eval/aesthetic_mean",
    ):
        assert column in shown
    assert "at 60000 samples" in shown
    assert shown.count("better") == 4
    assert shown.count("unclear") == 2


def test_the_root_opens_on_the_runs_without_tour_assistant_and_telemetry(views):
    root = next(iter(views.values())).partition("/#")[0]
    with chromium(1600, 1000) as page:  # of somebody who has never been here
        for address in (f"{root}/", f"{root}/#/experiments"):
            page.open("about:blank")
            page.open(address)
            if address.endswith("experiments"):
                page.wait_for_text("space", "foundry.workspace")
                page.click("space")
            page.wait_for_text("two-colours", "foundry.champion", "verdict", "4 matching runs")
            assert "/runs?" in page.driver.current_url
            for text in (
                "Welcome to MLflow",
                "Assistant",
                "shared view",
                "Overview",
                "UI telemetry",
            ):
                assert text not in page.text()
            offered = (
                "return [...document.querySelectorAll('[data-assistant-ui]')]"
                ".some(e => e.getClientRects().length)"
            )
            assert not page.driver.execute_script(offered)
        page.open("about:blank")
        page.open(f"{root}/#/settings")
        page.wait_for_text("Enable telemetry", "Off")


def test_a_runs_page_leads_to_its_report(views, page):
    look(page, views["Runs, best images first"], "two-colours", "4 matching runs")
    page.click("two-colours")
    page.wait_for_text("About this run", "Links:", "Verdict: two-colours@60000")
    links = page.driver.execute_script(
        """return [...document.querySelectorAll('a')]
            .filter(e => ['report', 'Dagster run 12345678'].includes(e.innerText)).map(e => e.href)"""
    )
    assert [link.partition("/artifacts/")[2] for link in links] == [
        "evaluation/000060000/report.html",
        "",
    ]
    assert links[1].endswith("/dagster/runs/12345678-abcd")
    page.open("about:blank")
    page.open(links[0])
    page.wait(lambda: page.driver.execute_script(FRAME), "the report in its frame")


def test_curves_of_runs_differ_in_colour(page, views):
    look(page, views["Curves"], "train (")
    strokes = "return [...document.querySelectorAll('.scatterlayer path.js-line')].map(e => e.style.stroke)"
    wanted = {
        f"rgb{tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))}"
        for color in COLORS[: len(RUNS) + 1]
    }
    page.wait(lambda: set(page.driver.execute_script(strokes)) == wanted, f"lines in {wanted}")


def test_curves_stand_in_sections_with_the_scores_first(page, views):
    look(page, views["Curves"], "eval (", "eval/clip_score_mean", "val (", "train (")
    page.wait(
        lambda: (
            page.driver.execute_script(
                "return document.querySelectorAll('.js-line, .scatterlayer path').length"
            )
            > 6
        ),
        "lines",
    )
    sections = page.driver.execute_script(
        "return [...document.querySelectorAll('[role=button][aria-expanded]')].map(e => e.innerText.trim())"
    )
    names = [line.partition(" ")[0].partition("\n")[0] for line in sections]
    wanted = ["eval", "val", "train", "val_t", "perf", "progress", "eval_groups"]
    assert [name for name in names if name in wanted] == wanted
    assert "samples" not in names


def test_images_of_several_prompts_have_a_slider_of_steps(page, views):
    shown = look(
        page, views["Images, with a slider"], "Image grid", "samples/caption-0", "3 matching runs"
    )
    assert all(name in shown for name in RUNS)
    page.wait(lambda: page.driver.execute_script(HIGH) >= 6, "two rows of three images")
    assert "No image logged" not in page.text()
    before = page.images(100)
    assert all("60000" in address for address in before)
    box = page.driver.execute_script(
        "return document.querySelector('input[role=spinbutton], [role=slider]') !== null"
    )
    assert box


def test_each_prompt_stands_beside_all_runs_and_its_images_are_whole(page, views):
    shown = look(page, views["Prompts beside runs"], "Compare: newest", "Group by: prompt")
    assert f"{PROMPTS[0][0]}: {PROMPTS[0][2]}" in shown
    page.wait(lambda: page.driver.execute_script(HIGH) >= 4, "images beside each other")
    left = page.driver.execute_script(LEFT)
    assert len(left) >= 4
    assert min(left) >= -2


def test_checkpoints_and_champion_are_linked(page, views):
    shown = look(page, views["Checkpoints"], "two-colours@60000", "base-sdxl@0")
    assert (
        sum(
            f"@{step}" in line
            for step in (20000, 40000, 60000)
            for line in page.text().splitlines()
        )
        == 9
    )
    shown = look(page, views["Champion"], "Version 2", "Version 1", "champion")
    assert (
        shown.index("Version 2")
        < shown.index("champion", shown.index("Version 2"))
        < shown.index("Version 1")
    )
    assert "aesthetic (all): better" in shown
    page.click("Version 2")
    page.wait_for_text("Source Model", "two-colours@60000", "aesthetic (all): better")
