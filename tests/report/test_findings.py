"""Events, the flow's verdict and tokens, and latents: as figures, and as views of the page in headless Chromium with the network off."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from rlfr_vlm.report import flow_tokens, html, latents
from rlfr_vlm.report.events import MAX_EVENTS, read_events
from rlfr_vlm.report.flow_health import flow_health
from rlfr_vlm.report.flow_tokens import TokenCensus
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.latents import ERROR, RIGHT, WRONG, LatentCensus, centroid_drift, latent_view, principal_plane, separability
from rlfr_vlm.report.run_files import Group, Metrics, Response, read_rollouts, read_run
from tests.report.browser import needs_browser
from tests.report.test_report import MALICE, make_run, write_jsonl


def response(tokens=(), flow=None, verdict="correct", latent=None) -> Response:
    traces = {} if flow is None else {"flow_rewards": tuple(flow)}
    latent = None if latent is None else np.array(latent, dtype=np.float32)
    return Response(0, "".join(tokens), "7", verdict, "", 1.0, {}, "stop", 0, tuple(tokens), traces, latent=latent)


def group(*responses: Response, step: int = 1) -> Group:
    return Group(step, "id", "a question", "7", "", (), responses)


def block(path: Path, name: str):
    """What the page unpacks."""
    packed = re.search(rf'id="{name}">([^<]*)<', path.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def rows_of(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


# Events.


def test_events_keep_the_order_of_the_file_and_name_what_is_no_event(tmp_path):
    rows = [{"step": 9, "monitor": "b", "action": "roll_back", "to": 4, "what": "x"}, {"step": 5, "monitor": "a", "value": math.nan}]
    write_jsonl(
        tmp_path / "events.jsonl", [*rows, {"step": None, "monitor": "c"}, {"step": 3}, {"step": 6, "what": ["odd"], "limit": 10**400}]
    )
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 7, "moni')
    write_jsonl(tmp_path / "rolled_back.jsonl", [{"roll_back": n, "step": s} for n, s in ((1, 5), (1, 6), (1, 6), (2, 6))])
    problems = []
    log = read_events(tmp_path, problems)
    assert [(event.step, event.action, event.to) for event in log.events] == [(9, "roll_back", 4), (5, "", None), (6, "", None)]
    assert log.events[1].value is None and log.events[2].limit is None and log.events[2].what == '["odd"]'
    assert (log.num_roll_backs, log.num_steps_taken_back) == (2, 3)
    assert "2 events name no step, or neither monitor nor text; left out" in [problem.text for problem in problems]


def test_no_events_file_is_no_problem_and_a_long_one_keeps_the_last(tmp_path):
    problems = []
    assert read_events(tmp_path, problems).events == ()
    write_jsonl(tmp_path / "events.jsonl", [{"step": step, "monitor": "m"} for step in range(5 * MAX_EVENTS // 2)])
    log = read_events(tmp_path, problems)
    assert (len(log.events), log.events[-1].step, log.num_left_out) == (MAX_EVENTS, 5 * MAX_EVENTS // 2 - 1, 3 * MAX_EVENTS // 2)
    assert not problems


# The flow's health.


def flow_metrics(**series: list[float | None]) -> Metrics:
    named = {f"flow/{name}": tuple(values) for name, values in series.items()}
    return Metrics(tuple(range(1, 1 + max(map(len, named.values())))), named)


@pytest.mark.parametrize(
    ("aucs", "level", "text"),
    [
        ([0.2] * 20 + [0.6, 0.8] * 10, "good", "Wrong answers stray further: AUC 0.70 ± 0.05 over the last 20 steps."),
        ([0.3, 0.5] * 10, "bad", "Right answers stray further than wrong ones: AUC 0.40 ± 0.05 over the last 20 steps. The flow reward"),
        ([0.3, 0.7] * 10, "plain", "The field tells right from wrong no better than chance: AUC 0.50 ± 0.09"),
        ([0.9] * 4, "none", "No verdict on right and wrong yet: of the last 20 steps, 5 need a value of flow/auc."),
        ([None] * 16 + [0.9] * 4, "none", "No verdict on right and wrong yet"),
        ([0.9] * 4 + [7.0] * 9, "none", "No verdict on right and wrong yet"),
    ],
)
def test_the_verdict_follows_from_the_last_steps_and_their_scatter(aucs, level, text):
    verdict = flow_health(flow_metrics(auc=aucs), {"flow": {}}).verdicts[0]
    assert verdict.level == level
    assert verdict.text.startswith(text)


def test_siblings_decide_whether_hard_questions_are_what_is_told():
    high, chance, low = [0.6, 0.8] * 10, [0.4, 0.6] * 10, [0.2, 0.4] * 10
    verdict = lambda **series: flow_health(flow_metrics(**series), {}).verdicts[0]  # noqa: E731
    assert verdict(auc=high, auc_in_group=high).level == "good"
    told = verdict(auc=high, auc_in_group=chance)
    assert (
        told.level == "plain"
        and "but not clearly among siblings: AUC 0.70 ± 0.05 over the last 20 steps, AUC 0.50 ± 0.05 among siblings" in told.text
    )
    assert verdict(auc=chance, auc_in_group=high).text.startswith("Among siblings, wrong answers stray further")
    assert verdict(auc=chance, auc_in_group=low).level == "bad"
    assert verdict(auc_in_group=high).text.endswith("AUC 0.70 ± 0.05 over the last 20 steps, among siblings.")


def test_readings_compare_the_first_and_the_last_tenth():
    health = flow_health(flow_metrics(loss=[2.0, 4.0, *[9.0] * 16, 1.0, 2.0], drift=[0.1] * 20, advantage_share=[0.25] * 20), {})
    assert health.readings["flow/loss"].endswith("This run: 3 → 1.5.")
    assert [verdict.text for verdict in health.verdicts[1:]] == [
        "25.0 % of the size of the advantages comes from the flow (last 20 steps).",
        "The field's loss fell from 3 to 1.5, and its weights moved 10.0 % from where the run began.",
    ]
    assert "This run" not in flow_health(flow_metrics(loss=[2.0, 4.0, 3.0]), {}).readings["flow/loss"]
    absurd = flow_health(flow_metrics(loss=[1e308] * 20, auc=[1e99] * 20), {})  # sums would overflow
    assert [verdict.level for verdict in absurd.verdicts] == ["none"]


def test_a_run_without_flow_figures_says_why():
    steps = Metrics((1, 2), {"reward/mean": (0.1, 0.2)})
    assert "no flow section" in flow_health(steps, {"flow": None}).missing
    assert "names none" in flow_health(steps, {"flow": {"checkpoint": "x"}}).missing
    assert "No metrics yet" in flow_health(Metrics(), {"flow": {}}).missing


# Tokens.


def test_tokens_are_summed_by_window_with_counts_shares_and_a_place():
    census = TokenCensus([1, 2])
    census.add(2, [group(response(["a", "b"], [0.5, -1.0]))], num_on_page=0)
    here = [response(["a", "b", "a"], [0.25, 0.0, 0.5]), response(["b", "c"], [-0.5, None], "wrong"), response(["a"], None)]
    census.add(1, [group(response(["a"], [-2.0], "error")), group(*here)], num_on_page=2)
    first, second = census.for_page()
    assert (first["first"], first["last"], second["first"]) == (1, 1, 2)
    assert [(row["token"], row["reward"], row["count"], row["in_right"]) for row in first["penalised"]] == [
        ("a", -1.25, 3, 1.0),
        ("b", -0.5, 2, 1.0),
    ]
    assert (first["penalised"][0]["place"], first["rewarded"]) == ({"step": 1, "group": 0, "response": 0, "token": 0, "on_page": True}, [])
    assert first["penalised"][1]["in_wrong"] == 1.0
    assert first["penalised"][1]["place"]["response"] == 1
    assert [row["token"] for row in second["rewarded"]] == ["a"]
    assert second["rewarded"][0]["place"]["on_page"] is False
    assert second["rewarded"][0]["in_wrong"] is None


def test_windows_cover_all_steps_once_and_a_place_on_the_page_is_preferred():
    census = TokenCensus(range(10, 33))
    spans = [(window.first, window.last) for window in census.windows]
    assert (spans[0][0], spans[-1][1], len(spans)) == (10, 32, 5)
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(spans))
    census.add(10, [group(response(["a"], [0.1])), group(response(["a"], [0.9]))], num_on_page=1)
    assert census.for_page()[0]["rewarded"][0]["place"]["group"] == 0
    assert TokenCensus([]).for_page() == []
    assert TokenCensus([1]).for_page() == []


def test_memory_of_tokens_is_bounded_and_overflowing_sums_are_left_out(monkeypatch):
    monkeypatch.setattr(flow_tokens, "MAX_TOKENS", 100)
    census = TokenCensus([1])
    for part in range(20):
        tokens = [f"t{part}-{at}" for at in range(50)]
        census.add(1, [group(response(["strong", *tokens], [-1.0] + [-0.001] * 50))], 1)
    window = census.windows[0]
    assert len(window.counts) <= 100 + 51 and len(window.places) <= 151 and census.approximate
    assert census.for_page()[0]["penalised"][0]["token"] == "strong"
    assert census.for_page()[0]["penalised"][0]["count"] == 20
    huge = TokenCensus([1])
    huge.add(1, [group(response(["x", "x", "y"], [1e308, 1e308, 0.1]))], 1)
    assert [row["token"] for row in huge.for_page()[0]["rewarded"]] == ["y"]


# Latents.


def test_the_plane_holds_the_directions_of_most_variance_with_right_answers_up_and_right():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) * [1, 5, 1, 3, 1, 1]
    verdict = np.where(x[:, 1] - x[:, 3] > 0, WRONG, RIGHT)
    plane, explained = principal_plane(x - x.mean(axis=0), verdict)
    assert abs(np.corrcoef(plane[:, 0], x[:, 1])[0, 1]) > 0.99 and abs(np.corrcoef(plane[:, 1], x[:, 3])[0, 1]) > 0.99
    assert explained == pytest.approx((25 / 38, 9 / 38), abs=0.05)
    assert (plane[verdict == RIGHT].mean(axis=0) > plane[verdict == WRONG].mean(axis=0)).all()
    assert principal_plane(np.array([[-1.0], [1.0]]), np.array([RIGHT, WRONG]))[1] == (1.0, 0.0)


def siblings(rng, steps: int, groups: int, apart: float, hard: float) -> tuple[np.ndarray, ...]:
    """8 responses a group; right and wrong ones differ by `apart` along axis 0, hard and easy questions by `hard` along axis 1."""
    rows = []
    for step in range(steps):
        for number in range(groups):
            easy = number % 2
            for _ in range(8):
                right = rng.random() < (0.8 if easy else 0.2)
                x = rng.normal(size=8) + apart * right * np.eye(8)[0] + hard * easy * np.eye(8)[1]
                rows.append((x, RIGHT if right else WRONG, step, step * groups + number))
    x, verdict, step, group_ = (np.array(column) for column in zip(*rows, strict=True))
    return x - x.mean(axis=0), verdict, step, group_


def mean_of(aucs) -> float:
    return float(np.mean([auc for auc in aucs if auc is not None]))


def test_separability_is_that_of_unseen_steps():
    rng = np.random.default_rng(1)
    x, verdict, step, group_ = siblings(rng, steps=30, groups=4, apart=2.0, hard=0.0)
    exact = 0.5 * (1 + math.erf(2.0 / 2))  # of two normals that lie 2 apart: Phi(2 / sqrt 2)
    assert mean_of(separability(x, verdict, step)) == pytest.approx(exact, abs=0.03)
    assert mean_of(separability(x, verdict, step, group_)) == pytest.approx(exact, abs=0.03)
    noise = rng.normal(size=(len(x), 400))  # a fit on the tested responses themselves would separate these
    assert mean_of(separability(noise, verdict, step)) == pytest.approx(0.5, abs=0.06)


def test_a_direction_that_tells_hard_questions_gains_nothing_among_siblings():
    x, verdict, step, group_ = siblings(np.random.default_rng(2), steps=30, groups=4, apart=0.0, hard=3.0)
    assert mean_of(separability(x, verdict, step)) > 0.7
    assert mean_of(separability(x, verdict, step, group_)) == pytest.approx(0.5, abs=0.05)


def test_steps_with_too_few_responses_have_no_separability():
    x, verdict, step, _ = siblings(np.random.default_rng(3), steps=6, groups=4, apart=2.0, hard=0.0)
    few = verdict.copy()
    few[(step == 2) & (np.cumsum((step == 2) & (verdict == RIGHT)) > 4)] = ERROR
    assert [at for at, auc in enumerate(separability(x, few, step)) if auc is None] == [2]
    assert separability(x, np.full_like(verdict, RIGHT), step) == (None,) * 6
    assert separability(x[step == 0], verdict[step == 0], step[step == 0]) == (None,)  # nothing else to fit on
    assert mean_of(separability(np.ones_like(x), verdict, step)) == 0.5


def test_drift_is_in_spreads_and_chance_is_what_the_questions_scatter_gives():
    rng = np.random.default_rng(4)
    step, group_ = np.repeat(np.arange(40), 32), np.repeat(np.arange(160), 8)
    still = rng.normal(size=(160, 64))[group_] + 0.5 * rng.normal(size=(1280, 64))
    drift, chance = centroid_drift(still, step, group_)
    assert np.mean(drift[4:]) == pytest.approx(np.mean(chance), rel=0.15)
    moving = still + 0.2 * step[:, None] * np.eye(64)[0] * math.sqrt(64 * 1.25)
    assert centroid_drift(moving, step, group_)[0][-1] == pytest.approx(0.2 * (39 - 1.5), rel=0.1)
    assert centroid_drift(np.zeros((4, 2)), np.arange(4), np.arange(4)) == ((None,) * 4, (None,) * 4)
    assert centroid_drift(np.array([[1.0], [3.0]]), np.zeros(2, int), np.zeros(2, int)) == ((0.0,), (None,))


def test_unusable_latents_are_counted_and_points_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(latents, "MAX_POINTS", 20)
    census, rng, problems = LatentCensus(range(10)), np.random.default_rng(5), []
    for step in range(10):
        bad = [response(latent=values) for values in ([math.nan, 1.0], [], [1.0, 2.0, 3.0], [math.inf, 0.0])] if step == 3 else []
        census.add(
            step, [group(response(), *bad, *(response(latent=rng.normal(size=2)) for _ in range(6))), group(response(latent=[9, 9]))], 1
        )
    view = latent_view(census, problems)
    assert [problem.text for problem in problems] == ["4 latents are not numbers of one length; left out"]
    assert view.num_responses == 70
    assert view.points["step"] == [step for step in range(10) for _ in range(2)]
    assert set(view.points["group"]) == {0}  # those that can be opened come first
    assert latent_view(LatentCensus([1]), []) is None
    same = LatentCensus([1])
    same.add(1, [group(*(response(latent=[2.0, 2.0]) for _ in range(3)))], 1)
    assert latent_view(same, []) is None


# The page.


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "digits-rlfr", steps=40, groups=3, every=2, signed=True))


def test_what_does_not_fit_the_page_is_counted_all_the_same(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=20, groups=3)
    monkeypatch.setattr(html, "ROLLOUT_BYTES", 40_000)
    path = write_report(run)
    rows = [row for step in range(1, 21) for row in rows_of(run, step)]
    counted = sum(row["tokens"].count(" so") for row in rows)
    found = [row for part in block(path, "flow-tokens") for row in part["penalised"] if row["token"] == " so"]
    assert sum(row["count"] for row in found) == counted
    total = sum(reward for row in rows for token, reward in zip(row["tokens"], row["flow_rewards"], strict=True) if token == " so")
    assert sum(row["reward"] for row in found) == pytest.approx(total, rel=1e-3)
    points = block(path, "latent-points")[0]
    assert len(points["x"]) == len(rows) == 480
    shown = len(points["group"]) - points["group"].count(None)
    assert (
        0 < shown < 480
        and shown == json.loads(re.search(r'id="run-data">(.*?)</script>', path.read_text(), re.S)[1])["rollouts"]["numResponses"]
    )


@needs_browser
def test_events_are_listed_marked_in_curves_and_lead_to_curves_and_rollouts(demo, open_report):
    report = open_report(demo)
    page = report.page
    rows = page.locator("#events .event")
    assert rows.count() == 2
    assert rows.nth(0).inner_text().split("\n")[:3] == ["warning", "steps 11–13", "repetition"]
    assert "rolled back" in rows.nth(1).inner_text() and "went back to step 22" in rows.nth(1).inner_text()
    assert "1 roll-back took 3 steps back, which stand in rolled_back.jsonl" in page.inner_text("#events .hint")
    page.wait_for_selector("#overview-accuracy .xy2 .js-line", state="attached")
    rows.nth(0).locator("text=curves").click()
    page.wait_for_selector("#curves[data-drawn]")
    assert page.locator("#curve-events .event").count() == 2
    for number in (0, 5):
        plot = page.locator("#curves .plot").nth(number)
        assert plot.evaluate("node => node._fullLayout.xaxis.range.map(Math.round)") == [7, 17]
        marks = plot.evaluate("node => node.data.filter((trace) => trace.yaxis === 'y2').map((trace) => trace.x)")
        assert marks == [[13, 13, None], [26, 26, None]]  # warnings, and what ended the run
    page.click("#all-steps")
    plot = page.locator("#curves .plot").nth(1)
    assert plot.evaluate("node => node._fullLayout.xaxis.range[1]") >= 40 and page.locator("#all-steps").is_hidden()
    rows.nth(0).locator("text=curves").evaluate("button => button.click()")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    x = plot.evaluate("node => node._fullLayout.xaxis._offset + node._fullLayout.xaxis.c2p(13)")
    page.mouse.move(box["x"] + x, box["y"] + 80)
    page.wait_for_selector("#curves .hoverlayer .legend")
    assert "warning, repetition: 62 % of the 4-grams" in page.locator("#curves .hoverlayer:has(.legend)").text_content()
    page.click("#tab-overview")
    assert page.evaluate("byId('overview-accuracy')._fullLayout.xaxis.range.map(Math.round)") == [7, 17]  # zoomed when it is shown
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
    assert "Wrong answers stray further: AUC 0." in lines[0] and "over the last 20 steps" in lines[0]
    assert page.locator("#flow figure").count() == 9
    assert "0.5: no better than chance" in page.locator("#flow figure >> nth=0").inner_text()
    levels = page.locator("#flow .plot").nth(0).evaluate("node => node.data.filter((trace) => trace.y.every((y) => y === 0.5)).length")
    assert levels == 1
    windows = block(demo, "flow-tokens")
    assert [(part["first"], part["last"]) for part in windows] == [(2, 8), (10, 16), (18, 24), (26, 32), (34, 40)]
    for sign in ("rewarded", "penalised"):
        for at, part in enumerate(windows):
            rows = page.locator(f".windows.{sign} .token-table >> nth={at}").locator("tr[data-token]")
            assert rows.evaluate_all("nodes => nodes.map((node) => node.dataset.token)") == [row["token"] for row in part[sign][:15]]
    page.fill("#token-filter", "the")
    assert set(page.locator("tr[data-token]").evaluate_all("nodes => nodes.map((node) => node.dataset.token)")) <= {" the", " them", "The"}
    page.reload()
    page.wait_for_selector("#tokens tr")
    assert page.input_value("#token-filter") == "the"
    page.fill("#token-filter", "")
    row = windows[2]["rewarded"][0]
    page.locator(".windows.rewarded .token-table >> nth=2").locator(".chip >> nth=0").click()
    page.wait_for_selector("#groups .response.found .token.found")
    group_ = read_rollouts(next(f for f in read_run(demo.parent).rollout_files if f.step == row["place"]["step"]), [])[
        row["place"]["group"]
    ]
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
    colours = "node => new Set(new Uint32Array(node.getContext('2d').getImageData(0, 0, node.width, node.height).data.buffer)).size"
    assert page.locator("#latent-map").evaluate(colours) > 50
    report.evaluate("() => { const s = byId('latent-step'); s.value = 3; s.dispatchEvent(new Event('input')); }")
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
    assert "What is the sum of the two digits" in tip and "reward" in tip and "click to read it" in tip
    page.mouse.click(box["x"] + x, box["y"] + y)
    page.wait_for_selector("#groups .response.found")
    assert report.evaluate("Number(browser.settings.step)") == report.evaluate("(at) => map.points.step[at]", at)
    assert not report.complaints


@needs_browser
@pytest.mark.parametrize("state", ["no_events", "empty_events", "torn_events", "no_flow", "one_step", "earlier_version", "no_rollouts"])
def test_views_show_what_there_is_and_say_what_is_not(tmp_path, state, open_report):
    run = make_run(tmp_path / state, steps=1 if state == "one_step" else 12)
    said = {"flow": "Wrong answers stray further", "latents": "Right and wrong answers lie apart", "overview": "Events"}
    if state == "no_events":
        for name in ("events.jsonl", "rolled_back.jsonl"):
            (run / name).unlink()
        said["overview"] = "No events: the monitors said nothing, or the run had none."
    if state == "empty_events":
        (run / "events.jsonl").write_text("")
        said["overview"] = "No events"
    if state == "torn_events":
        text = (run / "events.jsonl").read_text()
        (run / "events.jsonl").write_text("no json\n" + text[: len(text) - 40])
        said["overview"] = "events.jsonl: 1 lines are not JSON objects, first line 1; left out"
    if state in ("no_flow", "earlier_version"):
        kept = ("flow/loss", "flow/advantage_share") if state == "earlier_version" else ()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        write_jsonl(run / "metrics.jsonl", [{k: v for k, v in row.items() if not k.startswith("flow/") or k in kept} for row in rows])
        for step in range(1, 13):
            rows = rows_of(run, step)
            flow = {"latent": None} if state == "earlier_version" else {"latent": None, "flow_rewards": None, "deviations": None}
            write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", [{**row, **flow} for row in rows])
        said["latents"] = "No latents: this run has no flow section, or was written by an earlier version."
        said["flow"] = "flow/auc was not logged (a run of an earlier version)"
        if state == "no_flow":
            (run / "config.resolved.yaml").write_text("train:\n  steps: 12\nflow: null\n")
            said["flow"] = "This run has no flow section: it was trained without flow rewards."
    if state == "one_step":
        said["flow"] = "No verdict on right and wrong yet: of the last 20 steps, 5 need a value of flow/auc."
        said["latents"] = "No verdict on drift: there is one step."
    if state == "no_rollouts":
        for path in (run / "rollouts").glob("*.jsonl"):
            path.unlink()
        said["latents"] = "No rollouts yet"
    report = open_report(write_report(run))
    for view, text in said.items():
        report.show(view)
        assert text in report.page.inner_text(f"#{view}"), view
    if state in ("torn_events", "one_step"):
        report.show("curves")
    assert not report.complaints


@needs_browser
def test_hostile_text_in_events_tokens_and_latents_stays_text(tmp_path, open_report):
    run = make_run(tmp_path / "run", steps=6, signed=True)
    event = {"step": 3, "since": -1e300, "value": math.nan, "limit": 1e308, "to": math.inf}
    hostile = dict.fromkeys(("monitor", "action", "what", "cause", "do"), MALICE)
    write_jsonl(
        run / "events.jsonl",
        [{**event, **hostile}, {**event, **hostile, "step": 1e308}, {**event, "what": "<b>%{x} </b><a href='x'>y</a>" * 999}],
    )
    write_jsonl(run / "rolled_back.jsonl", [{"roll_back": MALICE, "step": [1e308]}])
    for step in range(1, 7):
        rows = rows_of(run, step)
        for at, row in enumerate(rows):
            row.update(question=MALICE, prediction=MALICE, tokens=[MALICE, "\ud800", "\u202e\u0007", *row["tokens"][3:]])
            row["flow_rewards"][:4] = [1.0, -1.0, -0.5, 1e308]
            row["latent"][0] = (math.nan, 1e308, "1", row["latent"][0], row["latent"][0])[at % 5]
            row["latent"] = {} if at == 3 else row["latent"] * (2 if at == 4 else 1)
        write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", rows)
    report = open_report(write_report(run))
    page = report.page
    for view in ("overview", "curves", "flow", "latents", "rollouts"):
        report.show(view)
    assert "latents are not numbers of one length; left out" in page.locator("#problems").text_content()
    report.show("overview")
    said = page.inner_text("#events")
    assert "</script><script>window.hacked=1</script>" in said and "U+202E" in said and "\u202e" not in said
    report.show("curves")
    plot = page.locator("#curves .plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    x = plot.evaluate("node => node._fullLayout.xaxis._offset + node._fullLayout.xaxis.c2p(3)")
    page.mouse.move(box["x"] + x, box["y"] + 80)
    page.wait_for_selector("#curves .hoverlayer .legend")
    assert "<script>window.hacked=1" in page.locator("#curves .hoverlayer:has(.legend)").text_content()
    assert page.locator("#curves .hoverlayer a").count() == 0
    assert plot.evaluate("node => node._fullLayout.xaxis.range[1]") < 20
    report.show("flow")
    tokens = page.inner_text("#tokens")
    assert "</script><script>window.hacked=1" in tokens and "U+202E" in tokens and "\u202e" not in tokens
    page.fill("#token-filter", MALICE)
    page.fill("#token-filter", "")
    report.show("latents")
    box = page.locator("#latent-map").bounding_box()
    x, y = report.evaluate("pointPlace(map.frames[map.at].points[0])")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert "window.hacked=1" in page.inner_text("#tooltip") and "\u202e" not in page.inner_text("#tooltip")
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
