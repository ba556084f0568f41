"""Rollouts one step ahead: how old they are, what corrects for it, and what a checkpoint then says."""

import json

import pytest

from rlfr_vlm.commands import train_rank
from rlfr_vlm.config import load_config
from rlfr_vlm.ranks import ALONE
from rlfr_vlm.rollout.hf_engine import HFEngine
from tests.runs import make_config, make_data

AHEAD = ("rollout.staleness=1", "launcher=ray", "ray.engines=1", "algorithm.importance_cap=2")


def run(config, *overrides):
    """With an engine that has weights of its own, as engines in other processes have."""
    cfg = load_config(config, overrides)
    folder = train_rank(cfg, ALONE, lambda policy, _: HFEngine(cfg.rollout, policy, cfg.model))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    return (
        folder,
        metrics,
        [[json.loads(line) for line in file.read_text().splitlines()] for file in files],
    )


@pytest.fixture
def config(model_folder, tmp_path):
    make_data(tmp_path)
    return make_config(
        tmp_path,
        model_folder("qwen2_5_vl"),
        train={"steps": 4, "save_steps": 2},
        optim={"lr": 1e-2},
    )


def test_a_batch_is_never_older_than_one_step(config, tmp_path):
    _, metrics, rollouts = run(config, *AHEAD, f"output_dir={tmp_path / 'ahead'}")
    versions = [{line["policy_version"] for line in lines} for lines in rollouts]
    assert versions == [{0}, {0}, {1}, {2}]
    assert [m["step"] for m in metrics if "reward/mean" in m] == [1, 2, 3, 4]
    apart = [m["rollout/logprob_diff_mean"] for m in metrics if "reward/mean" in m]
    assert (
        apart[0] < 1e-5 < min(apart[1:])
    )  # the policy has moved on, and the importance weights see it
    assert all("rollout/importance_mean" in m for m in metrics if "reward/mean" in m)


def test_in_step_it_is_the_same_as_ever(config, tmp_path):
    _, _, ahead = run(config, *AHEAD, f"output_dir={tmp_path / 'ahead'}")
    _, _, in_step = run(config, f"output_dir={tmp_path / 'in_step'}")
    prompts = [[line["prompt_id"] for line in lines] for lines in (*ahead, *in_step)]
    assert prompts[:4] == prompts[4:]  # the same rows in the same order
    assert [line["tokens"] for line in ahead[0]] == [line["tokens"] for line in in_step[0]]
    assert {line["policy_version"] for line in in_step[3]} == {3}


def test_what_was_sampled_ahead_is_sampled_again_after_a_restart(config, tmp_path):
    folder, _, whole = run(config, *AHEAD, f"output_dir={tmp_path / 'ahead'}")
    state = json.loads((folder / "checkpoints/global_step_2/state.json").read_text())
    assert (
        state["data_position"] == 4
    )  # two steps of two prompts, though those of step 3 were drawn already
    for later in ("global_step_4", "latest"):
        path = folder / "checkpoints" / later
        path.rename(folder / f"removed_{later}")
    _, _, resumed = run(config, *AHEAD, f"output_dir={folder}")
    assert [[line["prompt_id"] for line in lines] for lines in resumed] == [
        [line["prompt_id"] for line in lines] for lines in whole
    ]
    assert {line["policy_version"] for line in resumed[2]} == {
        2
    }  # the first step after a restart is not ahead
