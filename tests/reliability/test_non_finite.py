"""R8: nothing that is not finite reaches a weight, an engine or a checkpoint, and the responses to
blame are named.
"""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from rlfr_vlm.commands import train_rank
from rlfr_vlm.config import ModelConfig, load_config
from rlfr_vlm.errors import NonFiniteWeightError, StoppedError
from rlfr_vlm.finite import check_finite, not_finite
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import ALONE
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.run.watch import read_lines
from rlfr_vlm.storage import shards
from rlfr_vlm.training import collect, update
from rlfr_vlm.types import RolloutGroup
from tests.reliability.spoilt_runs import ACTIONS, PLACES, SETTINGS, VALUES, check, spoil
from tests.runs import cli, make_config, make_data, torchrun

FAST = [
    ("old_logprob", "inf", "stop"),
    ("parameter", "nan", "stop"),
    ("outcome", "nan", "roll_back"),
]


@pytest.fixture
def config(model_folder, tmp_path):
    make_data(tmp_path)
    return make_config(tmp_path, model_folder("qwen2_5_vl"))


@pytest.mark.parametrize(("place", "value", "action"), FAST)
def test_a_spoilt_value_is_caught(config, tmp_path, place, value, action):
    check(
        tmp_path / "run",
        *spoil(config, tmp_path / "run", ALONE, place, value, action),
        place,
        value,
        action,
    )


@pytest.mark.reliability
def test_every_value_at_every_place_is_caught(config, tmp_path, figure):
    cases = list(product(PLACES, VALUES, ACTIONS))
    for place, value, action in cases:
        folder = tmp_path / f"{place}_{value}_{action}"
        check(folder, *spoil(config, folder, ALONE, place, value, action), place, value, action)
    figure(
        "R8",
        f"{len(cases)} of {len(cases)} ({len(PLACES)} places x NaN, inf, -inf x stop, roll_back) "
        "caught before the step, responses named",
    )


@pytest.mark.reliability
def test_on_two_ranks_it_is_caught_on_both(model_folder, tmp_path, figure):
    """Spoilt on the second rank only: the first must stop, or go back, with it."""
    make_data(tmp_path)
    path = make_config(
        tmp_path,
        model_folder("qwen2_5_vl"),
        deepspeed={"zero_stage": 2},
        train={"steps": 4, "timeout_s": 60},
    )
    cases = list(product(PLACES, ("nan",), ACTIONS))
    told = torchrun(
        2, "tests.reliability.spoilt_runs", path, tmp_path, json.dumps(cases), timeout=600
    )
    assert [f"rank {rank}: {len(cases)} caught" in told for rank in range(2)] == [True, True]
    figure(
        "R8",
        f"{len(cases)} of {len(cases)} ({len(PLACES)} places x 2 policies) on two ranks at ZeRO-2, "
        "spoilt on the second rank only",
    )


@pytest.mark.parametrize(
    ("place", "value", "module", "protection"),
    [
        ("old_logprob", "inf", update, "in_microbatch"),
        ("parameter", "nan", shards, "check_finite"),
        ("outcome", "nan", collect, "check_rollouts"),
    ],
)
@pytest.mark.reliability
def test_without_the_check_it_is_not_caught_in_time(
    config, tmp_path, monkeypatch, place, value, module, protection
):
    """The negative control of the tests above."""
    monkeypatch.setattr(module, protection, lambda *_: None)
    with pytest.raises((AssertionError, AttributeError)):  # the latter: standard deviation of NaN
        check(
            tmp_path / "run",
            *spoil(config, tmp_path / "run", ALONE, place, value, "stop"),
            place,
            value,
            "stop",
        )


@pytest.mark.reliability
def test_from_the_command_line(config, tmp_path):
    done = cli("train", "--config", str(config), *SETTINGS, fault="old_logprob:3:nan", timeout=180)
    assert done.returncode == 3, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "rlfr-vlm train: step 3: non_finite: not finite: the old log-probs of response train"
    ), last
    assert last.endswith("No weight has seen it (monitors.non_finite=stop)"), last
    assert (tmp_path / "run/checkpoints/latest").read_text() == "global_step_2"


