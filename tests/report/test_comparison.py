"""Runs beside each other: paired differences by hand, what is refused in words, seeds pooled, and
the page in a browser.
"""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml

from rlfr_vlm.cli import main
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.statistics import mcnemar, paired
from rlfr_vlm.report.comparison import differing, method, names, read_compared, seed_groups
from rlfr_vlm.report.comparison_page import write_comparison
from rlfr_vlm.report.pooling import band, pooled, t_quantile
from tests.report.browser import needs_browser
from tests.report.test_report import MALICE, make_run, metrics_row, write_jsonl

CONFIG = {
    "seed": 0,
    "output_dir": "runs/x",
    "algorithm": {"method": "grpo"},
    "flow": None,
    "optim": {"lr": 1e-6},
    "train": {"steps": 4},
}


def evaluated(
    run: Path,
    step: int,
    right: dict[str, list[int]],
    greedy: dict[str, int],
    temperature: float = 1.0,
) -> None:
    """An evaluation as training writes it. right: per problem which samples are right; greedy:
    whether that answer is.
    """
    rows = [
        {
            "id": key,
            "sample_index": at,
            "response": f"step {step}: {key}, sample {at}",
            "prediction": "1",
            "answer": f"gold {key}",
        }
        | {"verdict": "correct" if correct else "wrong", "finish_reason": "stop"}
        for key, samples in right.items()
        for at, correct in enumerate(samples)
    ]
    rows += [
        {
            "id": key,
            "sample_index": -1,
            "response": f"step {step}: {key}, greedy",
            "prediction": str(correct),
            "answer": f"gold {key}",
        }
        | {"verdict": "correct" if correct else "wrong", "finish_reason": "stop"}
        for key, correct in greedy.items()
    ]
    write_jsonl(run / f"eval/step_{step:06d}.jsonl", rows)
    share = sum(sum(samples) / len(samples) for samples in right.values()) / len(right)
    summary = {
        "step": step,
        "accuracy": share,
        "accuracy_ci": [max(0, share - 0.1), min(1, share + 0.1)],
        "greedy": 0.5,
    }
    summary |= {
        "num_problems": len(right),
        "num_samples": len(next(iter(right.values()))),
        "temperature": temperature,
        "pictures": "as_is",
    }
    (run / f"eval/step_{step:06d}.json").write_text(json.dumps(summary))


def small_run(folder: Path, steps: int = 4, **config) -> Path:
    """A run without evaluations."""
    (folder / "eval").mkdir(parents=True)
    rng = random.Random(str(folder))
    tree = {**CONFIG, "output_dir": str(folder), **config}
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(tree))
    (folder / "env.json").write_text('{"versions": {"torch": "2.13.0"}}')
    write_jsonl(
        folder / "metrics.jsonl", [metrics_row(rng, step, 0.5) for step in range(1, steps + 1)]
    )
    return folder


A = {"p1": [1, 1], "p2": [0, 0], "p3": [1, 0], "p4": [0, 0]}
B = {"p1": [1, 1], "p2": [1, 1], "p3": [1, 1], "p4": [1, 0]}
GREEDY_A, GREEDY_B = {"p1": 1, "p2": 0, "p3": 1, "p4": 0}, {"p1": 1, "p2": 1, "p3": 0, "p4": 0}


def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    first, second = (
        small_run(tmp_path / "first"),
        small_run(tmp_path / "second", optim={"lr": 2e-6}),
    )
    evaluated(first, 4, A, GREEDY_A)
    evaluated(second, 4, B, GREEDY_B)
    return first, second


def page_data(path: Path) -> dict:
    return json.loads(re.search(r'id="comparison-data">(.*?)</script>', path.read_text(), re.S)[1])


# Numbers.


def test_the_difference_is_paired_by_problem_and_flips_are_of_greedy_answers(tmp_path):
    versus = read_compared(two_runs(tmp_path))[1].versus
    assert versus.steps == (4, 4)
    assert versus.change == paired(
        [[True, True], [False, False], [True, False], [False, False]],
        [[True] * 2] * 3 + [[True, False]],
    )
    assert versus.change.difference.value == pytest.approx((0 + 1 + 0.5 + 0.5) / 4)
    assert (
        versus.change.p_value == 0.25
    )  # signs of three differences: two of the eight sums are as large
    assert (versus.gained, versus.lost, versus.words) == (("p2",), ("p3",), ())


