"""Each monitor on figures made by hand: what it sees, when it speaks, what it says, and that it is
silent where all is well.
"""

import json
import math
import random
from pathlib import Path

import pytest

from rlfr_vlm.config import parse_config
from rlfr_vlm.errors import NonFiniteError, RolledBack, StoppedError
from rlfr_vlm.ranks import ALONE
from rlfr_vlm.run.mismatch import likely_cause
from rlfr_vlm.run.monitors import CHECKS, Monitors
from rlfr_vlm.run.watch import Watch, count_roll_backs, kept_events, read_lines, with_roll_backs
from rlfr_vlm.storage.checkpoint import read_best, write_best

HEALTHY = {
    "reward/mean": 0.5, "reward/accuracy": 0.5, "reward/frac_zero_std": 0.2, "reward/length_corr": 0.1, "reward/format": 0.9,
    "response_length/mean": 100.0, "response_length/clip_ratio": 0.05, "response/repetition": 0.05,
    "actor/entropy": 0.3, "actor/update_ratio": 1e-3, "actor/lr": 1e-4,
    "flow/advantage_share": 0.03, "flow/deviation_spread": 0.3, "flow/num_reward_tokens": 2.0, "flow/loss": 0.4, "flow/selected_frac": 0.5,
    "rollout/logprob_diff_mean": 1e-6, "rollout/ratio_mean": 1.0, "rollout/surprisal_gap": 0.002, "rollout/surprisal_z": 1.0,
}  # fmt: skip


def config(tmp_path="unused", **sections):
    tree = {
        "output_dir": str(tmp_path),
        "model": {"path": "m", "dtype": "float32"},
        "flow": {},
        "train": {"steps": 50},
    }
    return parse_config({**tree, **sections})


def said(changes, steps=3, cfg=None, before=0, refrain=""):
    """Events of `before` healthy steps and then so many with these changes (or a function of the
    step's number from 0).
    """
    monitors = Monitors(cfg or config())
    events = []
    for step in range(1, before + steps + 1):
        found = changes(step - before - 1) if callable(changes) else changes
        figures = {**HEALTHY, "step": step, **(found if step > before else {})}
        events += monitors.see({k: v for k, v in figures.items() if v is not None}, refrain)
    return events


PLANTED = [
    ("update", {"actor/update_ratio": 0.2}, "the learning rate, optim.lr=1e-06"),
    (
        "accuracy",
        {"reward/accuracy": 0.1, "response_length/clip_ratio": 0.6},
        "responses are cut off before their answer",
    ),
    ("entropy", {"actor/entropy": 0.001}, ""),
    ("entropy", {"actor/entropy": 3.0}, ""),
    ("length", {"reward/length_corr": 0.9}, "the reward pays for length"),
    ("length", {"response_length/mean": 20.0}, ""),
    ("length", {"response_length/mean": 300.0}, ""),
    ("truncation", {"response_length/clip_ratio": 0.97}, "the policy has unlearnt to stop"),
    ("repetition", {"response/repetition": 0.8}, "training broke the policy"),
    (
        "zero_variance",
        {"reward/frac_zero_std": 1.0, "reward/accuracy": 0.9},
        "the problems are too easy for this policy",
    ),
    (
        "zero_variance",
        {"reward/frac_zero_std": 1.0},
        "the problems are too hard for this policy, or no answer is recognised",
    ),
    (
        "flow_share",
        {"flow/advantage_share": 0.8},
        "the weight of the flow reward, flow.reward.coef=0.01",
    ),
    (
        "flow_share",
        {"flow/advantage_share": 0.8, "reward/frac_zero_std": 0.9},
        "answers give little: in 90% of the groups",
    ),
    (
        "flow_collapse",
        {"flow/deviation_spread": 0.001},
        "the field or the policy's latents have collapsed",
    ),
    ("flow_collapse", {"flow/num_reward_tokens": 0.0}, "flow.reward.threshold=0.6 keeps nothing"),
    (
        "flow_collapse",
        {"flow/loss": 1.3},
        "the policy's latents move faster than the field can follow",
    ),
    (
        "mismatch",
        {"rollout/logprob_diff_mean": 0.05},
        "stale weights or a stale prefix cache: the engine was right at step 1",
    ),
    (
        "mismatch",
        {"rollout/surprisal_gap": -0.09, "rollout/surprisal_z": -28.0},
        "sampling settings: log-probs agree",
    ),
]


