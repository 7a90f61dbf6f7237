"""A headless Chromium that is already installed, driven by playwright."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextlib.contextmanager
def chromium() -> Iterator:
    """Start the installed Chromium; skip the test if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed; name one in the environment variable CHROMIUM")
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox needs a user other than root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Page:
    """A page that records what should not happen: errors, messages of the console, and requests to a network."""

    def __init__(self, browser, width: int = 1300, scheme: str = "light"):
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.problems: list[str] = []
        self.tab.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        self.tab.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.tab.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.tab.on("request", self._request)

    def _request(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.problems.append(f"request: {request.url}")

    def open(self, path: Path, route: str = "") -> None:
        """Open a report and wait until its script has run."""
        self.tab.goto(f"{path.resolve().as_uri()}{route}")
        self.tab.wait_for_selector("body[data-ready]")

    def go(self, route: str, selector: str) -> None:
        """Follow a route of the report and wait for an element."""
        self.tab.evaluate("route => { location.hash = route }", route)
        self.tab.wait_for_selector(selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match."""
        return [text.strip() for text in self.tab.locator(selector).all_inner_texts()]
