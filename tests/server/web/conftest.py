"""Tabs of a headless Chromium."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.server.running import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        instance = playwright.chromium.launch(
            executable_path=CHROMIUM, args=options, timeout=PATIENCE * 1000
        )
        yield instance
        instance.close()


DESKTOP: dict[str, Any] = {"viewport": {"width": 1180, "height": 760}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 800},
    "device_scale_factor": 3,
    "is_mobile": True,
    "has_touch": True,
}


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A fresh tab; whatever it complains of (a violated policy, a broken script) fails the test."""
    yield from watched(browser, DESKTOP)


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    """The same on a phone."""
    yield from watched(browser, PHONE)


def watched(browser: Any, device: dict[str, Any]) -> Iterator[Any]:
    context = browser.new_context(color_scheme="light", **device)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda entry: said.append(entry.text) if entry.type == "error" else None)
    yield page
    context.close()
    # Refused requests are logged too, and one test is about them. A test's server may end before
    # what the page asks in the background is answered.
    expected = "status of 40[014]|ERR_CONNECTION_REFUSED"
    assert [line for line in said if not re.search(expected, line)] == []