def test_one_sample_per_problem_gives_mcnemars_p_value(tmp_path):
    first, second = small_run(tmp_path / "a"), small_run(tmp_path / "b", seed=1)
    evaluated(
        first, 2, {f"p{n}": [0] for n in range(8)}, dict.fromkeys((f"p{n}" for n in range(8)), 0)
    )
    evaluated(
        second,
        2,
        {f"p{n}": [int(n < 6)] for n in range(8)},
        dict.fromkeys((f"p{n}" for n in range(8)), 1),
    )
    change = read_compared([first, second])[1].versus.change
    assert (change.p_value, change.test) == (mcnemar(0, 6), "McNemar, exact")


def test_samples_without_a_verdict_are_in_no_accuracy_and_no_flip(tmp_path):
    first, second = two_runs(tmp_path)
    path = second / "eval/step_000004.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["id"] == "p4" or (row["id"], row["sample_index"]) == ("p2", -1):
            row["verdict"] = "error"
    write_jsonl(path, rows)
    versus = read_compared([first, second])[1].versus
    assert versus.change.difference.num_problems == 3
    assert versus.gained == ()
    assert versus.words == (
        "1 problems without a graded sample in one of the two are left out",
        "2 problems without a graded greedy answer in one of the two are in no flip",
    )


def test_bands_over_seeds_by_hand():
    found = band([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.mean, found.low, found.high, found.num_runs) == (
        2.0,
        pytest.approx(2 - half),
        pytest.approx(2 + half),
        3,
    )
    assert pooled([{1: 1.0, 2: 5.0, 3: 9.0}, {1: 3.0, 3: 9.0}]).keys() == {
        1,
        3,
    }  # where every seed has a value
    assert pooled([{1: 1.0, 3: 9.0}, {1: 3.0, 3: 9.0}])[3].low == 9.0
    assert pooled([{1: 1.0}]) == {}


def test_t_quantiles_are_those_of_printed_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 10: 2.2281, 20: 2.0860, 30: 2.0423, 120: 1.9799}
    for degrees, value in table.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=6e-5)
    assert t_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)


# What is refused, in words.


def words(tmp_path: Path, change) -> tuple[str, ...]:
    first, second = two_runs(tmp_path)
    change(second)
    versus = read_compared([first, second])[1].versus
    assert versus.change is None
    assert (versus.gained, versus.lost) == ((), ())
    return versus.words


def test_other_problems_are_not_compared(tmp_path):
    others = {**{key: B[key] for key in ("p1", "p2")}, "q9": [1, 1]}
    said = words(tmp_path, lambda run: evaluated(run, 4, others, dict.fromkeys(others, 1)))
    assert said == (
        "not compared: other problems: 2 only in the first run (as p3), 1 only in this one (as q9)",
    )


def test_the_same_ids_with_other_gold_answers_are_not_compared(tmp_path):
    def regold(run: Path) -> None:
        path = run / "eval/step_000004.jsonl"
        path.write_text(path.read_text().replace('"gold p3"', '"gold of another data set"'))

    assert words(tmp_path, regold) == ("not compared: other gold answers to 1 problems, first p3",)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "eval/step_000004.jsonl is not there"),
        (lambda path: path.write_text(""), "eval/step_000004.jsonl holds no response"),
        (
            lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3])),
            "holds 9 of 12 responses",
        ),
        (
            lambda path: path.write_text(path.read_text()[:-20]),
            "eval/step_000004.jsonl: the last line is not whole",
        ),
        (lambda path: path.write_text(path.read_text() * 2), "12 responses are there twice"),
        (lambda path: path.write_text('{"id": 3}\n' + path.read_text()), "1 have no id"),
        (
            lambda path: (path.with_suffix(".json").unlink(), path.unlink()),
            "this run: no evaluation",
        ),
    ],
)
def test_an_evaluation_that_is_missing_or_torn_is_not_compared(tmp_path, damage, said):
    (text,) = words(tmp_path, lambda run: damage(run / "eval/step_000004.jsonl"))
    assert text.startswith("not compared: this run: ")
    assert said in text


