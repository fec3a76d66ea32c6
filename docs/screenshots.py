"""Takes the documents' images of a finished workspace: `python docs/screenshots.py WORKSPACE
[PICTURE...]`.

Serves the workspace, looks at it with headless Chromium (Debian's chromium and chromium-driver),
and writes docs/images/. The workspace itself is served, so its own links and folders are what is
seen.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, chromium  # noqa: E402 - the tests' browser, which the line above makes importable

from resources.workspace.store import Store  # noqa: E402
from training.reports import contact_sheet  # noqa: E402
from training.sampling.image_files import read_image  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH, NARROW = 1440, 1200
GROUPS = ("ingest", "annotate", "curate", "encode", "train", "evaluate")
NUM_PROMPTS = 10
MAX_BYTES = 400_000
SETTLE_S = 3.0
"""How long pages go on moving after their text is there."""
BROWSER_MEMORY = {
    "asset-graph-direction": '"vertical"',
    "dagster-nav-collapsed": "true",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}


@contextlib.contextmanager
def served(home: Path) -> Iterator[tuple[str, str]]:
    """Addresses of Dagster and MLflow while they are up."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [str(item.getsockname()[1]) for item in (one, two)]
    foundry = str(Path(sys.executable).with_name("foundry"))
    command = [foundry, "up", "--home", str(home), "--port", ports[0], "--mlflow-port", ports[1]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any("Ctrl-C" in line for line in process.stdout):
            sys.exit(f"{home} could not be served")
        yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def remember(page: Page, address: str) -> None:
    """Have the site find in the browser's memory what a person would have clicked once."""
    page.open(f"{address}/robots.txt")
    for name, value in BROWSER_MEMORY.items():
        page.driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", name, value)


def graph(page: Page, dagster: str) -> None:
    """The whole asset graph, every group open."""
    page.resize(1152, 1390, scale=1.25)
    page.open(f"{dagster}/asset-groups")
    page.wait_for_text(*GROUPS)
    page.driver.execute_script(HIDE_TREE)
    page.driver.execute_script(
        "window.dispatchEvent(new KeyboardEvent('keydown', {code: 'KeyE', altKey: true}))"
    )
    time.sleep(SETTLE_S)
    page.driver.execute_script(ZOOM_OUT)
    time.sleep(3 * SETTLE_S)  # states come group by group
    save(page, "dagster-graph.png")


ZOOM_OUT = "document.querySelector('[aria-label=zoom_out]').closest('button').click()"
"""Dagster fits the width only."""
HIDE_TREE = """
const side = document.querySelector('input[placeholder^=Jump]').getBoundingClientRect();
const buttons = [...document.querySelectorAll('button')].filter(button => {
    const box = button.getBoundingClientRect();
    return Math.abs(box.top - side.top) < 20 && box.left > side.right - 2;
});
buttons.sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)[0].click();
"""
"""The button beside the field above the tree of groups has no name."""


def asset(page: Page, dagster: str) -> None:
    """An asset with its chart, table and thumbnails."""
    page.resize(WIDTH, 1000)
    page.open(f"{dagster}/assets/raw_images?view=partitions&partition=s000000")
    page.wait_for_text("thumbnails", "megapixels", "rejected by reason")
    time.sleep(SETTLE_S)
    page.click("[Show Markdown]")
    time.sleep(SETTLE_S)
    save(page, "dagster-asset.png")


def staleness(page: Page, dagster: str, home: Path) -> None:
    """A setting that was changed, as the check of its stage tells it; foundry.toml gets its text
    back."""
    config = home / "foundry.toml"
    before = config.read_text("utf-8")
    config.write_text(before.replace("min_score = 5 ", "min_score = 6 "), "utf-8")
    try:
        page.resize(NARROW, 760)
        page.open(f"{dagster}/assets/selected_images?view=checks&checkDetail=current")
        page.wait_for_text("min_score 5 → 6", timeout_s=180)
        time.sleep(SETTLE_S)
        save(page, "dagster-current.png")
    finally:
        config.write_text(before, "utf-8")


def encoding(page: Page, dagster: str) -> None:
    """Buckets; latents with a sample of sources, crops and what is decoded again; generations with
    their age."""
    page.resize(NARROW, 1000)
    page.open(f"{dagster}/assets/bucket_assignments?view=partitions&partition=sdxl")
    page.wait_for_text("images per bucket", "left over by batches of 16")
    time.sleep(SETTLE_S)
    save(page, "dagster-buckets.png")
    page.resize(NARROW, 760)
    page.open(f"{dagster}/assets/latents?view=partitions&partition=sdxl%7Cs000000")
    page.wait_for_text("reconstruction error")
    time.sleep(SETTLE_S)
    page.click("[Show Markdown]")
    time.sleep(SETTLE_S)
    save(page, "dagster-latents.png")
    page.resize(NARROW, 780)
    page.open(f"{dagster}/assets/latents?view=checks&checkDetail=generations_hold_all")
    page.wait_for_text("older generations")
    time.sleep(SETTLE_S)
    save(page, "dagster-generations.png")


def run(page: Page, mlflow: str, dagster: str, name: str) -> None:
    """A training run with its curves and images."""
    page.open(f"{dagster}/assets/checkpoints?view=partitions&partition={name}")
    page.wait_for_text("MLflow run")
    link = page.driver.execute_script(
        "return document.querySelector('a[href*=\"/runs/\"][href*=mlflow]').href"
    )
    remember(page, mlflow)
    page.resize(WIDTH, 1350)
    page.open(link)
    page.wait_for_text("Model metrics")
    page.open(
        f"{page.driver.current_url.partition('?')[0]}/model-metrics?workflowType=machine_learning"
    )
    page.wait_for_text("Auto-refresh", "samples", "train", "val")
    page.driver.execute_script(HEADER + "header.scrollIntoView({block: 'center'})", "train")
    time.sleep(SETTLE_S)
    page.driver.execute_script(
        HEADER + "header.scrollIntoView({block: 'center'})", "train"
    )  # charts above have grown
    time.sleep(SETTLE_S)
    for slider in page.driver.find_elements("css selector", "[role=slider]"):
        slider.send_keys("\ue014" * 2)  # to the right: they begin with what the base model draws
    page.driver.execute_script(HEADER + "header.scrollIntoView({block: 'center'})", "train")
    time.sleep(SETTLE_S)
    save(page, "mlflow-run.png")


HEADER = """
const header = [...document.querySelectorAll('[role=button][aria-expanded]')]
    .find(button => button.innerText.trim().split('\\n')[0] === arguments[0]);
"""
"""The head of a section of charts."""


def before_after(home: Path, name: str) -> None:
    """Base against fine-tuned for prompts with the new concept, two prompts a row."""
    store = Store(home)
    last = str(store.read("checkpoints", parts=[name]).sort("samples_seen")["checkpoint"][-1])
    base = store.checkpoints.base()
    assert base is not None, "the base model is not recorded"
    samples = [
        store.read("sample_images", parts=[key]).filter(pl.col("group") == "star")
        for key in (base, last)
    ]
    both = (
        samples[0]
        .join(samples[1].select("prompt_id", after="file"), on="prompt_id")
        .sort("prompt_id")
    )
    rows = [
        contact_sheet.Row(
            title=row["prompt_id"],
            text=row["text"],
            images=[
                read_image(store.paths.sample_folder(key) / row[file])
                for key, file in ((base, "file"), (last, "after"))
            ],
        )
        for row in both.head(NUM_PROMPTS).iter_rows(named=True)
    ]
    halves = []
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        path = IMAGES / "half.jpg"
        path.write_bytes(contact_sheet.grid(part, ["base", "fine-tuned"]))
        with Image.open(path) as half:
            halves.append(half.convert("RGB"))
        path.unlink()
    sheet = Image.new(
        "RGB", (sum(half.width for half in halves), max(half.height for half in halves)), "white"
    )
    sheet.paste(halves[0], (0, 0))
    sheet.paste(halves[1], (halves[0].width, 0))
    sheet.save(IMAGES / "before-after.jpg", quality=85, optimize=True)


def report(page: Page, home: Path, name: str) -> None:
    """The head of the release's report: verdicts, the slider, images by checkpoint."""
    page.resize(1180, 1963)
    page.open((home / "release" / name / "report.html").as_uri())
    time.sleep(SETTLE_S)
    path = IMAGES / "report.png"
    page.screenshot(path)
    with Image.open(path) as image:
        image.convert("RGB").save(IMAGES / "report.jpg", quality=85, optimize=True)
    path.unlink()


def save(page: Page, name: str) -> None:
    """Keep what is visible, in 256 colours where that is needed to stay small."""
    path = IMAGES / name
    page.screenshot(path)
    if path.stat().st_size > MAX_BYTES:
        with Image.open(path) as image:
            fewer = image.convert("RGB").quantize(256)
        fewer.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Take all images, or those of the functions named."""
    home, name = Path(sys.argv[1]).resolve(), "demo"
    wanted = sys.argv[2:] or [
        "before_after",
        "graph",
        "asset",
        "encoding",
        "run",
        "report",
        "staleness",
    ]
    IMAGES.mkdir(parents=True, exist_ok=True)
    if "before_after" in wanted:
        before_after(home, name)
    with served(home) as (dagster, mlflow), chromium(WIDTH) as page:
        remember(page, dagster)
        for take in (graph, asset, encoding):
            if take.__name__ in wanted:
                take(page, dagster)
        if "staleness" in wanted:
            staleness(page, dagster, home)
        if "run" in wanted:
            run(page, mlflow, dagster, name)
        if "report" in wanted:
            report(page, home, name)


if __name__ == "__main__":
    main()
