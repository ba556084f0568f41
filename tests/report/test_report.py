"""The report of synthetic runs, read as files and opened from disk in headless Chromium with the
network off.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rlfr_vlm.errors import UserError
from rlfr_vlm.report import html
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.run_files import RolloutFile, read_rollouts, read_run
from tests.report.browser import needs_browser

LATENT = 64  # numbers
MALICE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'><!-- "
    "\u202e\u0007 {{plotly}} &lt;b&gt;"
)


# A run folder by the contract, from a seed.


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def digits_picture(path: Path, digits: tuple[int, int]) -> None:
    picture = Image.new("L", (56, 28), 255)
    for at, digit in enumerate(digits):
        ImageDraw.Draw(picture).text((28 * at + 8, 2), str(digit), fill=20, font_size=22)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def response_tokens(
    rng: random.Random, digits: tuple[int, int], said: int, num_tokens: int
) -> list[str]:
    tokens = [
        "<think>",
        "\n",
        "The",
        " picture",
        " shows",
        " ",
        str(digits[0]),
        " and",
        " ",
        str(digits[1]),
        ".",
        "\n",
        "  ",
    ]
    while len(tokens) < num_tokens - 13:
        tokens += rng.choice(
            [
                [" Adding", " them", ","],
                [" so", " the", " sum", " is"],
                [" Let", " me", " check", "."],
                ["\n\n"],
                [" wait", ","],
            ]
        )
    ends = ["\n", "</think>", "\n", "<answer>", "\\", "boxed", "{", str(said), "}", "</answer>"]
    return [*tokens[: num_tokens - len(ends) - 1], *ends, "<|im_end|>"]


def rollout_rows(
    rng: random.Random,
    step: int,
    skill: float,
    groups: int,
    siblings: int,
    num_tokens: int,
    signed: bool,
) -> list[dict]:
    rows = []
    numbers = np.random.default_rng(step)
    for number in range(groups):
        digits = (rng.randrange(10), rng.randrange(10))
        subject = numbers.normal(0, 1, LATENT)  # what the siblings of a question share
        verdicts = ["correct" if rng.random() < skill else "wrong" for _ in range(siblings)]
        mean = verdicts.count("correct") / siblings
        scale = math.sqrt(mean * (1 - mean)) or 1.0
        for index, verdict in enumerate(verdicts):
            tokens = response_tokens(
                rng,
                digits,
                sum(digits) + (0 if verdict == "correct" else rng.choice([-2, -1, 1, 10])),
                num_tokens,
            )
            size = len(tokens)
            signs = numbers.choice([-1, 1] if signed else [-1], size)
            rewards = (
                0.01 * signs * numbers.uniform(0.6, 1.0, size) * (numbers.random(size) < 0.15) + 0.0
            )
            outcome = ((verdict == "correct") - mean) / scale
            length = rng.random() < 0.04
            rows.append(
                {
                    "step": step,
                    "prompt_id": f"digits-{step:04d}-{number}",
                    "sample_index": index,
                    "question": "<image>What is the sum of the two digits in the picture? Answer "
                    "with a number.",
                    "images": [f"images/{digits[0]}{digits[1]}.png"],
                    "answer": str(sum(digits)),
                    "response": "".join(tokens[:-1]),
                    "prediction": tokens[-4],
                    "verdict": verdict,
                    "reward": 1.0 if verdict == "correct" else 0.0,
                    "parts": {"accuracy": float(verdict == "correct"), "format": 0.5},
                    "finish_reason": "length" if length else "stop",
                    "policy_version": step - 1,
                    "tokens": tokens,
                    "logprobs": (-numbers.gamma(0.3, 0.8, size)).tolist(),
                    "advantages": (outcome + rewards[::-1].cumsum()[::-1]).tolist(),
                    "flow_rewards": rewards.tolist(),
                    "deviations": numbers.lognormal(0, 0.4, size).tolist(),
                    "entropy": numbers.gamma(0.4, 0.7, size).tolist(),
                    "latent": latent(numbers, subject, step, verdict == "correct"),
                }
            )
    return rows


def latent(
    numbers: np.random.Generator, subject: np.ndarray, step: int, right: bool
) -> list[float]:
    """Right and wrong ones lie apart along the second axis, and all of them drift along the first."""
    values = subject + numbers.normal(0, 0.7, LATENT)
    values[:2] += [0.08 * step, 0.7 if right else -0.7]
    return values.round(4).tolist()


def metrics_row(rng: random.Random, step: int, skill: float) -> dict:
    noisy = lambda value, spread: value * (1 + rng.uniform(-spread, spread))  # noqa: E731
    rollout, update = noisy(2.1, 0.1), noisy(1.4, 0.1)
    return {
        "step": step,
        "reward/mean": noisy(skill + 0.3, 0.15),
        "reward/accuracy": min(1.0, noisy(skill, 0.2)),
        "reward/format": noisy(0.45, 0.05),
        "reward/frac_zero_std": noisy(0.2, 0.5),
        "reward/error_frac": 0.0,
        "response_length/mean": noisy(40 + 10 * skill, 0.05),
        "response_length/max": 64,
        "response_length/clip_ratio": noisy(0.04, 0.9),
        "actor/pg_loss": rng.gauss(0, 0.02),
        "actor/entropy": noisy(0.9 - 0.6 * skill, 0.05),
        "actor/grad_norm": noisy(0.8, 0.4),
        "actor/lr": 1e-5 * min(1.0, step / 10),
        "actor/pg_clipfrac": noisy(0.002, 0.8),
        "actor/ppo_kl": noisy(4e-5, 0.9),
        "flow/loss": noisy(0.9 - 0.3 * skill, 0.05),
        "flow/deviation_mean": noisy(1.1 - 0.3 * skill, 0.03),
        "flow/reward_mean": -noisy(0.0012, 0.2),
        "flow/num_reward_tokens": noisy(11, 0.2),
        "flow/advantage_share": noisy(0.05, 0.3),
        "flow/auc": noisy(0.55 + 0.2 * skill, 0.06),
        "flow/auc_in_group": noisy(0.53 + 0.15 * skill, 0.08),
        "flow/charged_auc": 0.45 + 0.02 * (step % 3),
        "flow/charged_auc_in_group": 0.4 + 0.02 * (step % 3),
        "flow/charge_place": 0.3 + 0.01 * (step % 2),
        "flow/charge_by_token": 0.55,
        "flow/charge_by_place": 0.1,
        "flow/only_groups_frac": noisy(0.2, 0.5),
        "flow/drift": 0.0004 * step,
        "flow/deviation_spread": noisy(0.42, 0.08),
        "flow/grad_norm": noisy(1.3, 0.3),
        "flow/selected_frac": min(1.0, noisy(skill, 0.2)),
        "rollout/logprob_diff_mean": noisy(0.003, 0.5),
        "timing_s/rollout": rollout,
        "timing_s/update": update,
        "timing_s/step": rollout + update + 0.2,
        "perf/tokens_per_s": noisy(900, 0.1),
    }


def evaluation(rng: random.Random, step: int, skill: float) -> dict:
    return {
        "step": step,
        "accuracy": skill,
        "accuracy_ci": [skill - 0.04, skill + 0.04],
        "greedy": skill + 0.05,
        "num_problems": 200,
        "num_samples": 8,
        "by_source": {
            name: {"accuracy": min(1.0, max(0.0, skill + d)), "num_problems": 50}
            for name, d in SOURCES.items()
        },
    }


def events(steps: int) -> list[dict]:
    """A warning, and a roll-back from another one."""
    spiked, collapsed = max(1, steps // 3), max(1, (2 * steps) // 3)
    return [
        {
            "step": spiked,
            "since": max(1, spiked - 2),
            "monitor": "repetition",
            "action": "warn",
            "value": 0.62,
            "limit": 0.3,
            "what": "62 % of the 4-grams of responses repeat, most of all ` the the the the`",
            "cause": "",
            "do": "lower optim.lr, or raise rollout.temperature",
            "to": None,
        },
        {
            "step": collapsed,
            "since": max(1, collapsed - 3),
            "monitor": "grad_norm",
            "action": "roll_back",
            "value": 48.1,
            "limit": 10.0,
            "what": "the gradient's norm is 48.1, 37 times its median",
            "cause": "optim.lr is 1e-3",
            "do": "went on with half the learning rate",
            "to": max(1, collapsed - 4),
        },
    ]


SOURCES = {
    "digits/sum": -0.12,
    "digits/larger": 0.15,
    "digits/even": 0.02,
    "digits/difference": -0.05,
}


def make_run(
    folder: Path,
    steps: int,
    groups: int = 2,
    siblings: int = 8,
    num_tokens: int = 48,
    every: int = 1,
    signed: bool = False,
) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(
        f"seed: 0\nmodel:\n  path: models/digits\ntrain:\n  steps: {steps}\n"
    )
    (folder / "env.json").write_text(
        json.dumps({"versions": {"torch": "2.13.0", "transformers": "5.16.1"}, "python": "3.11.2"})
    )
    for first in range(10):
        for second in range(10):
            digits_picture(folder / f"rollouts/images/{first}{second}.png", (first, second))
    skills = [0.3 + 0.5 * (1 - math.exp(-3 * step / steps)) for step in range(steps + 1)]
    rows = [metrics_row(rng, step, skills[step]) for step in range(1, steps + 1)]
    rows += [
        {"step": step, "val/accuracy": skills[step], "val/greedy": skills[step] + 0.05}
        for step in range(0, steps + 1, max(1, steps // 5))
    ]
    write_jsonl(folder / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))
    write_jsonl(folder / "events.jsonl", events(steps))
    write_jsonl(folder / "rolled_back.jsonl", [{**row, "roll_back": 1} for row in rows[-3:]])
    for step in range(every, steps + 1, every):
        rows = rollout_rows(rng, step, skills[step], groups, siblings, num_tokens, signed)
        write_jsonl(folder / f"rollouts/step_{step:06d}.jsonl", rows)
    (folder / "eval").mkdir()
    for step in range(0, steps + 1, max(1, steps // 5)):
        (folder / f"eval/step_{step:06d}.json").write_text(
            json.dumps(evaluation(rng, step, skills[step]))
        )
    for step in (steps - 1, steps):
        (folder / f"checkpoints/global_step_{step}").mkdir(parents=True)
    (folder / "checkpoints/latest").write_text(f"global_step_{steps}\n")
    write_jsonl(
        folder / "flow/flow_fit.jsonl",
        [
            {"step": s, "loss": 1 + 1 / s, "eval_loss": 1.1 + 1 / s, "lr": 1e-4}
            for s in range(1, 60)
        ],
    )
    (folder / "flow/flow_yardstick.json").write_text(json.dumps(yardstick()))
    return folder


def yardstick() -> dict:
    """What a fit writes."""
    known = {
        "field": 0.49,
        "zero": 2.0,
        "constant": 2.0,
        "x_t / t": 1.57,
        "E[h | context]": 1.22,
        "Gaussian given it": 1.19,
    }
    rows = [{"layer": layer, "at": at, **known} for layer in (1, 2, -1) for at in ("fit", "reward")]
    aucs = {"deviation": {"auc": 0.8, "low": 0.77, "high": 0.84, "pairs": 2650}, "contrast": None}
    aucs["charged"] = {"auc": 0.41, "low": 0.37, "high": 0.45, "pairs": 2650}
    return {"deviation": rows, "separation": {"responses": 2048, "accuracy": 0.444, "auc": aucs}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_report(
        make_run(tmp_path_factory.mktemp("runs") / "digits-rlfr", steps=40, every=2)
    )


# What is read.


def test_a_run_folder_is_read_as_its_contract_says(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=10, signed=True))
    assert not run.problems
    assert run.planned_steps == 10
    assert run.environment == {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.16.1"}
    assert run.metrics.steps == tuple(range(11))
    assert run.metrics.series["response_length/max"] == (None, *(64.0,) * 10)
    assert run.metrics.series["val/accuracy"][1:3] == (None, run.evaluations[1].accuracy)
    assert [e.step for e in run.evaluations] == [0, 2, 4, 6, 8, 10]
    assert {source.name for source in run.evaluations[0].by_source} == set(SOURCES)
    assert (run.checkpoint_steps, run.latest_checkpoint) == ((9, 10), "global_step_10")
    groups = read_rollouts(run.rollout_files[3], [])
    assert [len(group.responses) for group in groups] == [8, 8]
    written = json.loads((tmp_path / "run/rollouts/step_000004.jsonl").read_text().splitlines()[9])
    response = groups[1].responses[1]
    assert (response.text, response.prediction, response.policy_version) == (
        written["response"],
        written["prediction"],
        3,
    )
    assert response.traces["flow_rewards"] == tuple(written["flow_rewards"])


def test_torn_and_damaged_lines_are_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "reward/mean": NaN}\nno json\n[1]\n{"step": 6, "reward/me'
        )  # resumed, damaged twice, torn
    text = (run / "rollouts/step_000005.jsonl").read_text()
    row = json.loads(text.splitlines()[0])
    row.update(
        sample_index=99, flow_rewards=[0.1], answer=7, parts=None, tokens=["a", "b"], logprobs=None
    )
    (run / "rollouts/step_000005.jsonl").write_text(
        text + json.dumps(row) + '\n{"step": 5, "prompt_id'
    )
    read = read_run(run)
    assert read.metrics.steps == (0, 1, 2, 3, 4, 5)
    problems = list(read.problems)
    responses = [
        response
        for group in read_rollouts(read.rollout_files[-1], problems)
        for response in group.responses
    ]
    assert len(responses) == 17
    assert {(p.kind, p.file, p.text.split(",")[0]) for p in problems} == {
        ("damaged", "metrics.jsonl", "2 lines are not JSON objects"),
        (
            "note",
            "metrics.jsonl",
            "1 steps were written twice (a resumed run?); later values count",
        ),
        ("note", "metrics.jsonl", "reward/mean is not a finite number at 1 steps"),
        ("note", "metrics.jsonl", "the last line is not whole: it is being written"),
        (
            "damaged",
            "rollouts/step_000005.jsonl",
            "1 responses have arrays that do not fit their tokens; left out",
        ),
        ("note", "rollouts/step_000005.jsonl", "the last line is not whole: it is being written"),
    }


def test_a_prompt_drawn_twice_in_a_step_makes_two_groups(tmp_path):
    row = {"step": 1, "prompt_id": "same", "question": "?", "tokens": [], "response": "x"}
    write_jsonl(
        tmp_path / "step_000001.jsonl", [{**row, "sample_index": index} for index in (0, 1, 0, 1)]
    )
    groups = read_rollouts(RolloutFile(1, tmp_path / "step_000001.jsonl"), [])
    assert [[response.sample_index for response in group.responses] for group in groups] == [
        [0, 1],
        [0, 1],
    ]


def test_a_missing_run_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "nothing")


def test_without_plotly_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="pip install plotly"):
        write_report(tmp_path)


# What is written.


def test_a_demo_sized_report_is_below_15_mb_and_complete(tmp_path):
    run = make_run(tmp_path / "run", steps=200, groups=4)
    path = write_report(run)
    assert path == run / "report.html"
    assert path.stat().st_size < 15e6
    assert page_data(path)["rollouts"]["numResponses"] == 200 * 4 * 8
    assert page_data(path)["latents"]["numPoints"] == 4000
    assert (
        sum(
            len(re.search(rf'id="{name}">([^<]*)<', path.read_text())[1])
            for name in ("flow-tokens", "latent-points")
        )
        < 1.5e6
    )
    assert not list(run.glob("*.tmp"))


@needs_browser
def test_too_many_rollouts_are_sampled_evenly_and_the_page_says_so(
    tmp_path, monkeypatch, open_report
):
    run = make_run(tmp_path / "run", steps=60, groups=3)
    whole = write_report(run).stat().st_size
    monkeypatch.setattr(html, "ROLLOUT_BYTES", 150_000)
    path = write_report(run)
    rollouts = page_data(path)["rollouts"]
    steps = rollouts["steps"]
    assert whole - path.stat().st_size > 150_000
    assert len(steps) + rollouts["numStepsLeftOut"] == 60
    assert (steps[0], steps[-1]) == (1, 60)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) <= 4 * min(gaps)
    report = open_report(path)
    report.show("rollouts")
    assert f"{60 - len(steps)} steps of 60" in report.page.inner_text("#left-out")
    assert report.page.locator("#choose-step option").count() == 1 + len(steps)


def test_pictures_are_kept_once_shrunk_and_only_from_the_run_folder(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    Image.effect_noise((900, 900), 80).save(run / "rollouts/images/large.png")
    shutil.copy(run / "rollouts/images/11.png", run / "rollouts/images/copy.png")
    (run / "rollouts/images/broken.png").write_bytes(
        (run / "rollouts/images/large.png").read_bytes()[:5000]
    )
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    names = [
        "large.png",
        "11.png",
        "copy.png",
        "broken.png",
        "../../../secret.png",
        "none.png",
        "\0",
    ]
    rows = [
        json.loads(line) for line in (run / "rollouts/step_000002.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["images"] = [
            "../rollouts/images/11.png",
            *(f"images/{name}" for name in names),
            str(tmp_path / "secret.png"),
        ]
    for step in (1, 2):
        write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", rows)
    path = write_report(run)
    pictures = re.findall(r'id="picture-\w+">data:image/(\w+);base64,([^<]*)<', path.read_text())
    assert sorted(kind for kind, _ in pictures) == ["png", "webp"]
    assert max(len(data) for _, data in pictures) < 200_000
    assert [p["text"] for p in page_data(path)["overview"]["problems"]] == [
        "5 pictures are missing, outside the run folder or not pictures, first images/broken.png"
    ]


def page_data(path: Path) -> dict:
    return json.loads(re.search(r'id="run-data">(.*?)</script>', path.read_text(), re.S)[1])


# What is seen.


@needs_browser
def test_the_overview_shows_result_evaluations_config_and_versions(demo, open_report):
    report = open_report(demo)
    page = report.page
    assert page.inner_text("#run-name") == "digits-rlfr"
    assert page.inner_text("#run-state") == "finished, 40 steps"
    assert "30.0 % → 77.5 %" in page.inner_text(".tiles")
    assert page.locator("#evaluations tbody tr").count() == 6
    assert "best kept" in page.inner_text("#evaluations tbody tr:last-child")
    assert page.locator("#sources tbody tr").count() == 4
    page.click("summary >> nth=0")
    assert "path: models/digits" in page.inner_text("#config")
    page.click("summary >> nth=1")
    assert "2.13.0" in page.inner_text("#environment")
    assert page.locator("#problems").count() == 0
    page.wait_for_selector("#overview-accuracy .js-line")
    assert not report.complaints
    assert [url for url in report.requests if not url.startswith(("file:", "data:"))] == []


@needs_browser
def test_curves_are_drawn_with_evaluations_on_accuracy_and_exact_values_on_hover(demo, open_report):
    report = open_report(demo)
    report.show("curves")
    page = report.page
    assert page.locator("#curves figure").count() >= 18
    assert page.locator("#curves figure .js-line").count() >= 18
    assert page.locator("#curves figure >> nth=0").locator(".errorbar").count() == 6
    named = page.locator("#curves h3").all_inner_texts()
    for title in (
        "Accuracy",
        "Reward",
        "Response length",
        "Entropy",
        "Gradient norm",
        "Flow loss",
        "Flow reward",
        "Truncated responses",
        "Throughput",
    ):
        assert any(name.startswith(title) for name in named), title
    plot = page.locator("#curves figure >> nth=1").locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.wait_for_selector("#curves .hoverlayer .legend")
    shown = page.locator("#curves .hoverlayer:has(.legend)").text_content().replace("−", "-")
    step = int(re.search(r"step (\d+)", shown)[1])
    value = read_run(demo.parent).metrics.series["reward/mean"][step]
    assert f"{value:.6g}" in shown
    assert not report.complaints


@needs_browser
def test_rollouts_show_pictures_and_tokens_shaded_by_flow_reward_with_values(demo, open_report):
    report = open_report(demo)
    report.show("rollouts")
    page = report.page
    group = read_rollouts(read_run(demo.parent).rollout_files[-1], [])[0]
    card = page.locator("#groups .group >> nth=0")
    assert group.question.removeprefix("<image>") == card.locator(".question").inner_text()
    assert card.locator(".response").count() == 8
    assert card.locator("img").evaluate("image => image.complete && image.naturalWidth === 56")
    response = group.responses[0]
    rewards = response.traces["flow_rewards"]
    tokens = card.locator(".response >> nth=0").locator(".token")
    assert tokens.count() == len(response.tokens)
    shaded = tokens.evaluate_all(
        "nodes => nodes.map((node) => getComputedStyle(node).backgroundColor)"
    )
    clear = "rgba(0, 0, 0, 0)"
    assert [colour != clear for colour in shaded] == [reward != 0 for reward in rewards]
    at = next(at for at, reward in enumerate(rewards) if reward)
    tokens.nth(at).hover()
    for name, values in response.traces.items():
        shown = page.inner_text(f"#tooltip [data-quantity={name}]").replace("−", "-")
        assert float(shown) == pytest.approx(values[at], rel=6e-3), name
    assert page.inner_text("#tooltip code") == json.dumps(response.tokens[at])
    page.select_option("#choose-shade", "deviations")
    deviating = tokens.evaluate_all(
        "nodes => nodes.map((node) => getComputedStyle(node).backgroundColor)"
    )
    assert sum(colour != clear for colour in deviating) > sum(colour != clear for colour in shaded)
    assert "⏎" in card.inner_text() and "␣" in card.inner_text()
    assert not report.complaints


@needs_browser
def test_signed_flow_rewards_get_two_colours(tmp_path, open_report):
    report = open_report(write_report(make_run(tmp_path / "run", steps=5, signed=True)))
    report.show("rollouts")
    hues = report.evaluate(
        "[...document.querySelectorAll('.token')].map((t) => "
        "t.style.backgroundColor.match(/--\\w+/)?.[0]).filter(Boolean)"
    )
    assert set(hues) == {"--penalty", "--bonus"}
    assert "penalised" in report.page.inner_text(
        "#legend"
    ) and "rewarded" in report.page.inner_text("#legend")


@needs_browser
def test_ten_thousand_rollouts_page_and_filter_in_under_200_ms(tmp_path, open_report):
    run = make_run(tmp_path / "run", steps=50, groups=25, siblings=8, num_tokens=40)
    report = open_report(write_report(run))
    report.show("rollouts")
    page = report.page
    assert page_data(run / "report.html")["rollouts"]["numResponses"] == 10_000
    times = {"step": [report.change("slide", at) for at in (0, 24, 48, 7)]}
    times["page"] = [report.change("click", ".pager .on") for _ in range(6)]
    assert page.inner_text("#tally") == "200 responses in 25 groups"
    times["all steps"] = [
        report.change("choose", ["choose-step", step]) for step in ("all", 7, "all")
    ]
    assert page.inner_text("#tally") == "10,000 responses in 1,250 groups"
    times["page of all"] = [report.change("click", ".pager .on") for _ in range(10)]
    times["filter"] = [
        report.change("choose", ["choose-responses", wanted])
        for wanted in ("correct", "truncated", "wrong")
    ]
    assert page.locator("#groups .response.correct").count() == 0
    times["filter"] += [report.change("choose", ["choose-groups", "mixed"])]
    times["search"] = [report.change("type", "digits-0033-7")]
    assert page.locator("#groups .group").count() == 1
    wrong = page.locator("#groups .response.wrong").count()
    assert 0 < wrong < 8
    page.click("#groups button.more")
    assert page.locator("#groups .response").count() == 8
    times["search"] += [report.change("type", "let me check")]
    assert page.locator("#groups .token.hit").count() >= 3
    times["search"] += [report.change("type", "no such text anywhere")]
    assert "No rollout fits" in page.inner_text("#groups")
    print(
        "ms to change:", {kind: [round(ms) for ms in measured] for kind, measured in times.items()}
    )
    assert (
        max(min(measured) for measured in times.values()) < 200
    )  # the page's own time: the slower ones waited for other processes
    assert not report.complaints


@needs_browser
def test_the_address_keeps_the_view_and_its_filters(demo, open_report):
    report = open_report(demo, "#rollouts?step=all&responses=wrong&shade=entropy&page=2")
    report.page.wait_for_selector("#groups[data-drawing]")
    assert report.page.input_value("#choose-shade") == "entropy"
    assert report.page.locator("#groups .response.correct").count() == 0
    assert report.page.inner_text(".pager[data-place=top] .where").startswith("2 /")


@needs_browser
def test_malicious_text_stays_text(tmp_path, open_report):
    run = make_run(tmp_path / "<img src=x onerror=window.hacked=3>", steps=2)
    (run / "config.resolved.yaml").write_text(f"model: {json.dumps(MALICE)}\n")
    (run / "env.json").write_text(json.dumps({MALICE: MALICE}))
    write_jsonl(
        run / "metrics.jsonl",
        [{"step": step, "reward/mean": step, MALICE: step} for step in (1, 2, 3)],
    )
    result = json.loads((run / "eval/step_000000.json").read_text())
    result["by_source"] = {MALICE: {"accuracy": 0.2}, "other": {"accuracy": 0.3}}
    (run / "eval/step_000002.json").write_text(json.dumps(result))
    rows = [
        json.loads(line) for line in (run / "rollouts/step_000002.jsonl").read_text().splitlines()
    ]
    for row in rows:
        size = len(row["tokens"])
        row.update(
            question=MALICE,
            answer=MALICE,
            response=MALICE,
            prediction=MALICE,
            verdict=MALICE,
            finish_reason=MALICE,
            parts={MALICE: 1.0},
        )
        row.update(
            prompt_id=MALICE,
            images=[MALICE],
            tokens=[MALICE, "\ud800", "\u202e", *row["tokens"][3:]],
        )
        assert len(row["tokens"]) == size
    write_jsonl(run / "rollouts/step_000002.jsonl", rows)
    report = open_report(write_report(run))
    page = report.page
    assert page.title().startswith("<img src=x")
    for view in ("overview", "curves", "rollouts"):
        report.show(view)
    assert report.evaluate("window.hacked") is None
    assert page.locator("main script, main img[src=x]").count() == 0
    card = page.inner_text("#groups .group >> nth=0")
    assert (
        "</script><script>window.hacked=1</script>" in card
        and "&lt;b&gt;" in card
        and "{{plotly}}" in card
    )
    assert "\u202e" not in card and "U+202E" in card
    page.hover("#groups .token >> nth=0")
    assert "window.hacked=1" in page.inner_text("#tooltip")
    assert not report.complaints
    report.evaluate(
        """() => {  // and were it not text, the page's policy would still not run it
            const script = document.createElement("script");
            script.textContent = "window.hacked = 4";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.hacked = 5'>");
        }"""
    )
    page.wait_for_timeout(200)
    assert report.evaluate("window.hacked") is None
    assert all("Content Security Policy" in complaint for complaint in report.complaints)


@needs_browser
@pytest.mark.parametrize(
    "state", ["empty", "only_rollouts", "only_metrics", "half_written", "nonsense"]
)
def test_an_unfinished_run_shows_what_there_is_and_names_what_is_not(tmp_path, state, open_report):
    run = tmp_path / state
    if state == "empty":
        run.mkdir()
    else:
        make_run(run, steps=20)
    if state == "only_rollouts":
        for name in ("metrics.jsonl", "env.json", "config.resolved.yaml"):
            (run / name).unlink()
        for name in ("eval", "checkpoints"):
            shutil.rmtree(run / name)
    if state == "only_metrics":
        for name in ("eval", "checkpoints", "rollouts", "flow"):
            shutil.rmtree(run / name)
    if state == "half_written":
        for path in [
            path
            for path in run.rglob("*")
            if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml", ".png")
        ]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if state == "nonsense":
        for path in [path for path in run.rglob("*.json*") if path.is_file()]:
            path.write_bytes(
                b'\xff\x00[[[{"step": {}}\n'
                + b'{"step": "x", "tokens": 3, "images": {}, "verdict": [], "parts": [], '
                b'"accuracy_ci": 1}\n[]\n' * 3
            )
    report = open_report(write_report(run))
    for view in ("curves", "flow", "latents", "rollouts", "overview"):
        report.show(view)
        assert len(report.page.inner_text(f"#{view}")) > 20
    assert not report.complaints
    problems = report.page.inner_text("#problems")
    expected = {
        "empty": [
            "metrics.jsonl",
            "config.resolved.yaml",
            "env.json",
            "rollouts",
            "eval",
            "checkpoints",
        ],
        "only_rollouts": [
            "metrics.jsonl",
            "config.resolved.yaml",
            "env.json",
            "eval",
            "checkpoints",
        ],
        "only_metrics": ["rollouts", "eval", "checkpoints"],
        "half_written": ["env.json", "eval/step_000000.json", "pictures are missing"],
        "nonsense": ["env.json", "metrics.jsonl", "rollouts/step_000001.jsonl"],
    }
    for text in expected[state]:
        assert text in problems, text
    if state == "half_written":
        assert re.fullmatch(r"\d+ steps", report.page.inner_text("#run-state"))


@needs_browser
def test_dark_and_narrow_pages_have_no_sideways_scroll(demo, open_report):
    colours = set()
    for scheme in ("light", "dark"):
        report = open_report(demo, color_scheme=scheme, viewport={"width": 420, "height": 800})
        colours.add(report.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        for view in ("overview", "curves", "rollouts"):
            report.show(view)
            assert report.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        assert not report.complaints
    assert len(colours) == 2
