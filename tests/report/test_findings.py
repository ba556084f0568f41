"""Events, the flow's verdict and tokens, and latents, as figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlfr_vlm.report import flow_tokens, latents
from rlfr_vlm.report.events import MAX_EVENTS, read_events
from rlfr_vlm.report.flow_health import flow_health
from rlfr_vlm.report.flow_tokens import TokenCensus
from rlfr_vlm.report.latents import ERROR, RIGHT, WRONG, LatentCensus, centroid_drift, latent_view, principal_plane, separability
from rlfr_vlm.report.run_files import Group, Metrics, Response
from tests.report.test_report import write_jsonl


def response(tokens=(), flow=None, verdict="correct", latent=None) -> Response:
    traces = {} if flow is None else {"flow_rewards": tuple(flow)}
    latent = None if latent is None else np.array(latent, dtype=np.float32)
    return Response(0, "".join(tokens), "7", verdict, "", 1.0, {}, "stop", 0, tuple(tokens), traces, latent=latent)


def group(*responses: Response, step: int = 1) -> Group:
    return Group(step, "id", "a question", "7", "", (), responses)


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