def test_the_last_common_step_is_compared_else_the_last_of_each_and_it_is_said(tmp_path):
    first, second = two_runs(tmp_path)
    evaluated(first, 2, A, GREEDY_A)
    evaluated(second, 2, A, GREEDY_A)
    (first / "eval/step_000004.json").rename(first / "eval/step_000003.json")
    versus = read_compared([first, second])[1].versus
    assert versus.steps == (2, 2)
    assert versus.words == ("compared at step 2, the last that both evaluated",)
    (second / "eval/step_000002.json").unlink()
    (first / "eval/step_000003.json").unlink()
    versus = read_compared([first, second])[1].versus
    assert versus.steps == (2, 4)
    assert versus.words == ("compared at step 4 against step 2: no step was evaluated in both",)


def test_another_temperature_is_said(tmp_path):
    first, second = two_runs(tmp_path)
    evaluated(second, 4, B, GREEDY_B, temperature=0.6)
    assert read_compared([first, second])[1].versus.words == (
        "temperature: 0.6 here, 1 in the first run",
    )


# What differs, and which runs are one.


def test_only_what_differs_is_listed_and_a_section_that_is_left_out_counts_once(tmp_path):
    flow = {"reward": {"coef": 0.01, "gamma": 1.0}, "checkpoint": "CHECKPOINT"}
    folders = [
        small_run(tmp_path / "a"),
        small_run(
            tmp_path / "b",
            flow={**flow, "checkpoint": str(tmp_path / "b/flow")},
            optim={"lr": 1e-6, "betas": [0.9]},
        ),
        small_run(
            tmp_path / "c",
            flow={
                **flow,
                "checkpoint": str(tmp_path / "c/flow"),
                "reward": {"coef": 0.02, "gamma": 1.0},
            },
        ),
        tmp_path / "d",
    ]
    (tmp_path / "d").mkdir()
    (tmp_path / "c/env.json").write_text('{"versions": {"torch": "2.14.0"}}')
    runs = read_compared(folders)
    assert [(row.key, row.values, row.unknown) for row in differing(runs)] == [
        ("flow", ("none", "on", "on", "–"), False),
        ("flow.reward.coef", ("–", "0.01", "0.02", "–"), False),
        ("optim.betas", ("–", "[0.9]", "–", "–"), True),
        ("env: torch", ("2.13.0", "2.13.0", "2.14.0", "–"), False),
    ]
    assert [method(run.settings) for run in runs] == ["grpo", "grpo + flow", "grpo + flow", ""]
    assert {row.key for row in differing([runs[0], runs[0]])} == set()


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    folders = [small_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1, 2)]
    folders += [
        small_run(tmp_path / "again", seed=1),
        small_run(tmp_path / "other", seed=3, optim={"lr": 3e-6}),
    ]
    for name in ("empty", "void"):
        (tmp_path / name).mkdir()
        folders.append(tmp_path / name)
    assert seed_groups(read_compared(folders)) == [[0, 1, 2], [3], [4], [5], [6]]


def test_names_are_told_apart_by_the_folders_above(tmp_path):
    paths = [tmp_path / "x/run", tmp_path / "y/run", tmp_path / "y/other"]
    assert names(paths) == ["x/run", "y/run", "y/other"]
    assert names(paths[1:]) == ["run", "other"]