@pytest.mark.parametrize(("monitor", "changes", "cause"), PLANTED)
def test_a_monitor_speaks_after_three_steps_and_names_the_cause(monitor, changes, cause):
    events = said(changes, steps=8, before=12)
    assert [event.monitor for event in events] == [monitor]
    assert (event := events[0]).cause.startswith(cause) and event.do and event.what
    assert 13 <= event.since <= event.step - 2
    assert "\n" not in event.line and len(event.line) < 500


def test_nothing_is_said_of_a_healthy_run():
    assert said({}, steps=60) == []
    learning = lambda step: {  # noqa: E731
        "reward/accuracy": 0.3 + 0.006 * step, "actor/entropy": 0.3 * 0.97**step + 0.02, "response_length/mean": 100 + 2 * step,
    }  # fmt: skip
    assert said(learning, steps=60) == []


def test_responses_that_get_shorter_and_better_are_no_cliff():
    assert said({"response_length/mean": 20.0, "reward/accuracy": 0.7}, before=12, steps=8) == []


def test_a_format_without_answers_is_seen():
    rising = lambda step: {"reward/format": min(0.9, 0.1 + 0.04 * step)}  # noqa: E731
    (event,) = said(rising, steps=22)
    assert event.monitor == "format" and "while accuracy went +0.0%" in event.what
    better = lambda step: {  # noqa: E731
        "reward/format": min(0.9, 0.1 + 0.04 * step),
        "reward/accuracy": 0.3 + 0.01 * step,
    }
    assert said(better, steps=22) == []


def test_a_field_without_a_right_response_is_said_once():
    (event,) = said({"flow/selected_frac": 0.0, "flow/loss": None}, steps=40)
    assert (
        event.monitor == "flow_collapse"
        and "the flow field has learnt nothing for 10 steps" in event.what
    )


def aucs(charged, straying, noise=0.1, seed=0):
    """AUCs among siblings that scatter about these."""
    rng = random.Random(seed)
    return lambda step: {
        "flow/charged_auc_in_group": rng.gauss(charged, noise),
        "flow/auc_in_group": rng.gauss(straying, noise),
    }


def test_a_charge_on_right_answers_is_seen_where_deviations_know_better():
    (event,) = said(aucs(0.38, 0.7), steps=30)
    assert event.monitor == "flow_inverted" and event.limit == 0.5 and event.value < 0.45
    assert event.cause.startswith("flow.reward.normalise=minmax takes each response by itself")
    assert event.do == "flow.reward.normalise=group_z keeps the level, or flow.profile=informed"
    level = config(flow={"reward": {"normalise": "group_z"}})
    (event,) = said(aucs(0.38, 0.7), steps=30, cfg=level)
    assert (
        event.cause.startswith("flow.reward.normalise=group_z with threshold=0.6, top_k=15")
        and "threshold=0, top_k=0" in event.do
    )
    assert said(aucs(0.38, 0.7), steps=9) == []  # too few to be sure
    assert said(aucs(0.38, 0.7), steps=30, cfg=config(flow={"reward": {"coef": 0}})) == []
    for charged, straying in ((0.65, 0.7), (0.5, 0.7), (0.38, 0.5), (0.38, 0.35)):
        assert said(aucs(charged, straying), steps=30) == [], (charged, straying)


def falling(accuracy, deviation, noise=0.01, seed=0):
    """Both go linearly from one value to the other in 40 steps."""
    rng = random.Random(seed)
    at = lambda ends, step: ends[0] + (ends[1] - ends[0]) * min(1, step / 40) + rng.gauss(0, noise)  # noqa: E731
    return lambda step: {
        "reward/accuracy": at(accuracy, step),
        "flow/deviation_mean": at(deviation, step),
    }


def test_a_policy_that_learns_to_be_easy_to_predict_is_seen():
    (event,) = said(falling((0.5, 0.35), (1.0, 0.7)), steps=50)
    assert (
        event.monitor == "flow_hacked"
        and "paid for small deviations learns to be easy to predict" in event.cause
    )
    assert (
        "accuracy fell to" in event.what
        and "while deviations fell to" in event.what
        and event.do.startswith("Read the responses")
    )
    for accuracy, deviation in (
        ((0.5, 0.6), (1.0, 0.7)),
        ((0.5, 0.5), (1.0, 0.7)),
        ((0.5, 0.35), (1.0, 1.2)),
        ((0.5, 0.35), (1.0, 0.95)),
    ):
        assert said(falling(accuracy, deviation), steps=50) == [], (accuracy, deviation)
    assert (
        said(falling((0.5, 0.45), (1.0, 0.7), noise=0.1), steps=50) == []
    )  # of a noise that hides it
    assert (
        said(falling((0.5, 0.35), (1.0, 0.7)), steps=50, cfg=config(flow={"reward": {"coef": 0}}))
        == []
    )


