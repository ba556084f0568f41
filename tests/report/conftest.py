"""The browser of the tests of pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.browser import ARGUMENTS, CHROMIUM, Opened


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_report(chromium):
    contexts = []

    def open_it(path: Path, address: str = "", **options) -> Opened:
        context = chromium.new_context(
            **{"offline": True, "viewport": {"width": 1400, "height": 900}, **options}
        )
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.set_default_timeout(15_000)
        opened.page.on(
            "console",
            lambda message: (
                opened.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("request", lambda request: opened.requests.append(request.url[:80]))
        opened.page.goto(path.as_uri() + address)
        return opened

    yield open_it
    for context in contexts:
        context.close()
