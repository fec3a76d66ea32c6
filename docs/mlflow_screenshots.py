"""Takes the images of docs/tracking.md: `python docs/mlflow_screenshots.py`, of the tests' three
drawn runs.

Needs Debian's chromium and chromium-driver.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, chromium  # noqa: E402 - the tests' browser, which the line above makes importable
from mlflow_world import fill, served  # noqa: E402
from PIL import Image  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MAX_BYTES = 300_000
SETTLE_S = 12.0
"""How long pages go on moving after their text is there, on two busy cores."""
VIEWS = {
    "mlflow-runs.png": ("Runs, best images first", 1700, 480),
    "mlflow-pictures.png": ("Images, with a slider", 1300, 960),
    "mlflow-prompts.png": ("Prompts beside runs", 1700, 900),
}
"""File -> view, and the size of its page, px."""
CLOSED = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}
QUIET = """
const style = document.createElement('style');
style.innerText = '.modebar { display: none !important }';
document.head.append(style);
document.querySelector('[role=alert] button[aria-label=Close], [role=alert] button:last-of-type')?.click();
"""
"""Hides what only a mouse over a chart shows, and the note above shared views."""


def take(page: Page, file: str, address: str, width: int, height: int) -> None:
    """One image, in 256 colours where that is needed to stay small."""
    page.resize(width, height)
    page.open("about:blank")
    page.open(address)
    page.wait_for_text("two-colours")
    time.sleep(SETTLE_S)
    page.driver.execute_script(QUIET)
    time.sleep(1)
    path = IMAGES / file
    page.screenshot(path)
    if path.stat().st_size > MAX_BYTES:
        with Image.open(path) as image:
            fewer = image.convert("RGB").quantize(
                256, Image.Quantize.MAXCOVERAGE
            )  # keeps the small dots' colours
        fewer.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "space"
        home.mkdir()
        tracking = fill(home)
        with served(home) as url, chromium() as page:
            page.open(f"{url}/robots.txt")
            for name, value in CLOSED.items():
                page.driver.execute_script(
                    "localStorage.setItem(arguments[0], arguments[1])", name, value
                )
            links = tracking.views()
            for file, (view, width, height) in VIEWS.items():
                take(page, file, url + links[view].removeprefix("/mlflow"), width, height)


if __name__ == "__main__":
    main()
