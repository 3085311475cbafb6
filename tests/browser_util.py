"""A real Chromium, with a sound file as its microphone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blspkd_fairseq.cache import default_cache

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
expect, Page = playwright.expect, playwright.Page

_FETCHED = default_cache() / "chromium" / "run.sh"
CHROMIUM = str(_FETCHED) if _FETCHED.exists() else shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: python scripts/fetch_chromium.py")


@contextmanager
def chromium(microphone: Path) -> Iterator[object]:
    """A browser whose microphone is a sound file."""
    options = [
        "--no-sandbox",  # which a container does not let it have
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as one:
        browser = one.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Visit:
    """A page, all that it asked for, and all that went wrong on it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.problems: list[str] = []
        self.bodies: list[dict[str, object]] = []
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        page.goto(url)

    def _note(self, request: playwright.Request) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/completions"):
            self.bodies.append(request.post_data_json)


def record(page: Page, milliseconds: int = 1200) -> None:
    page.locator("#record").click()
    expect(page.locator("#record")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(milliseconds)
    page.locator("#record").click()
