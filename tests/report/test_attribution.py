"""Where tokens looked, from a run's files to the heat map on the page."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest

from rlfr_vlm.report.attention import AttentionBudget, _cost, checked
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.run_files import read_rollouts, read_run
from tests.report.browser import needs_browser
from tests.report.test_report import make_run, page_data, write_jsonl

GRID = [2, 4]  # of a picture of two digits
SIZE = 8


def packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


def attention(num_tokens: int, pictures: int = 1) -> dict:
    """Token t looks at cell t, and half as much at the next one; every tenth of a percent of its
    attention more than the token before.
    """
    size = SIZE * pictures
    raw = bytearray(num_tokens * size)
    for token in range(num_tokens):
        raw[token * size + token % size] = 255
        raw[token * size + (token + 1) % size] = 128
    return {
        "grids": [GRID] * pictures,
        "cells": packed(bytes(raw)),
        "share": [0.2 + token / 1000 for token in range(num_tokens)],
    }


def with_attention(
    run: Path, step: int, groups: int = 1, make=attention, siblings: int = 8
) -> None:
    path = run / f"rollouts/step_{step:06d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[: groups * siblings]:
        row["attention"] = make(len(row["tokens"]))
    write_jsonl(path, rows)


# What is read.


def test_what_fits_is_read_as_it_was_written():
    found = checked(attention(3), 3, 1)
    assert found == attention(3)
    assert checked(attention(3, 2), 3, 2)["grids"] == [GRID, GRID]


GOOD = attention(3)
HOSTILE = {
    "not an object": [1, 2],
    "empty": {},
    "a picture too few": {**GOOD, "grids": []},
    "a picture too many": {**GOOD, "grids": [[1, 4], [1, 4]]},
    "another grid": {**GOOD, "grids": [[4, 4]]},
    "no cells at all": {**GOOD, "grids": [[0, 8]], "cells": packed(b"")},
    "sides that are no numbers": {**GOOD, "grids": [[True, 8]]},
    "negative sides": {**GOOD, "grids": [[-2, -4]]},
    "a grid of any size": {**GOOD, "grids": [[10**9, 10**9]]},
    "a grid that is a text": {**GOOD, "grids": ["24"]},
    "a share too few": {**GOOD, "share": [0.1, 0.2]},
    "shares that are none": {**GOOD, "share": [0.1, "x", 0.2]},
    "shares that are not finite": {**GOOD, "share": [0.1, float("nan"), 0.2]},
    "shares above one": {**GOOD, "share": [0.1, 1.5, 0.2]},
    "not base64": {**GOOD, "cells": "</script>"},
    "not text": {**GOOD, "cells": 7},
    "not ASCII": {**GOOD, "cells": "é" * 8},
    "not zlib": {**GOOD, "cells": base64.b64encode(bytes(24)).decode()},
    "torn": {**GOOD, "cells": base64.b64encode(zlib.compress(bytes(range(24)))[:-6]).decode()},
    "too short": {**GOOD, "cells": packed(bytes(23))},
    "too long": {**GOOD, "cells": packed(bytes(25))},
    "something behind it": {
        **GOOD,
        "cells": base64.b64encode(zlib.compress(bytes(24)) + b"more").decode(),
    },
    "far too long a text": {**GOOD, "cells": "A" * 1000},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_does_not_fit_is_left_out(kind):
    assert checked(HOSTILE[kind], 3, 1) is None


def test_a_bomb_takes_no_more_memory_than_the_cells_would():
    bomb = packed(bytes(30_000_000))
    tokens, cells = 1000, 64
    assert len(bomb) < 2 * tokens * cells
    tracemalloc.start()
    assert checked({"grids": [[8, 8]], "cells": bomb, "share": [0.1] * tokens}, tokens, 1) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert (
        checked({"grids": [[64, 64]] * 64, "cells": bomb, "share": [0.1] * tokens}, tokens, 64)
        is None
    )  # 262 MB, and it says so


def test_a_report_shows_the_rest_and_says_what_did_not_fit(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    with_attention(run, 4)
    path = run / "rollouts/step_000004.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["attention"] = {**rows[0]["attention"], "cells": "</script>"}
    rows[1]["attention"] = 7
    write_jsonl(path, rows)
    data = page_data(write_report(run))
    assert (data["rollouts"]["numAttention"], data["rollouts"]["numAttentionLeftOut"]) == (6, 0)
    assert [p["text"] for p in data["overview"]["problems"] if p["file"] == "rollouts"] == [
        "2 responses have attention that does not fit their tokens and pictures; left out"
    ]


def test_attention_is_spread_over_the_steps_and_within_its_room(tmp_path):
    run = make_run(tmp_path / "run", steps=40)
    for step in range(1, 41):
        with_attention(run, step)
    files = read_run(run).rollout_files
    cost = _cost(read_rollouts(files[0], [])[0].responses[0].attention)
    budget = AttentionBudget(num_steps=32, budget=36 * cost)
    kept = [
        sum(
            r.attention is not None
            for g in budget.keep(read_rollouts(file, []))
            for r in g.responses
        )
        for file in files
    ]
    assert 30 < sum(kept) < 40
    assert kept == [1] * sum(kept) + [0] * (
        40 - sum(kept)
    )  # a step's first response however little its share, while there is room
    assert budget.num_left_out == 40 * 8 - sum(kept)
    assert 0 <= budget.left < 1.2 * cost
    roomy = AttentionBudget(num_steps=2, budget=7 * cost)
    kept = [
        sum(
            r.attention is not None
            for g in roomy.keep(read_rollouts(file, []))
            for r in g.responses
        )
        for file in files[:2]
    ]
    assert kept == [3, 3]


# What is seen.


@pytest.fixture(scope="module")
def looked(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "looks", steps=4, num_tokens=30)
    with_attention(run, 4)
    return write_report(run)


CELLS = """(number) => { // opacity of each cell of a heat map
    const canvas = document.querySelectorAll("#groups .heat")[number], { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return { width, height, alpha: [...copy.getImageData(0, 0, width, height).data].filter((_, at) => at % 4 === 3) };
}"""


def hottest(report, at, number: int = 0) -> dict:
    """The heat map once it shows what the card says."""
    report.page.wait_for_function(
        "at => document.querySelector('#groups .attributed').dataset.drawn === String(at)", arg=at
    )
    cells = report.evaluate(CELLS, number)
    return {**cells, "hottest": max(range(len(cells["alpha"])), key=cells["alpha"].__getitem__)}


@needs_browser
def test_a_token_under_the_pointer_shows_where_it_looked(looked, open_report):
    report = open_report(looked)
    report.show("rollouts")
    page = report.page
    assert page.locator("#groups .attributed").count() == 1
    words = page.locator("#groups .look .words")
    assert words.inner_text() == "Point at a token: where did the model look when it chose it?"
    tokens = page.locator("#groups .attributed .text >> nth=0").locator(".token")
    for at in (0, 5, 12):
        tokens.nth(at).hover()
        cells = hottest(report, at)
        assert (cells["width"], cells["height"], cells["hottest"]) == (4, 2, at % SIZE)
        assert cells["alpha"][(at + 2) % SIZE] == 0
        assert (
            f"{20 + at / 10:.1f} % of this token's attention is on the picture."
            in words.inner_text()
        )
    image, canvas = (
        page.locator(f"#groups .attributed .framed {kind}").bounding_box()
        for kind in ("img", "canvas")
    )
    assert abs(image["width"] - 2 - canvas["width"]) < 1
    assert abs(image["height"] - 2 - canvas["height"]) < 1
    page.mouse.move(5, 5)
    page.wait_for_function("() => document.querySelector('#groups .heat').width === 1")
    assert not report.complaints
    assert [url for url in report.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@needs_browser
def test_a_click_pins_arrows_move_and_escape_releases(looked, open_report):
    report = open_report(looked)
    report.show("rollouts")
    page = report.page
    texts = page.locator("#groups .attributed .text")
    tokens = texts.nth(0).locator(".token")
    tokens.nth(3).click()
    assert hottest(report, 3)["hottest"] == 3
    texts.nth(1).locator(".token").nth(6).hover()
    assert hottest(report, 3)["hottest"] == 3
    assert tokens.nth(3).get_attribute("class") == "token looking pinned"
    page.keyboard.press("ArrowRight")
    assert hottest(report, 4)["hottest"] == 4
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert hottest(report, 2)["hottest"] == 2
    assert page.locator(".pinned").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".pinned").count() == 0
    texts.nth(1).locator(".token").nth(6).hover()
    assert hottest(report, 6)["hottest"] == 6
    texts.nth(1).focus()  # as with the Tab key
    assert hottest(report, 0)["hottest"] == 0
    page.keyboard.press("ArrowRight")
    assert hottest(report, 1)["hottest"] == 1
    assert texts.nth(1).locator(".pinned").count() == 1
    assert not report.complaints


@needs_browser
def test_the_mean_is_shown_where_it_is_asked_for_and_the_address_remembers_it(looked, open_report):
    report = open_report(looked)
    report.show("rollouts")
    report.page.check("#choose-attention")
    cells = hottest(report, "mean")
    assert min(cells["alpha"]) > 0
    assert (
        report.page.inner_text("#groups .look .words")
        == "Mean over 28 tokens: 21.4 % of their attention is on the picture."
    )
    report.page.reload()
    report.page.wait_for_selector("#groups[data-drawing]")
    assert report.page.is_checked("#choose-attention")
    assert hottest(report, "mean")["alpha"] == cells["alpha"]
    report.page.uncheck("#choose-attention")
    report.page.wait_for_function("() => document.querySelector('#groups .heat').width === 1")
    assert not report.complaints


@needs_browser
def test_several_pictures_have_a_heat_map_each_and_a_missing_one_none(tmp_path, open_report):
    run = make_run(tmp_path / "run", steps=1, groups=1, num_tokens=30)
    path = run / "rollouts/step_000001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["images"] = ["images/11.png", "images/none.png", "images/22.png"]
        row["attention"] = attention(len(row["tokens"]), 3)
    write_jsonl(path, rows)
    report = open_report(write_report(run))
    report.show("rollouts")
    assert report.page.locator("#groups .heat").count() == 2
    report.page.locator("#groups .text >> nth=0").locator(".token").nth(
        17
    ).hover()  # the second cell of the third picture
    assert hottest(report, 17, number=1)["hottest"] == 1
    assert "on the pictures." in report.page.inner_text("#groups .look .words")
    assert not report.complaints


@needs_browser
def test_a_run_without_attention_has_neither_switch_nor_heat_map(tmp_path, open_report):
    report = open_report(write_report(make_run(tmp_path / "run", steps=2)))
    report.show("rollouts")
    assert report.page.locator("#choose-attention, .heat, .attributed").count() == 0
    assert not report.complaints
