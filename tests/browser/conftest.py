"""A real Chromium: the one that $CHROME names, or the first on the path. Without one, these tests skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser")
    chrome = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if chrome is None:
        pytest.skip("needs Chromium or Chrome: $CHROME, or on the path")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chrome)
        yield opened
        opened.close()
