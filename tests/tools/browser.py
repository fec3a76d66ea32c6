"""Headless Chromium for tests that look at our pages the way people do."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="needs Debian's chromium and chromium-driver: apt-get install chromium chromium-driver",
)

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium(width: int = 1440, height: int = 900) -> Iterator["Page"]:
    """Start a browser with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            driver.set_page_load_timeout(60)
            page = Page(driver)
            page.resize(width, height)
            yield page
        finally:
            driver.quit()


class Page:
    """The one tab of a browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to an address."""
        self.driver.get(url)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the page so many CSS pixels, each `scale` pixels of a screenshot."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False},
        )

    def text(self) -> str:
        """What a person reads."""
        return self.driver.execute_script("return document.body ? document.body.innerText : ''")

    def wait_for_text(self, *texts: str, timeout_s: float = 60) -> None:
        """Wait until all texts are on the page; a failure shows what was there instead."""
        self.wait(lambda: all(text in self.text() for text in texts), f"{texts}", timeout_s)

    def wait(self, condition, what: str, timeout_s: float = 60) -> None:
        """Wait until a condition holds."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(self.driver, timeout_s, poll_frequency=0.25).until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(
                f"waited {timeout_s} s for {what} at {self.driver.current_url}; the page says:\n{self.text()[:3000]}"
            ) from None

    def click(self, text: str) -> None:
        """Click the smallest visible thing that says exactly `text`."""
        clicked = self.driver.execute_script(
            """
            const found = [...document.querySelectorAll('a, button, [role], span, div')]
                .filter(e => e.innerText && e.innerText.trim() === arguments[0] && e.getClientRects().length);
            if (!found.length) return false;
            found[found.length - 1].click();
            return true;
            """,
            text,
        )
        assert clicked, f"nothing says {text!r} at {self.driver.current_url}:\n{self.text()[:3000]}"

    def images(self, minimum_px: int = 16) -> list[str]:
        """Addresses of the images that are loaded and visible, each side at least
        `minimum_px`."""
        return self.driver.execute_script(
            """
            return [...document.images].filter(e => e.complete && e.naturalWidth >= arguments[0] &&
                e.naturalHeight >= arguments[0] && e.getClientRects().length).map(e => e.src);
            """,
            minimum_px,
        )

    def fetch(self, url: str, **options) -> str:
        """Let the page's own script fetch `url`; the answer's status, or what the browser says
        against it."""
        return self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            fetch(arguments[0], arguments[1]).then(r => done(`${r.type} ${r.status}`), e => done(String(e)));
            """,
            url,
            options,
        )

    def errors(self) -> list[str]:
        """What the browser's console complained about since the last call."""
        return [
            item["message"] for item in self.driver.get_log("browser") if item["level"] == "SEVERE"
        ]

    def screenshot(self, path: Path) -> None:
        """Save what is visible as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(path))