def test_a_field_is_measured_against_one_that_knows_nothing():
    loss = lambda value: {"flow/loss": value}  # noqa: E731
    monitors = lambda value, **flow: [  # noqa: E731
        e.monitor for e in said(loss(value), steps=20, cfg=config(flow=flow))
    ]
    assert said(loss(1.5), steps=20) == [] and monitors(1.6) == ["flow_unfit"]  # 1 / 0.8^2 = 1.5625
    assert monitors(2.7, times=(0.5, 0.8)) == [] and monitors(2.8, times=(0.5, 0.8)) == [
        "flow_unfit"
    ]
    random_times = {"online": {"times": "logit_normal"}}
    assert monitors(11.5, **random_times) == [] and monitors(11.8, **random_times) == ["flow_unfit"]
    (event,) = said(loss(1.6), steps=20, cfg=config(flow={"checkpoint": "f"}))
    assert (
        event.cause.startswith("the field was fitted too little")
        and "flow.fit.steps" in event.do
        and event.limit == 1 / 0.8**2
    )
    assert said(loss(1.6), steps=5) == []
    (event,) = said(loss(1.6), steps=20)
    assert event.cause == "a new field: flow.checkpoint is not set"
    assert said(loss(1.6), steps=20, cfg=config(monitors={"flow_unfit": "off"})) == []


def test_a_monitor_is_patient_and_does_not_repeat_itself():
    bad = {"response/repetition": 0.8}
    assert said(lambda step: bad if step % 3 else {}, steps=30) == []  # never three in a row
    assert len(said(bad, steps=30)) == 1
    again = said(lambda step: {} if 10 <= step < 20 else bad, steps=30)
    assert [(event.since, event.step) for event in again] == [(1, 3), (21, 23)]
    flickers = said(
        lambda step: {} if step == 10 else bad, steps=30
    )  # one good step is no recovery
    assert len(flickers) == 1
    impatient = config(monitors={"patience": 1})
    assert said(bad, steps=1, cfg=impatient)[0].step == 1


def test_a_figure_that_is_no_number_is_said_at_once():
    (event,) = said({"actor/grad_norm": math.nan}, steps=1)
    assert (
        event.monitor == "non_finite"
        and event.what == "actor/grad_norm is no finite number"
        and event.action == "stop"
    )


def test_a_monitor_that_is_off_is_silent_and_every_check_has_a_setting():
    off = config(monitors={name: "off" for name in CHECKS if name != "non_finite"})
    for _, changes, _ in PLANTED:
        assert said(changes, steps=8, before=12, cfg=off) == []


def test_the_refrain_is_quoted():
    (event,) = said({"response/repetition": 0.8}, refrain=" the the the the")
    assert event.what == "80% of the 4-grams of responses repeat, most of all ' the the the the'"
    assert event.cause == "the model itself repeats tokens, from the first step on"


def noisy(accuracy, samples, steps=200, seed=0):
    """A run whose accuracy does not change, measured on so many responses a step."""
    rng = random.Random(seed)
    return lambda step: {
        "reward/accuracy": sum(rng.random() < accuracy for _ in range(samples)) / samples
    }


@pytest.mark.parametrize(("accuracy", "samples"), [(0.3, 128), (0.12, 256), (0.5, 32)])
def test_accuracy_that_only_flickers_has_not_fallen(accuracy, samples):
    fired = [said(noisy(accuracy, samples, seed=seed), steps=200) for seed in range(5)]
    assert sum(map(bool, fired)) <= 1
    rng = random.Random(1)
    falls = lambda step: {"reward/accuracy": (0.4 if step < 60 else 0.05) + 0.05 * rng.random()}  # noqa: E731
    (event,) = said(falls, steps=80)
    assert event.monitor == "accuracy" and 60 < event.since <= event.step < 70