def test_the_page_holds_bands_hours_and_thinned_curves(tmp_path, monkeypatch):
    folders = [small_run(tmp_path / f"seed{seed}", steps=4 + seed, seed=seed) for seed in (0, 1)]
    for folder in folders:
        evaluated(folder, 4, A, GREEDY_A)
    data = page_data(write_comparison(folders, tmp_path / "page.html"))
    pool = data["curves"]["groups"][0]
    lengths = [
        [row["response_length/mean"] for row in map(json.loads, (folder / "metrics.jsonl").open())]
        for folder in folders
    ]
    line = pool["series"]["response_length/mean"]
    assert line["steps"] == [1, 2, 3, 4]
    assert line["mean"][3] == pytest.approx((lengths[0][3] + lengths[1][3]) / 2, rel=1e-5)
    assert line["high"][3] - line["mean"][3] == pytest.approx(
        12.7062 * abs(lengths[0][3] - lengths[1][3]) / 2, rel=1e-3
    )
    seconds = [json.loads(row)["timing_s/step"] for row in (folders[0] / "metrics.jsonl").open()]
    assert data["curves"]["runs"][0]["hours"] == pytest.approx(
        [sum(seconds[: n + 1]) / 3600 for n in range(4)], rel=1e-5
    )
    assert data["curves"]["runs"][0]["evaluations"][0]["hours"] == pytest.approx(
        sum(seconds) / 3600, rel=1e-5
    )
    assert data["groups"][0]["last"] == {
        "step": 4,
        "mean": 0.375,
        "low": 0.375,
        "high": 0.375,
        "num_runs": 2,
    }
    monkeypatch.setattr("rlfr_vlm.report.comparison_page.VALUES", 120)
    data = page_data(write_comparison(folders, tmp_path / "page.html"))
    assert data["curves"]["every"] == 3
    assert data["curves"]["runs"][1]["steps"] == [1, 4, 5]


def test_long_responses_are_cut_in_their_middle_until_the_page_is_small(tmp_path, monkeypatch):
    first, second = two_runs(tmp_path)
    path = second / "eval/step_000004.jsonl"
    rng = random.Random(0)
    rows = [
        json.loads(line)
        | {"response": "START" + "".join(rng.choices("abcdefgh", k=60_000)) + "END"}
        for line in path.open()
    ]
    write_jsonl(path, rows)
    whole = write_comparison([first, second], tmp_path / "page.html").stat().st_size
    monkeypatch.setattr("rlfr_vlm.report.comparison_page.TEXT_BYTES", 5000)
    assert whole - write_comparison([first, second], tmp_path / "page.html").stat().st_size > 30_000


# On the command line.