def test_a_model_that_is_spoilt_already_gives_no_step(model_folder, tmp_path):
    make_data(tmp_path)
    policy = Policy(ModelConfig(path=model_folder("qwen2_5_vl"), dtype="float32"))
    with torch.no_grad():
        next(iter(policy.trained().values()))[0] = torch.nan
    policy.save(tmp_path / "spoilt")
    path = make_config(tmp_path, str(tmp_path / "spoilt"), flow=None)
    with pytest.raises(
        StoppedError,
        match=r"step 1: non_finite: `model.*` holds NaN or an infinity on its way to an engine. No "
        r"engine ",
    ):
        train_rank(load_config(path), ALONE)
    with pytest.raises(
        NonFiniteWeightError, match=r"holds NaN or an infinity on its way to an engine"
    ):
        list(policy.weight_buckets(2**20))


def test_log_probs_of_an_engine_that_are_no_numbers_end_the_run(config):
    """With finite weights, and of one response."""

    class Overflowing(HFEngine):
        def sample(self, prompts, sampling):
            (first, *others), *groups = [
                group.rollouts for group in super().sample(prompts, sampling)
            ]
            changed = [
                (replace(first, logprobs=(-math.inf, *first.logprobs[1:])), *others),
                *groups,
            ]
            return [RolloutGroup(rollouts[0].prompt, tuple(rollouts)) for rollouts in changed]

    cfg = load_config(config)
    with pytest.raises(
        StoppedError,
        match=r"not finite: the engine's log-probs of response train\d#0. No weight has seen it",
    ):
        train_rank(cfg, ALONE, lambda policy, _: Overflowing(cfg.rollout, policy))


def test_a_field_that_is_not_finite_is_not_written(tmp_path, model_folder, config):
    from rlfr_vlm.flow.spec import FlowSpec

    policy = Policy(ModelConfig(path=model_folder("qwen2_5_vl"), dtype="float32"))
    field = FlowField(FlowSpec.of(load_config(config).flow, policy.identity))
    with torch.no_grad():
        next(field.network.parameters()).view(-1)[-1] = -torch.inf
    with pytest.raises(NonFiniteWeightError, match="on its way to a field's checkpoint"):
        field.save(tmp_path / "field")
    assert not (tmp_path / "field").exists()


def test_large_numbers_are_numbers():
    big = {
        "sum": torch.full((4,), 3e38),
        "half": torch.full((2**12,), 6e4, dtype=torch.float16),
        "count": torch.tensor([3]),
    }
    assert (
        not_finite(big) is None
        and not_finite({}) is None
        and not_finite({"none": torch.zeros(0)}) is None
    )
    check_finite(big, "here")
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not_finite({**big, "bad": torch.tensor([1.0, value])}) == "bad"
    assert not_finite({"both": torch.tensor([torch.inf, -torch.inf])}) == "both"


REWARD = """
def reward(completions, **columns):
    return [float("nan") if i == 1 else float(len(str(text)) % 3) for i, text in enumerate(completions)]
"""


@pytest.mark.parametrize("allowed", [0.2, 0.1])
def test_a_reward_that_is_no_number_is_an_error_of_its_response(model_folder, tmp_path, allowed):
    """One of eight responses: left out of its group where so many errors are allowed, and the end
    of the run where they are not.
    """
    make_data(tmp_path)
    (tmp_path / "nan.py").write_text(REWARD)
    reward = {"function": f"{tmp_path / 'nan.py'}:reward", "max_error_frac": allowed}
    cfg = load_config(
        make_config(
            tmp_path,
            model_folder("qwen2_5_vl"),
            flow=None,
            reward=reward,
            train={"steps": 1, "save_steps": 1},
        )
    )
    if allowed < 1 / 8:
        with pytest.raises(
            StoppedError,
            match=r"1 of 8 responses could not be graded .*: the reward function returned "
            r"reward=nan",
        ):
            train_rank(cfg, ALONE)
        return
    train_rank(cfg, ALONE)
    (metrics,) = read_lines(tmp_path / "run/metrics.jsonl")
    assert metrics["reward/error_frac"] == 1 / 8
