"""Events, the flow and latents as views of the page, in headless Chromium with the network off."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path

import pytest

from rlfr_vlm.report import html
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.run_files import read_rollouts, read_run
from tests.report.browser import needs_browser
from tests.report.test_report import MALICE, make_run, write_jsonl


def block(path: Path, name: str):
    """What the page unpacks."""
    packed = re.search(rf'id="{name}">([^<]*)<', path.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def rows_of(run: Path, step: int) -> list[dict]:
    return [
        json.loads(line)
        for line in (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_report(
        make_run(
            tmp_path_factory.mktemp("runs") / "digits-rlfr",
            steps=40,
            groups=3,
            every=2,
            signed=True,
        )
    )


def test_what_does_not_fit_the_page_is_counted_all_the_same(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=20, groups=3)
    monkeypatch.setattr(html, "ROLLOUT_BYTES", 40_000)
    path = write_report(run)
    rows = [row for step in range(1, 21) for row in rows_of(run, step)]
    counted = sum(row["tokens"].count(" so") for row in rows)
    found = [
        row
        for part in block(path, "flow-tokens")
        for row in part["penalised"]
        if row["token"] == " so"
    ]
    assert sum(row["count"] for row in found) == counted
    total = sum(
        reward
        for row in rows
        for token, reward in zip(row["tokens"], row["flow_rewards"], strict=True)
        if token == " so"
    )
    assert sum(row["reward"] for row in found) == pytest.approx(total, rel=1e-3)
    points = block(path, "latent-points")[0]
    assert len(points["x"]) == len(rows) == 480
    shown = len(points["group"]) - points["group"].count(None)
    assert (
        0 < shown < 480
        and shown
        == json.loads(re.search(r'id="run-data">(.*?)</script>', path.read_text(), re.S)[1])[
            "rollouts"
        ]["numResponses"]
    )


@needs_browser
def test_events_are_listed_marked_in_curves_and_lead_to_curves_and_rollouts(demo, open_report):
    report = open_report(demo)
    page = report.page
    rows = page.locator("#events .event")
    assert rows.count() == 2
    assert rows.nth(0).inner_text().split("\n")[:3] == ["warning", "steps 11–13", "repetition"]
    assert (
        "rolled back" in rows.nth(1).inner_text()
        and "went back to step 22" in rows.nth(1).inner_text()
    )
    assert "1 roll-back took 3 steps back, which stand in rolled_back.jsonl" in page.inner_text(
        "#events .hint"
    )
    page.wait_for_selector("#overview-accuracy .xy2 .js-line", state="attached")
    rows.nth(0).locator("text=curves").click()
    page.wait_for_selector("#curves[data-drawn]")
    assert page.locator("#curve-events .event").count() == 2
    for number in (0, 5):
        plot = page.locator("#curves .plot").nth(number)
        assert plot.evaluate("node => node._fullLayout.xaxis.range.map(Math.round)") == [7, 17]
        marks = plot.evaluate(
            "node => node.data.filter((trace) => trace.yaxis === 'y2').map((trace) => trace.x)"
        )
        assert marks == [[13, 13, None], [26, 26, None]]  # warnings, and what ended the run
    page.click("#all-steps")
    plot = page.locator("#curves .plot").nth(1)
    assert (
        plot.evaluate("node => node._fullLayout.xaxis.range[1]") >= 40
        and page.locator("#all-steps").is_hidden()
    )
    rows.nth(0).locator("text=curves").evaluate("button => button.click()")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    x = plot.evaluate("node => node._fullLayout.xaxis._offset + node._fullLayout.xaxis.c2p(13)")
    page.mouse.move(box["x"] + x, box["y"] + 80)
    page.wait_for_selector("#curves .hoverlayer .legend")
    assert (
        "warning, repetition: 62 % of the 4-grams"
        in page.locator("#curves .hoverlayer:has(.legend)").text_content()
    )
    page.click("#tab-overview")
    assert page.evaluate("byId('overview-accuracy')._fullLayout.xaxis.range.map(Math.round)") == [
        7,
        17,
    ]  # zoomed when it is shown
    rows.nth(1).locator("text=rollouts").click()
    page.wait_for_selector("#groups[data-drawing]")
    assert page.input_value("#choose-step") == "26"
    assert not report.complaints
    assert [url for url in report.requests if not url.startswith(("file:", "data:"))] == []


@needs_browser
def test_the_flow_view_has_a_verdict_readings_and_tokens_that_open_a_rollout(demo, open_report):
    report = open_report(demo)
    report.show("flow")
    page = report.page
    lines = page.locator("#flow .verdict-lines p").all_inner_texts()
    assert (
        "Wrong answers stray further: AUC 0." in lines[0] and "over the last 20 steps" in lines[0]
    )
    assert "Among siblings: AUC 0." in lines[1]
    assert (
        "of the deviation, AUC 0.42 ± 0.01 of what is charged: right answers are charged more"
        in lines[1]
    )
    assert page.locator("#flow figure").count() == 12
    assert page.locator("#yardstick .held-out tbody tr").count() == 6
    assert page.locator("#yardstick .held-out tbody tr >> nth=0").inner_text().split("\t")[:3] == [
        "all",
        "of the reward",
        "0.49",
    ]
    assert page.locator("#yardstick .probed tbody tr").all_inner_texts()[1].split("\t") == [
        "charged",
        "0.41",
        "0.37 – 0.45",
        "2,650",
    ]
    assert "0.5: no better than chance" in page.locator("#flow figure >> nth=0").inner_text()
    levels = (
        page.locator("#flow .plot")
        .nth(0)
        .evaluate("node => node.data.filter((trace) => trace.y.every((y) => y === 0.5)).length")
    )
    assert levels == 1
    windows = block(demo, "flow-tokens")
    assert [(part["first"], part["last"]) for part in windows] == [
        (2, 8),
        (10, 16),
        (18, 24),
        (26, 32),
        (34, 40),
    ]
    for sign in ("rewarded", "penalised"):
        for at, part in enumerate(windows):
            rows = page.locator(f".windows.{sign} .token-table >> nth={at}").locator(
                "tr[data-token]"
            )
            assert rows.evaluate_all("nodes => nodes.map((node) => node.dataset.token)") == [
                row["token"] for row in part[sign][:15]
            ]
    page.fill("#token-filter", "the")
    assert set(
        page.locator("tr[data-token]").evaluate_all(
            "nodes => nodes.map((node) => node.dataset.token)"
        )
    ) <= {" the", " them", "The"}
    page.reload()
    page.wait_for_selector("#tokens tr")
    assert page.input_value("#token-filter") == "the"
    page.fill("#token-filter", "")
    row = windows[2]["rewarded"][0]
    page.locator(".windows.rewarded .token-table >> nth=2").locator(".chip >> nth=0").click()
    page.wait_for_selector("#groups .response.found .token.found")
    group_ = read_rollouts(
        next(f for f in read_run(demo.parent).rollout_files if f.step == row["place"]["step"]), []
    )[row["place"]["group"]]
    found = group_.responses[row["place"]["response"]]
    assert found.tokens[row["place"]["token"]] == row["token"]
    assert page.locator(".token.found").get_attribute("data-at") == str(row["place"]["token"])
    assert group_.prompt_id in page.locator(".group:has(.response.found)").inner_text()
    page.go_back()
    assert page.locator("#flow").is_visible()
    assert not report.complaints


@needs_browser
def test_latents_are_drawn_played_hovered_and_opened(demo, open_report):
    report = open_report(demo)
    report.show("latents")
    page = report.page
    assert "Right and wrong answers lie apart" in page.inner_text("#latents .verdict-lines")
    assert page.locator("#latents figure").count() == 3
    assert page.inner_text("#latent-frame") == "step 40 · 24 responses"
    assert page.get_attribute("#latent-map", "data-shown") == "24"
    colours = (
        "node => new Set(new Uint32Array(node.getContext('2d').getImageData(0, 0, "
        "node.width, node.height).data.buffer)).size"
    )
    assert page.locator("#latent-map").evaluate(colours) > 50
    report.evaluate(
        "() => { const s = byId('latent-step'); s.value = 3; s.dispatchEvent(new Event('input')); }"
    )
    assert page.inner_text("#latent-frame").startswith("step 8 ")
    assert page.url.endswith("#latents?step=8")
    page.click("#latent-play")
    page.wait_for_selector("#latent-frame:has-text('step 14 ')")
    page.click("#latent-play")
    at = report.evaluate("map.frames[map.at].points[5]")
    box = page.locator("#latent-map").bounding_box()
    x, y = report.evaluate("(at) => pointPlace(at)", at)
    page.mouse.move(box["x"] + x, box["y"] + y)
    tip = page.inner_text("#tooltip")
    assert (
        "What is the sum of the two digits" in tip and "reward" in tip and "click to read it" in tip
    )
    page.mouse.click(box["x"] + x, box["y"] + y)
    page.wait_for_selector("#groups .response.found")
    assert report.evaluate("Number(browser.settings.step)") == report.evaluate(
        "(at) => map.points.step[at]", at
    )
    assert not report.complaints


@needs_browser
@pytest.mark.parametrize(
    "state",
    [
        "no_events",
        "empty_events",
        "torn_events",
        "no_flow",
        "one_step",
        "earlier_version",
        "no_rollouts",
    ],
)
def test_views_show_what_there_is_and_say_what_is_not(tmp_path, state, open_report):
    run = make_run(tmp_path / state, steps=1 if state == "one_step" else 12)
    said = {
        "flow": "Wrong answers stray further",
        "latents": "Right and wrong answers lie apart",
        "overview": "Events",
    }
    if state == "no_events":
        for name in ("events.jsonl", "rolled_back.jsonl"):
            (run / name).unlink()
        said["overview"] = "No events.jsonl: this run was not watched by monitors."
    if state == "empty_events":
        (run / "events.jsonl").write_text("")
        (run / "rolled_back.jsonl").unlink()
        said["overview"] = "No events: the monitors had nothing to say."
    if state == "torn_events":
        text = (run / "events.jsonl").read_text()
        (run / "events.jsonl").write_text("no json\n" + text[: len(text) - 40])
        said["overview"] = "events.jsonl: 1 lines are not JSON objects, first line 1; left out"
    if state in ("no_flow", "earlier_version"):
        kept = ("flow/loss", "flow/advantage_share") if state == "earlier_version" else ()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        write_jsonl(
            run / "metrics.jsonl",
            [
                {k: v for k, v in row.items() if not k.startswith("flow/") or k in kept}
                for row in rows
            ],
        )
        for step in range(1, 13):
            rows = rows_of(run, step)
            flow = (
                {"latent": None}
                if state == "earlier_version"
                else {"latent": None, "flow_rewards": None, "deviations": None}
            )
            write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", [{**row, **flow} for row in rows])
        said["latents"] = (
            "No latents: this run has no flow section, or was written by an earlier version."
        )
        said["flow"] = "flow/auc was not logged (a run of an earlier version)"
        if state == "no_flow":
            (run / "config.resolved.yaml").write_text("train:\n  steps: 12\nflow: null\n")
            said["flow"] = "This run has no flow section: it was trained without flow rewards."
    if state == "one_step":
        said["flow"] = (
            "No verdict on right and wrong yet: of the last 20 steps, 5 need a value of flow/auc."
        )
        said["latents"] = "No verdict on drift: there is one step."
    if state == "no_rollouts":
        for path in (run / "rollouts").glob("*.jsonl"):
            path.unlink()
        said["latents"] = "No rollouts yet"
    report = open_report(write_report(run))
    for view, text in said.items():
        report.show(view)
        assert text in report.page.inner_text(f"#{view}"), view
    if state == "one_step":
        report.show("curves")
    assert not report.complaints


@needs_browser
def test_hostile_text_in_events_tokens_and_latents_stays_text(tmp_path, open_report):
    run = make_run(tmp_path / "run", steps=6, signed=True)
    event = {"step": 3, "since": -1e300, "value": math.nan, "limit": 1e308, "to": math.inf}
    hostile = dict.fromkeys(("monitor", "action", "what", "cause", "do"), MALICE)
    write_jsonl(
        run / "events.jsonl",
        [
            {**event, **hostile},
            {**event, **hostile, "step": 1e308},
            {**event, "what": "<b>%{x} </b><a href='x'>y</a>" * 999},
        ],
    )
    write_jsonl(run / "rolled_back.jsonl", [{"roll_back": MALICE, "step": [1e308]}])
    for step in range(1, 7):
        rows = rows_of(run, step)
        for at, row in enumerate(rows):
            row.update(
                question=MALICE,
                prediction=MALICE,
                tokens=[MALICE, "\ud800", "\u202e\u0007", *row["tokens"][3:]],
            )
            row["flow_rewards"][:4] = [1.0, -1.0, -0.5, 1e308]
            row["latent"][0] = (math.nan, 1e308, "1", row["latent"][0], row["latent"][0])[at % 5]
            row["latent"] = {} if at == 3 else row["latent"] * (2 if at == 4 else 1)
        write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", rows)
    report = open_report(write_report(run))
    page = report.page
    for view in ("overview", "curves", "flow", "latents", "rollouts"):
        report.show(view)
    assert (
        "latents are not numbers of one length; left out"
        in page.locator("#problems").text_content()
    )
    report.show("overview")
    said = page.inner_text("#events")
    assert (
        "</script><script>window.hacked=1</script>" in said
        and "U+202E" in said
        and "\u202e" not in said
    )
    report.show("curves")
    plot = page.locator("#curves .plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    x = plot.evaluate("node => node._fullLayout.xaxis._offset + node._fullLayout.xaxis.c2p(3)")
    page.mouse.move(box["x"] + x, box["y"] + 80)
    page.wait_for_selector("#curves .hoverlayer .legend")
    assert (
        "<script>window.hacked=1" in page.locator("#curves .hoverlayer:has(.legend)").text_content()
    )
    assert page.locator("#curves .hoverlayer a").count() == 0
    assert plot.evaluate("node => node._fullLayout.xaxis.range[1]") < 20
    report.show("flow")
    tokens = page.inner_text("#tokens")
    assert (
        "</script><script>window.hacked=1" in tokens
        and "U+202E" in tokens
        and "\u202e" not in tokens
    )
    page.fill("#token-filter", MALICE)
    page.fill("#token-filter", "")
    report.show("latents")
    box = page.locator("#latent-map").bounding_box()
    x, y = report.evaluate("pointPlace(map.frames[map.at].points[0])")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert "window.hacked=1" in page.inner_text("#tooltip") and "\u202e" not in page.inner_text(
        "#tooltip"
    )
    assert report.evaluate("window.hacked") is None
    assert page.locator("main script, main img[src=x], #tooltip img, #tooltip script").count() == 0
    assert not report.complaints


@needs_browser
def test_dark_and_narrow_views_have_no_sideways_scroll(demo, open_report):
    for scheme in ("light", "dark"):
        report = open_report(demo, color_scheme=scheme, viewport={"width": 420, "height": 800})
        for view in ("overview", "flow", "latents"):
            report.show(view)
            assert report.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        assert not report.complaints