def test_the_command_writes_a_page_and_says_where(tmp_path, capsys, monkeypatch):
    folders = list(map(str, two_runs(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for more, place in (([], "comparison.html"), (["--out", "there.html"], "there.html")):
        with pytest.raises(SystemExit) as ended:
            main(["report", *folders, *more])
        assert (ended.value.code, capsys.readouterr().out) == (0, f"{place}\n")
        assert (tmp_path / place).stat().st_size > 1e6
    for arguments, said in (
        ([folders[0], folders[0] + "/."], "is given twice"),
        ([*folders, str(tmp_path / "secnd")], f"did you mean {folders[1]}?"),
        ([*folders, "--out", "none/there.html"], "there is no folder none"),
        ([*folders, "--port", "80"], "--port is the port of --serve"),
        ([*folders, "--serve", "--out", "x.html"], "leave one of them out"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="no run folder"):
        write_comparison([tmp_path / "first", tmp_path / "nothing"], tmp_path / "page.html")


def test_evaluations_are_sent_to_the_verb_that_compares_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "math500").mkdir(parents=True)
        (tmp_path / name / "math500/protocol.json").write_text("{}")
    with pytest.raises(UserError, match="rlfr-vlm compare A B"):
        read_compared([tmp_path / "a", tmp_path / "b"])
    runs = read_compared([small_run(tmp_path / "run"), tmp_path / "a"])
    assert any("an evaluation, no training" in problem.text for problem in runs[1].problems)


# In a browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Three seeds of one run, another run on the same problems, one on others, an empty folder."""
    base = tmp_path_factory.mktemp("compared")
    rng = random.Random(3)
    problems = [f"p{n:03d}" for n in range(60)]
    folders = []
    for name, skill, config in (
        ("grpo_seed0", 0.5, {"seed": 0}),
        ("grpo_seed1", 0.52, {"seed": 1}),
        ("grpo_seed2", 0.48, {"seed": 2}),
        ("rlfr", 0.8, {"seed": 0, "flow": {"reward": {"coef": 0.01}}}),
        ("elsewhere", 0.4, {"seed": 0, "optim": {"lr": 5e-6}}),
    ):
        run = small_run(base / name, steps=30, **config)
        own = problems if name != "elsewhere" else [f"q{n}" for n in range(30)]
        for step in (10, 20, 30):
            right = {
                key: [int(rng.random() < skill * (0.6 + step / 75)) for _ in range(4)]
                for key in own
            }
            evaluated(run, step, right, {key: int(rng.random() < skill) for key in own})
        folders.append(run)
    (base / "empty").mkdir()
    return write_comparison([*folders, base / "empty"], base / "comparison.html")


@needs_browser
def test_the_table_says_what_was_compared_and_what_was_not(page, open_report):
    report = open_report(page)
    rows = report.page.locator(".compared tbody tr").all_inner_texts()
    assert len(rows) == 1 + 6
    assert rows[0].startswith("grpo, 3 seeds")
    assert "3 seeds, step 30" in rows[0]
    data = page_data(page)["runs"][3]["versus"]
    assert f"{100 * data['difference']['value']:+.1f}" in rows[4].replace("−", "-")
    assert "< 0.001" in rows[4]
    assert f"+{data['gained']} −{data['lost']}" in rows[4]
    assert "not compared" in rows[5] and "not compared" in rows[6]
    said = report.page.inner_text(".words")
    assert (
        "elsewhere: not compared: other problems: 60 only in the first run (as p000), 30 only in "
        "this one (as q0)." in said
    )
    assert "empty: not compared: this run: no evaluation." in said
    assert (
        report.page.inner_text("#apart")
        == "Not comparable with the first run, see above: elsewhere."
    )
    assert "30 problems" in rows[5]
    assert "empty: an empty folder" in report.page.inner_text("#problems").replace(
        "empty: empty", "empty"
    )
    settings = report.page.inner_text("#settings")
    assert "optim.lr" in settings and "flow" in settings and "algorithm.method" not in settings
    assert not report.complaints
    assert all(url.startswith(("file:", "data:", "blob:")) for url in report.requests)


@needs_browser
def test_curves_are_pooled_banded_and_drawn_by_hour(page, open_report):
    report = open_report(page, "#curves")
    report.page.wait_for_selector("#curves[data-drawn]")
    titles = report.page.locator("#curves figure h3").all_inner_texts()
    for title in (
        "Held-out accuracy",
        "Reward",
        "Response length tokens",
        "Entropy nats per token",
        "Flow loss",
    ):
        assert title in titles
    traces = "[...document.querySelectorAll('#curves .plot')][0].data"
    assert report.evaluate(f"{traces}.filter((t) => t.name).map((t) => t.name)") == [
        "grpo, 3 seeds",
        "rlfr",
        "elsewhere",
    ]
    assert report.evaluate(f"{traces}.filter((t) => t.fill).length") == 3
    assert (
        report.evaluate(f"{traces}.filter((t) => t.opacity === 0.45).length") == 3
    )  # the single seeds, faint
    assert report.evaluate(f"{traces}[2].x") == [10, 20, 30]
    report.page.click("[data-axis=hours]")
    assert 1 < report.evaluate(f"{traces}[2].x[2]") < 3  # minutes of 30 steps
    assert "No step times in empty" in report.page.inner_text("#hours-words")
    assert report.evaluate("location.hash") == "#curves?x=hours"
    report.page.click("#curves .lines [data-group='0']")
    assert report.evaluate(f"{traces}.filter((t) => t.name).map((t) => t.name)") == [
        "rlfr",
        "elsewhere",
    ]
    report.page.click("#curves summary")
    report.page.wait_for_selector("#curves details .plot .main-svg")
    assert not report.complaints


@needs_browser
def test_a_zoom_is_one_of_all_charts_until_the_axis_changes(page, open_report):
    report = open_report(page, "#curves")
    report.page.wait_for_selector("#curves[data-drawn]")
    ranges = (
        "[...document.querySelectorAll('{} .plot')].map((plot) => plot.layout.xaxis.range.join())"
    )
    first = "document.querySelector('#curves .plot')"
    report.evaluate(
        f"() => {{ Plotly.relayout({first}, {{'xaxis.range[0]': 5, 'xaxis.range[1]': 20}}); }}"
    )
    report.page.wait_for_function(
        f"{ranges.format('#curves .grid')}.every((range) => range === '5,20')"
    )
    report.page.click("#tab-runs")
    report.page.wait_for_function(f"{ranges.format('#runs')}[0] === '5,20'")
    report.page.click("#tab-curves")
    report.page.click("[data-axis=hours]")
    assert "5,20" not in report.evaluate(ranges.format("#curves .grid"))
    assert not report.complaints


@needs_browser
def test_flips_show_both_responses_and_can_be_filtered_and_addressed(page, open_report):
    report = open_report(page)
    versus = page_data(page)["runs"][3]["versus"]
    report.page.click(f"text=+{versus['gained']} −{versus['lost']}")
    report.page.wait_for_selector("#flip-list .flip")
    assert report.page.input_value("#choose-run") == "3"
    assert report.page.locator("#flip-list .flip").count() == min(
        20, versus["gained"] + versus["lost"]
    )
    report.page.click("[data-kind=lost]")
    assert report.page.locator("#flip-list .flip").count() == min(20, versus["lost"])
    card = report.page.locator("#flip-list .flip").first
    assert card.locator(".response.correct header b").first.inner_text() == "grpo_seed0"
    assert card.locator(".response.wrong header b").first.inner_text() == "rlfr"
    key = card.get_attribute("data-id")
    assert f"step 30: {key}, greedy" in card.inner_text()
    assert f"gold {key}" in card.inner_text()
    report.page.fill("#flip-search", key)
    assert report.page.locator("#flip-list .flip").count() == 1
    again = open_report(page, f"#flips?run=3&kind=lost&q={key}")
    again.page.wait_for_selector("#flip-list .flip")
    assert again.page.locator("#flip-list .flip").get_attribute("data-id") == key
    again.page.select_option("#choose-run", "1")
    again.page.wait_for_selector("#flips[data-listed^='1 ']")
    assert not report.complaints
    assert not again.complaints


@needs_browser
def test_malicious_text_stays_text_in_a_comparison(tmp_path, open_report):
    runs = [
        small_run(tmp_path / name, **{MALICE: number})
        for number, name in enumerate(("<img src=x onerror=window.hacked=3>", "b"))
    ]
    for number, run in enumerate(runs):
        write_jsonl(
            run / "metrics.jsonl",
            [{"step": step, MALICE: step, "timing_s/step": 1} for step in (1, 2)],
        )
        evaluated(run, 4, {MALICE: [1, 0]}, {MALICE: number})
        path = run / "eval/step_000004.jsonl"
        rows = [
            {**json.loads(line), "response": MALICE, "prediction": MALICE, "answer": MALICE}
            for line in path.open()
        ]
        write_jsonl(path, rows)
    report = open_report(write_comparison(runs, tmp_path / "page.html"))
    for tab in ("curves", "flips", "runs"):
        report.page.click(f"#tab-{tab}")
    report.page.click("#tab-flips")
    report.page.wait_for_selector("#flip-list .flip")
    assert "</script><script>window.hacked=1</script>" in report.page.inner_text("#flip-list")
    assert report.evaluate("window.hacked") is None
    assert report.page.locator("main script, main img").count() == 0
    assert not report.complaints


@needs_browser
def test_a_comparison_is_legible_dark_and_narrow(page, open_report):
    for scheme in ("light", "dark"):
        report = open_report(page, color_scheme=scheme, viewport={"width": 420, "height": 800})
        for tab in ("runs", "curves", "flips"):
            report.page.click(f"#tab-{tab}")
            report.page.wait_for_timeout(300)
            assert report.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                scheme,
                tab,
            )
        assert not report.complaints


@needs_browser
def test_runs_of_a_whole_report_compare_without_responses(tmp_path, open_report):
    """Folders of an earlier version have no responses of their evaluations."""
    folders = [make_run(tmp_path / name, steps=20) for name in ("one", "two")]
    report = open_report(write_comparison(folders, tmp_path / "page.html"), "#flips")
    assert "not compared: first run: eval/step_000020.jsonl is not there" in report.page.inner_text(
        "#flips"
    )
    assert not report.complaints