def test_settings_in_which_a_sign_means_nothing():
    """Each of these was a false alarm."""
    flat = {"reward/frac_zero_std": 1.0}
    assert (
        said(
            flat,
            cfg=config(algorithm={"method": "reinforce_pp"}, rollout={"group_size": 1}),
            steps=8,
        )
        == []
    )
    one = config(rollout={"num_prompts": 1})
    assert said(lambda step: {"reward/frac_zero_std": float(step % 7 > 0)}, cfg=one, steps=60) == []
    assert [e.monitor for e in said(flat, cfg=one, steps=60)] == ["zero_variance"]
    assert (
        said({"response_length/clip_ratio": 1.0}, cfg=config(rollout={"ignore_eos": True}), steps=8)
        == []
    )
    assert (
        said({"actor/update_ratio": 0.1}, cfg=config(model={"path": "m", "lora": {}}), steps=8)
        == []
    )
    soft = config(flow={"online": {"soft_weight": 0.5}})
    assert said({"flow/selected_frac": 0.0}, cfg=soft, steps=20) == []
    selected = {"rollout/surprisal_gap": 0.05, "rollout/surprisal_z": 9.0}
    assert said(selected, cfg=config(rollout={"max_rounds": 3}), steps=8) == []


# -- why engine and trainer disagree ---------------------------------------------------------------


def mismatch(first, now, **sections):
    rows = [{**HEALTHY, "step": 1, **first}, {**HEALTHY, "step": 2, **now}]
    return likely_cause(config(**sections), rows)


GAP = {"rollout/logprob_diff_mean": 0.2}
PICTURES = {**GAP, "rollout/logprob_diff_pictures": 0.3, "rollout/logprob_diff_text": 0.001}


@pytest.mark.parametrize(
    ("first", "now", "cause"),
    [
        (
            {},
            {"rollout/surprisal_gap": 0.2, "rollout/surprisal_z": 20.0},
            "sampling settings: log-probs agree, but the tokens are 0.2 nats more",
        ),
        (
            GAP,
            {**GAP, "rollout/ratio_mean": 0.6},
            "sampling settings: the engine's log-probs are of only 60% of the distribution",
        ),
        (
            GAP,
            {**GAP, "rollout/surprisal_gap": -0.3, "rollout/surprisal_z": -20.0},
            "sampling settings: the tokens are 0.3 nats less surprising",
        ),
        ({}, GAP, "stale weights or a stale prefix cache"),
        ({}, PICTURES, "a stale cache of pictures"),
        (PICTURES, PICTURES, "position ids of pictures (M-RoPE)"),
        (GAP, GAP, "the engine computes something else with the same weights"),
    ],
)
def test_marks_of_a_mismatch(first, now, cause):
    assert mismatch(first, now).startswith(cause)


def test_an_engine_in_another_dtype_is_named():
    sections = {"rollout": {"engine": "vllm", "vllm": {"dtype": "bfloat16"}}}
    assert (
        mismatch(GAP, GAP, **sections)
        == "dtype: the engine computes in bfloat16, the policy in float32"
    )
    # its rounding is no event
    assert said({"rollout/logprob_diff_mean": 0.03}, cfg=config(**sections)) == []
    assert (
        said({"rollout/logprob_diff_mean": 0.03}, cfg=config(monitors={"max_mismatch": 0.05})) == []
    )


def test_rollouts_that_are_older_by_design_are_not_judged():
    sections = {
        "launcher": "ray",
        "ray": {"engines": 1},
        "rollout": {"staleness": 1},
        "algorithm": {"importance_cap": 2},
    }
    assert said(GAP, cfg=config(**sections)) == []


# -- what follows ----------------------------------------------------------------------------------


def watch(cfg):
    warnings = []
    return Watch(cfg, Path(cfg.output_dir), ALONE, warnings.append), warnings


def write_metrics(folder, steps):
    rows = [{"step": step, **HEALTHY, "reward/mean": float(step)} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def bad_steps(found, first, count=3):
    for step in range(first, first + count):
        with (found.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **HEALTHY, "response/repetition": 0.9}) + "\n")
        found.look(step, {**HEALTHY, "response/repetition": 0.9}, "x x")


