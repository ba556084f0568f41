"""Pages opened from disk in headless Chromium with the network off."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: `apt-get install chromium`"
)


@dataclass
class Opened:
    """A report open in the browser, and everything it complained about or asked the network for."""

    page: object
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, script: str, argument=None):
        return self.page.evaluate(script, argument)

    def show(self, view: str) -> None:
        self.page.click(f"#tab-{view}")
        done = {
            "overview": "#overview .foot",
            "curves": "#curves[data-drawn], #curves .empty",
            "rollouts": "#groups[data-drawing], #rollouts .empty",
            "flow": "#flow[data-drawn]:has(#tokens), #flow > .empty",
            "latents": "#latents[data-drawn]",
        }
        self.page.wait_for_selector(done[view])

    def change(self, script: str, argument=None) -> float:
        """Run a script that changes the page of rollouts; milliseconds until the new one is on the
        screen.
        """
        return self.evaluate(
            """async ([script, argument]) => {
                const groups = document.getElementById("groups"), before = groups.dataset.drawing, start = performance.now();
                CHANGES[script](argument);
                while (groups.dataset.drawing === before) await new Promise(requestAnimationFrame);
                groups.getBoundingClientRect();
                await new Promise(requestAnimationFrame);
                return performance.now() - start;
            }""".replace("CHANGES", CHANGES),
            [script, argument],
        )


CHANGES = """({
    click: (selector) => document.querySelector(selector).click(),
    choose: ([id, value]) => { const node = document.getElementById(id); node.value = value; node.dispatchEvent(new Event("change")); },
    type: (text) => { const node = document.getElementById("choose-search"); node.value = text; node.dispatchEvent(new Event("input")); },
    slide: (at) => { const node = document.getElementById("slide-step"); node.value = at; node.dispatchEvent(new Event("input")); },
})"""
