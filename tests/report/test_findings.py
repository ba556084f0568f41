"""Events, the flow's verdict and tokens, and latents, as figures."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from rlfr_vlm.report import flow_tokens, latents
from rlfr_vlm.report.events import MAX_EVENTS, read_events
from rlfr_vlm.report.flow_health import flow_health
from rlfr_vlm.report.flow_tokens import Occurrence, TokenCensus
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.latents import (
    ERROR,
    RIGHT,
    WRONG,
    LatentCensus,
    centroid_drift,
    latent_view,
    principal_plane,
    separability,
)
from rlfr_vlm.report.run_files import Group, Metrics, Response, read_run
from rlfr_vlm.report.yardstick import read_yardstick
from tests.report.test_report import make_run, page_data, write_jsonl, yardstick


def response(tokens=(), flow=None, verdict="correct", latent=None) -> Response:
    traces = {} if flow is None else {"flow_rewards": tuple(flow)}
    latent = None if latent is None else np.array(latent, dtype=np.float32)
    return Response(
        0,
        "".join(tokens),
        "7",
        verdict,
        "",
        1.0,
        {},
        "stop",
        0,
        tuple(tokens),
        traces,
        latent=latent,
    )


def group(*responses: Response, step: int = 1) -> Group:
    return Group(step, "id", "a question", "7", "", (), responses)


# Events.


def test_events_keep_the_order_of_the_file_and_name_what_is_no_event(tmp_path):
    rows = [
        {"step": 9, "monitor": "b", "action": "roll_back", "to": 4, "what": "x"},
        {"step": 5, "monitor": "a", "value": math.nan},
    ]
    write_jsonl(
        tmp_path / "events.jsonl",
        [
            *rows,
            {"step": None, "monitor": "c"},
            {"step": 3},
            {"step": 6, "what": ["odd"], "limit": 10**400},
        ],
    )
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 7, "moni')
    write_jsonl(
        tmp_path / "rolled_back.jsonl",
        [{"roll_back": n, "step": s} for n, s in ((1, 5), (1, 6), (1, 6), (2, 6))],
    )
    problems = []
    log = read_events(tmp_path, problems)
    assert [(event.step, event.action, event.to) for event in log.events] == [
        (9, "roll_back", 4),
        (5, "", None),
        (6, "", None),
    ]
    assert (
        log.events[1].value is None
        and log.events[2].limit is None
        and log.events[2].what == '["odd"]'
    )
    assert (log.num_roll_backs, log.num_steps_taken_back) == (2, 3)
    assert "2 events name no step, or neither monitor nor text; left out" in [
        problem.text for problem in problems
    ]


def test_no_events_file_is_no_problem_and_a_long_one_keeps_the_last(tmp_path):
    problems = []
    assert read_events(tmp_path, problems).events == ()
    write_jsonl(
        tmp_path / "events.jsonl",
        [{"step": step, "monitor": "m"} for step in range(5 * MAX_EVENTS // 2)],
    )
    log = read_events(tmp_path, problems)
    assert (len(log.events), log.events[-1].step, log.num_left_out) == (
        MAX_EVENTS,
        5 * MAX_EVENTS // 2 - 1,
        3 * MAX_EVENTS // 2,
    )
    assert not problems


# The flow's health.


def flow_metrics(**series: list[float | None]) -> Metrics:
    named = {f"flow/{name}": tuple(values) for name, values in series.items()}
    return Metrics(tuple(range(1, 1 + max(map(len, named.values())))), named)


@pytest.mark.parametrize(
    ("aucs", "level", "text"),
    [
        (
            [0.2] * 20 + [0.6, 0.8] * 10,
            "good",
            "Wrong answers stray further: AUC 0.70 ± 0.05 over the last 20 steps.",
        ),
        (
            [0.3, 0.5] * 10,
            "bad",
            "Right answers stray further than wrong ones: AUC 0.40 ± 0.05 over the last 20 steps. "
            "The flow reward",
        ),
        (
            [0.3, 0.7] * 10,
            "plain",
            "The field tells right from wrong no better than chance: AUC 0.50 ± 0.09",
        ),
        (
            [0.9] * 4,
            "none",
            "No verdict on right and wrong yet: of the last 20 steps, 5 need a value of flow/auc.",
        ),
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
        and "but not clearly among siblings: AUC 0.70 ± 0.05 over the last 20 steps, AUC 0.50 ± "
        "0.05 among siblings"
        in told.text
    )
    assert verdict(auc=chance, auc_in_group=high).text.startswith(
        "Among siblings, wrong answers stray further"
    )
    assert verdict(auc=chance, auc_in_group=low).level == "bad"
    assert verdict(auc_in_group=high).text.endswith(
        "AUC 0.70 ± 0.05 over the last 20 steps, among siblings."
    )


def test_readings_compare_the_first_and_the_last_tenth():
    health = flow_health(
        flow_metrics(
            loss=[2.0, 4.0, *[9.0] * 16, 1.0, 2.0], drift=[0.1] * 20, advantage_share=[0.25] * 20
        ),
        {},
    )
    assert health.readings["flow/loss"].endswith("This run: 3 → 1.5.")
    assert [verdict.text for verdict in health.verdicts[1:]] == [
        "25.0 % of the size of the advantages comes from the flow (last 20 steps).",
        "The field's loss fell from 3 to 1.5, and its weights moved 10.0 % from where the run "
        "began.",
    ]
    assert (
        "This run" not in flow_health(flow_metrics(loss=[2.0, 4.0, 3.0]), {}).readings["flow/loss"]
    )
    absurd = flow_health(
        flow_metrics(loss=[1e308] * 20, auc=[1e99] * 20), {}
    )  # sums would overflow
    assert [verdict.level for verdict in absurd.verdicts] == ["none"]


@pytest.mark.parametrize(
    ("charged", "straying", "level", "text"),
    [
        (
            [0.3, 0.5],
            [0.6, 0.8],
            "bad",
            "AUC 0.70 ± 0.05 of the deviation, AUC 0.40 ± 0.05 of what is charged: right answers "
            "are charged more",
        ),
        (
            [0.6, 0.8],
            [0.5, 0.7],
            "good",
            "AUC 0.60 ± 0.05 of the deviation, AUC 0.70 ± 0.05 of what is charged: wrong answers "
            "are charged",
        ),
        (
            [0.4, 0.6],
            [0.6, 0.8],
            "plain",
            "no better than chance: what the deviations know is lost on the way.",
        ),
        ([0.4, 0.6], [0.4, 0.6], "plain", "of what is charged, which is no better than chance."),
    ],
)
def test_what_is_charged_stands_beside_the_deviation(charged, straying, level, text):
    verdicts = flow_health(
        flow_metrics(charged_auc_in_group=charged * 10, auc_in_group=straying * 10, auc=[0.7] * 20),
        {},
    ).verdicts
    assert (verdicts[1].level, verdicts[1].text.startswith("Among siblings: ")) == (
        level,
        True,
    ) and text in verdicts[1].text
    turned = "What makes rewards of deviations turns them round." in verdicts[1].text
    assert turned == (level == "bad")


def test_the_charge_has_a_place_and_what_explains_it():
    found = lambda **series: [  # noqa: E731
        v.text
        for v in flow_health(flow_metrics(**series), {}).verdicts
        if v.text.startswith("The charge")
    ]
    assert found(
        charge_place=[0.25] * 9, charge_by_token=[0.6] * 9, charge_by_place=[0.125] * 9
    ) == [
        "The charge falls at 0.25 of a response on average (0: its start, 1: its end); it is "
        "explained to 60.0 % by the token's identity and to 12.5 % by its place, which need no "
        "field. Most of it says which tokens there are, or where, not what the policy thought."
    ]
    assert found(charge_by_place=[0.125] * 9) == [
        "The charge is explained to 12.5 % by its place, which need no field."
    ]
    assert found(charge_place=[0.25] * 4, auc=[0.5] * 9) == []  # too few steps
    readings = flow_health(
        flow_metrics(charge_by_token=[0.6] * 20, charged_auc_in_group=[0.5] * 20), {}
    ).readings
    assert readings["flow/charge_by_token"].endswith(
        "100 %: a table of tokens would do. This run: 60.0 % → 60.0 %."
    )


def test_the_loss_is_held_against_a_field_that_knows_nothing():
    of = lambda loss, flow: flow_health(flow_metrics(loss=[loss] * 20), {"flow": flow})  # noqa: E731
    field = lambda loss, flow: of(loss, flow).verdicts[-1]  # noqa: E731
    assert (
        field(1.5, {"times": [0.8]}).text
        == "The field's loss stayed near 1.5; v = x_t / t, which knows nothing, has 1.56."
    )
    assert field(1.5, {"times": [0.8]}).level == "plain"
    worse = field(1.7, {"times": [0.8]})
    assert worse.level == "bad" and worse.text.endswith(
        "the field is worse, and its deviations are noise. It needs a longer fit."
    )
    assert field(11.0, {"times": [0.8], "online": {"times": "logit_normal"}}).level == "plain"
    assert "above 1.56, the dotted line" in of(1.5, {"times": [0.8]}).readings["flow/loss"]
    for odd in (
        None,
        [],
        [0],
        [2],
        ["x"],
        [0.8, None],
        [math.nan],
        "0.8",
        0.8,
        {},
        [True],
        [10**400],
        [1e-300],
    ):
        assert field(1.7, {"times": odd}).text == "The field's loss stayed near 1.7.", odd
    assert of(1.7, {"times": [0.8], "online": {"times": ["x"]}}).reference is None
    assert of(1.7, {"times": [0.8], "online": "x"}).reference == pytest.approx(1.5625)


# The yardstick of the fit.


def test_the_yardstick_is_the_runs_own_or_that_of_its_checkpoint(tmp_path):
    own, fitted = tmp_path / "run", tmp_path / "fitted"
    (own / "flow").mkdir(parents=True)
    fitted.mkdir()
    config, problems = {"flow": {"checkpoint": str(fitted)}}, []
    assert read_yardstick(own, config, problems) is None
    (fitted / "flow_yardstick.json").write_text(json.dumps(yardstick()))
    found = read_yardstick(own, config, problems)
    assert found.source == f"{fitted}/flow_yardstick.json"
    assert [(row.layer, row.at) for row in found.rows[:3]] == [
        (-1, "reward"),
        (-1, "fit"),
        (1, "reward"),
    ]
    assert [(auc.name, auc.auc, auc.low, auc.pairs) for auc in found.aucs] == [
        ("deviation", 0.8, 0.77, 2650),
        ("charged", 0.41, 0.37, 2650),
    ]
    (own / "flow/flow_yardstick.json").write_text(
        json.dumps({"deviation": yardstick()["deviation"]})
    )
    found = read_yardstick(own, config, problems)
    assert (
        found.source == "flow/flow_yardstick.json"
        and found.aucs == ()
        and found.num_responses is None
        and not problems
    )
    health = flow_health(Metrics((1,), {"flow/loss": (1.0,)}), {}, found)
    assert [(v.level, v.text) for v in health.verdicts if v.text.startswith("The fit")] == [
        (
            "good",
            "The fit's held-out deviation at the reward's times is 0.49; x_t / t has 1.57, the "
            "best that needs no field (Gaussian given it) 1.19.",
        )
    ]
    assert (
        flow_health(Metrics((1,), {}), {"flow": {}}, found).verdicts[0].level == "good"
    )  # before the first step


def test_odd_values_in_a_yardstick_are_left_out(tmp_path):
    path, problems = tmp_path / "flow_yardstick.json", []
    read = lambda text: (path.write_text(text), read_yardstick(tmp_path, {}, problems))[1]  # noqa: E731
    rows = [
        None,
        1,
        {},
        {"layer": "x", "at": "fit", "field": 1},
        {"layer": 1, "at": [], "field": 1},
        {"layer": 1, "at": "fit", "field": "x"},
    ]
    rows += [
        {
            "layer": -1,
            "at": "reward",
            "field": 2.0,
            "zero": None,
            "x_t / t": math.nan,
            "n" * 999: 10**400,
        }
    ]
    aucs = {
        "a": 3,
        "b": {},
        "c": {"auc": "x"},
        "d": {"auc": 7},
        "e": {"auc": 0.5, "low": math.inf, "high": [], "pairs": "x"},
    }
    found = read(
        json.dumps(
            {"deviation": rows, "separation": {"responses": [], "accuracy": {}, "auc": aucs}}
        )
    )
    assert [row.values for row in found.rows] == [{"field": 2.0}]
    assert [(auc.name, auc.low, auc.high, auc.pairs) for auc in found.aucs] == [
        ("e", None, None, None)
    ]
    assert flow_health(Metrics((1,), {"flow/loss": (1.0,)}), {}, found).for_page()["yardstick"][
        "names"
    ] == ["field"]
    for tree in (
        {},
        {"deviation": {}, "separation": []},
        {"deviation": "x", "separation": {"auc": [1]}},
    ):
        assert read(json.dumps(tree)) is None
    assert not problems
    assert read('{"deviation": [') is None and problems[0].file == "flow_yardstick.json"
    for odd in ("\ud800", "a\0b", "x" * 5000, "", 3, [], None):
        path.unlink(missing_ok=True)
        assert read_yardstick(tmp_path, {"flow": {"checkpoint": odd}}, problems) is None


def test_the_page_carries_the_yardstick_and_a_run_without_one_does_not(tmp_path):
    run = make_run(tmp_path / "run", steps=6)
    flow = page_data(write_report(run))["flow"]
    assert (
        flow["yardstick"]["names"][0] == "field"
        and flow["yardstick"]["source"] == "flow/flow_yardstick.json"
    )
    assert any(
        line["level"] == "bad" and "right answers are charged more" in line["text"]
        for line in flow["verdicts"]
    )
    (run / "flow/flow_yardstick.json").unlink()
    assert page_data(write_report(run))["flow"]["yardstick"] is None
    assert read_run(run).problems == ()


def test_a_run_without_flow_figures_says_why():
    steps = Metrics((1, 2), {"reward/mean": (0.1, 0.2)})
    assert "no flow section" in flow_health(steps, {"flow": None}).missing
    assert "names none" in flow_health(steps, {"flow": {"checkpoint": "x"}}).missing
    assert "No metrics yet" in flow_health(Metrics(), {"flow": {}}).missing


# Tokens.


def test_tokens_are_summed_by_window_with_counts_shares_and_a_place():
    census = TokenCensus([1, 2])
    census.add(2, [group(response(["a", "b"], [0.5, -1.0]))], num_on_page=0)
    here = [
        response(["a", "b", "a"], [0.25, 0.0, 0.5]),
        response(["b", "c"], [-0.5, None], "wrong"),
        response(["a"], None),
    ]
    census.add(1, [group(response(["a"], [-2.0], "error")), group(*here)], num_on_page=2)
    first, second = census.for_page()
    assert (first["first"], first["last"], second["first"]) == (1, 1, 2)
    assert [(row.token, row.reward, row.count, row.in_right) for row in first["penalised"]] == [
        ("a", -1.25, 3, 1.0),
        ("b", -0.5, 2, 1.0),
    ]
    assert (first["penalised"][0].place, first["rewarded"]) == (
        Occurrence(step=1, group=0, response=0, token=0, on_page=True),
        [],
    )
    assert first["penalised"][1].in_wrong == 1.0
    assert first["penalised"][1].place.response == 1
    assert [row.token for row in second["rewarded"]] == ["a"]
    assert second["rewarded"][0].place.on_page is False
    assert second["rewarded"][0].in_wrong is None


def test_windows_cover_all_steps_once_and_a_place_on_the_page_is_preferred():
    census = TokenCensus(range(10, 33))
    spans = [(window.first, window.last) for window in census.windows]
    assert (spans[0][0], spans[-1][1], len(spans)) == (10, 32, 5)
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(spans))
    census.add(10, [group(response(["a"], [0.1])), group(response(["a"], [0.9]))], num_on_page=1)
    assert census.for_page()[0]["rewarded"][0].place.group == 0
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
    assert census.for_page()[0]["penalised"][0].token == "strong"
    assert census.for_page()[0]["penalised"][0].count == 20
    huge = TokenCensus([1])
    huge.add(1, [group(response(["x", "x", "y"], [1e308, 1e308, 0.1]))], 1)
    assert [row.token for row in huge.for_page()[0]["rewarded"]] == ["y"]


# Latents.


def test_the_plane_holds_the_directions_of_most_variance_with_right_answers_up_and_right():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) * [1, 5, 1, 3, 1, 1]
    verdict = np.where(x[:, 1] - x[:, 3] > 0, WRONG, RIGHT)
    plane, explained = principal_plane(x - x.mean(axis=0), verdict)
    assert (
        abs(np.corrcoef(plane[:, 0], x[:, 1])[0, 1]) > 0.99
        and abs(np.corrcoef(plane[:, 1], x[:, 3])[0, 1]) > 0.99
    )
    assert explained == pytest.approx((25 / 38, 9 / 38), abs=0.05)
    assert (plane[verdict == RIGHT].mean(axis=0) > plane[verdict == WRONG].mean(axis=0)).all()
    assert principal_plane(np.array([[-1.0], [1.0]]), np.array([RIGHT, WRONG]))[1] == (1.0, 0.0)


def siblings(rng, steps: int, groups: int, apart: float, hard: float) -> tuple[np.ndarray, ...]:
    """8 responses a group; right and wrong ones differ by `apart` along axis 0, hard and easy
    questions by `hard` along axis 1.
    """
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
    noise = rng.normal(
        size=(len(x), 400)
    )  # a fit on the tested responses themselves would separate these
    assert mean_of(separability(noise, verdict, step)) == pytest.approx(0.5, abs=0.06)


def test_a_direction_that_tells_hard_questions_gains_nothing_among_siblings():
    x, verdict, step, group_ = siblings(
        np.random.default_rng(2), steps=30, groups=4, apart=0.0, hard=3.0
    )
    assert mean_of(separability(x, verdict, step)) > 0.7
    assert mean_of(separability(x, verdict, step, group_)) == pytest.approx(0.5, abs=0.05)


def test_steps_with_too_few_responses_have_no_separability():
    x, verdict, step, _ = siblings(np.random.default_rng(3), steps=6, groups=4, apart=2.0, hard=0.0)
    few = verdict.copy()
    few[(step == 2) & (np.cumsum((step == 2) & (verdict == RIGHT)) > 4)] = ERROR
    assert [at for at, auc in enumerate(separability(x, few, step)) if auc is None] == [2]
    assert separability(x, np.full_like(verdict, RIGHT), step) == (None,) * 6
    assert separability(x[step == 0], verdict[step == 0], step[step == 0]) == (
        None,
    )  # nothing else to fit on
    assert mean_of(separability(np.ones_like(x), verdict, step)) == 0.5


def test_drift_is_in_spreads_and_chance_is_what_the_questions_scatter_gives():
    rng = np.random.default_rng(4)
    step, group_ = np.repeat(np.arange(40), 32), np.repeat(np.arange(160), 8)
    still = rng.normal(size=(160, 64))[group_] + 0.5 * rng.normal(size=(1280, 64))
    drift, chance = centroid_drift(still, step, group_)
    assert np.mean(drift[4:]) == pytest.approx(np.mean(chance), rel=0.15)
    moving = still + 0.2 * step[:, None] * np.eye(64)[0] * math.sqrt(64 * 1.25)
    assert centroid_drift(moving, step, group_)[0][-1] == pytest.approx(0.2 * (39 - 1.5), rel=0.1)
    assert centroid_drift(np.zeros((4, 2)), np.arange(4), np.arange(4)) == (
        (None,) * 4,
        (None,) * 4,
    )
    assert centroid_drift(np.array([[1.0], [3.0]]), np.zeros(2, int), np.zeros(2, int)) == (
        (0.0,),
        (None,),
    )


def test_unusable_latents_are_counted_and_points_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(latents, "MAX_POINTS", 20)
    census, rng, problems = LatentCensus(range(10)), np.random.default_rng(5), []
    for step in range(10):
        bad = (
            [
                response(latent=values)
                for values in ([math.nan, 1.0], [], [1.0, 2.0, 3.0], [math.inf, 0.0])
            ]
            if step == 3
            else []
        )
        census.add(
            step,
            [
                group(response(), *bad, *(response(latent=rng.normal(size=2)) for _ in range(6))),
                group(response(latent=[9, 9])),
            ],
            1,
        )
    view = latent_view(census, problems)
    assert [problem.text for problem in problems] == [
        "4 latents are not numbers of one length; left out"
    ]
    assert view.num_responses == 70
    assert view.points["step"] == [step for step in range(10) for _ in range(2)]
    assert set(view.points["group"]) == {0}  # those that can be opened come first
    assert latent_view(LatentCensus([1]), []) is None
    same = LatentCensus([1])
    same.add(1, [group(*(response(latent=[2.0, 2.0]) for _ in range(3)))], 1)
    assert latent_view(same, []) is None