def test_a_warning_is_a_line_and_the_run_goes_on(tmp_path):
    found, warnings = watch(config(tmp_path))
    bad_steps(found, 1, 5)
    (row,) = read_lines(tmp_path / "events.jsonl")
    assert (row["step"], row["since"], row["monitor"], row["action"], row["to"]) == (
        3,
        1,
        "repetition",
        "warn",
        None,
    )
    assert len(warnings) == 1 and warnings[0].startswith(
        "step 3, since step 1: repetition: 90% of the 4-grams"
    )


def test_a_stop_raises_and_stays_on_record_when_the_run_goes_on_without_it(tmp_path):
    found, _ = watch(config(tmp_path, monitors={"repetition": "stop"}))
    with pytest.raises(StoppedError, match=r"repetition: 90% .*\(monitors.repetition=stop\)"):
        bad_steps(found, 1)
    again, _ = watch(config(tmp_path, monitors={"repetition": "off"}))
    again.resume(0)
    assert [row["action"] for row in read_lines(tmp_path / "events.jsonl")] == ["stop"]


def test_a_roll_back_sets_aside_what_came_after_and_is_counted(tmp_path):
    cfg = config(tmp_path, monitors={"repetition": "roll_back", "max_roll_backs": 1})
    for step in (2, 4, 6):
        (tmp_path / f"checkpoints/global_step_{step}").mkdir(parents=True)
    write_metrics(tmp_path, range(1, 5))
    found, _ = watch(cfg)
    found.resume(4)
    with pytest.raises(RolledBack, match="the run stands at step 4; the same command goes on"):
        bad_steps(found, 5)
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step_4"
    assert [p.name[:28] for p in (tmp_path / "checkpoints").glob("rolled-back*")] == [
        "rolled-back-1-global_step_6-"
    ]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [
        (row["step"], row["roll_back"]) for row in read_lines(tmp_path / "rolled_back.jsonl")
    ] == [(5, 1), (6, 1), (7, 1)]
    assert count_roll_backs(tmp_path) == 1
    changed = with_roll_backs(cfg)
    assert (
        changed.monitors.roll_backs == 1
        and changed.run_seed != cfg.run_seed
        and cfg.run_seed == cfg.seed
    )
    # a second time is one too many
    again, _ = watch(changed)
    again.resume(4)
    assert [(row["action"], row["to"]) for row in read_lines(tmp_path / "events.jsonl")] == [
        ("roll_back", 4)
    ]
    with pytest.raises(StoppedError, match="It was rolled back 1 times already"):
        bad_steps(again, 5)


def test_without_a_checkpoint_from_before_a_roll_back_is_a_stop(tmp_path):
    (tmp_path / "checkpoints/global_step_2").mkdir(parents=True)
    found, _ = watch(config(tmp_path, monitors={"repetition": "roll_back"}))
    with pytest.raises(StoppedError, match="no checkpoint from before step 1 to go back to"):
        bad_steps(found, 1)
    assert count_roll_backs(tmp_path) == 0


def test_a_loss_that_is_not_finite_is_an_event(tmp_path):
    found, _ = watch(config(tmp_path))
    found.resume(7)
    with (
        pytest.raises(StoppedError, match="step 8: non_finite: the policy loss is not finite"),
        found.guard(),
    ):
        raise NonFiniteError("the policy loss is not finite; responses: ['a']")
    (row,) = read_lines(tmp_path / "events.jsonl")
    assert (row["step"], row["value"]) == (8, None)


def test_what_comes_after_the_step_gone_back_to_is_set_aside(tmp_path):
    """An evaluation of other weights must not be taken for one of the new ones, nor decide which
    checkpoint is the best.
    """
    cfg = config(tmp_path, monitors={"repetition": "roll_back"})
    for step in (2, 4, 6):
        (tmp_path / f"checkpoints/global_step_{step}").mkdir(parents=True)
        (tmp_path / f"eval/step_{step:06d}/bench").mkdir(parents=True)
        (tmp_path / "rollouts").mkdir(exist_ok=True)
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("{}\n")
    write_best(tmp_path / "checkpoints", 6, 0.9)
    write_metrics(tmp_path, range(1, 5))
    (tmp_path / "rolled_back.jsonl").write_text(
        '{"roll_back": 1, "step": 5}\n{"roll_back": 1, "st'
    )  # of a kill on the way back
    found, _ = watch(cfg)
    found.resume(4)
    with pytest.raises(RolledBack):
        bad_steps(found, 5)
    assert sorted(path.name for path in (tmp_path / "eval").glob("step_*")) == [
        "step_000002",
        "step_000004",
    ]
    assert sorted(path.name for path in (tmp_path / "rollouts").glob("step_*")) == [
        "step_000002.jsonl",
        "step_000004.jsonl",
    ]
    assert not (tmp_path / "checkpoints/best.json").exists()
    assert [row["step"] for row in read_lines(tmp_path / "rolled_back.jsonl")] == [5, 6, 7]


def test_a_best_checkpoint_from_before_stays_the_best(tmp_path):
    cfg = config(tmp_path, monitors={"repetition": "roll_back"})
    (tmp_path / "checkpoints/global_step_4").mkdir(parents=True)
    write_best(tmp_path / "checkpoints", 4, 0.9)
    found, _ = watch(cfg)
    found.resume(4)
    with pytest.raises(RolledBack):
        bad_steps(found, 5)
    assert read_best(tmp_path / "checkpoints") == {"step": 4, "score": 0.9}


def test_events_that_stay_when_a_run_goes_on():
    warn, back = (
        {"step": step, "action": action} for step, action in ((3, "warn"), (7, "roll_back"))
    )
    late = {"step": 6, "action": "warn"}
    assert kept_events([warn, late, back], 4, 1) == [warn, late, back]
    assert kept_events([warn, late, back], 4, 0) == [
        warn
    ]  # killed before the roll-back was counted: it comes again
    assert kept_events([warn, back, back, late], 4, 1) == [warn, back]
    stop = {"step": 6, "action": "stop"}
    assert kept_events([warn, late, stop, {**late, "step": 9}], 4, 0) == [warn, late, stop]


def test_a_torn_log_of_events_is_written_on(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"step": 3, "acti')
    found, _ = watch(config(tmp_path))
    found.resume(0)
    bad_steps(found, 1)
    assert [row["step"] for row in read_lines(tmp_path / "events.jsonl")] == [3]


def test_a_monitor_that_is_switched_on_when_the_run_goes_on_speaks_of_what_goes_on(tmp_path):
    for before, after in (
        (("off", 0.3), ("stop", 0.3)),
        (("warn", 0.3), ("stop", 0.3)),
        (("warn", 0.95), ("warn", 0.3)),
    ):
        folder = tmp_path / "-".join(map(str, (*before, *after)))
        folder.mkdir()
        found, _ = watch(
            config(folder, monitors={"repetition": before[0], "max_repetition": before[1]})
        )
        found.resume(0)
        bad_steps(found, 1, 5)
        again, warnings = watch(
            config(folder, monitors={"repetition": after[0], "max_repetition": after[1]})
        )
        again.resume(5)
        if after[0] == "stop":
            with pytest.raises(StoppedError):
                bad_steps(again, 6, 1)
        else:
            bad_steps(again, 6, 1)
        assert len(warnings) == 1


def test_a_second_roll_back_at_one_step_is_a_warning(tmp_path):
    (tmp_path / "checkpoints/global_step_4").mkdir(parents=True)
    found, _ = watch(
        config(tmp_path, monitors={"repetition": "roll_back", "truncation": "roll_back"})
    )
    found.resume(4)
    with pytest.raises(RolledBack):
        for step in (5, 6, 7):
            found.look(
                step, {**HEALTHY, "response/repetition": 0.9, "response_length/clip_ratio": 1.0}, ""
            )
    rows = read_lines(tmp_path / "events.jsonl")
    assert [(row["monitor"], row["action"], row["to"]) for row in rows] == [
        ("repetition", "warn", None),
        ("truncation", "roll_back", 4),
    ]


def test_a_resumed_run_remembers_what_was_seen(tmp_path):
    """Killed after two bad steps, the third one speaks; what was said after the restored step is
    said again, and once.
    """
    found, _ = watch(config(tmp_path))
    bad_steps(found, 1, 4)
    resumed, _ = watch(config(tmp_path))
    resumed.resume(2)
    assert read_lines(tmp_path / "events.jsonl") == [] and [
        row["step"] for row in read_lines(tmp_path / "metrics.jsonl")
    ] == [1, 2]
    bad_steps(resumed, 3, 2)
    (row,) = read_lines(tmp_path / "events.jsonl")
    assert (row["step"], row["since"]) == (3, 1)
    later, _ = watch(config(tmp_path))
    later.resume(4)
    bad_steps(later, 5, 5)
    assert len(read_lines(tmp_path / "events.jsonl")) == 1
