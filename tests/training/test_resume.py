"""A run killed anywhere and started again ends with the same weights, to the bit; and would not if anything were left out of the restore."""

import json
import random
from pathlib import Path

import pytest

from rlfr_vlm.commands import train
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.rollout import hf_engine
from rlfr_vlm.training import run as run_module
from rlfr_vlm.training import state as state_module
from rlfr_vlm.training.checkpoint import list_checkpoints
from tests.runs import POLICY, cli, digest, make_config, make_data

POINTS = ["rollout:3:kill", "reward:2:kill", "backward:4:kill", "step:3:kill", "checkpoint_policy:2:kill"]
STOCHASTIC_REWARD = """
import random

def reward(prompts, completions, **columns):
    return [random.random() for _ in completions]
"""


def prepared(folder, model, **sections):
    folder.mkdir(exist_ok=True)
    make_data(folder)
    (folder / "noisy.py").write_text(STOCHASTIC_REWARD)  # draws from a generator that only the checkpoint can bring back
    return make_config(folder, model, reward={"function": f"{folder / 'noisy.py'}:reward"}, **sections)


def killed_and_resumed(config, folder, point):
    killed = cli("train", "--config", str(config), f"output_dir={folder}", fault=point)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = cli("train", "--config", str(config), f"output_dir={folder}")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    return digest(folder, 4)


def test_a_kill_inside_the_second_save_costs_nothing(model_folder, tmp_path):
    """The smoke case of the slow tests below."""
    config = prepared(tmp_path / "a", model_folder("qwen2_5_vl"))
    done = cli("train", "--config", str(config), f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert killed_and_resumed(config, tmp_path / "killed", "checkpoint_policy:2:kill") == digest(tmp_path / "whole", 4)
    metrics = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert metrics == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "flowrl", "dapo"])
def test_heads_references_and_dynamic_sampling_resume_to_the_same_weights(model_folder, tmp_path, method):
    rounds = {} if method == "ppo" else {"rollout": {"max_rounds": 3}}
    sections = {"algorithm": {"method": method, "updates_per_rollout": 2}, **rounds}
    config = prepared(tmp_path / "a", model_folder("qwen2_5_vl"), **({"flow": None} if method == "flowrl" else {}), **sections)
    done = cli("train", "--config", str(config), f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    killed = cli("train", "--config", str(config), f"output_dir={tmp_path / 'killed'}", fault="reward:4:kill")
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = cli("train", "--config", str(config), f"output_dir={tmp_path / 'killed'}")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    names = [POLICY, *(["head.safetensors"] if method != "dapo" else [])]
    for name in names:
        whole, killed_run = ((tmp_path / run / "checkpoints/global_step_4" / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed_run, name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_killed_at_five_points_resumes_to_the_same_weights(model_folder, tmp_path, engine):
    config = prepared(tmp_path / "a", model_folder("qwen2_5_vl"), rollout={"engine": engine})
    done = cli("train", "--config", str(config), f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    expected = digest(tmp_path / "whole", 4)
    for number, point in enumerate(POINTS):
        assert killed_and_resumed(config, tmp_path / f"killed{number}", point) == expected, point


@pytest.fixture
def interrupted(model_folder, tmp_path):
    """Runs in this process: the config of a run that stands at step 2, and the digest of the uninterrupted one."""
    config = prepared(tmp_path / "a", model_folder("qwen2_5_vl"))
    whole = load_config(config, (f"output_dir={tmp_path / 'whole'}",))
    train(whole)
    half = tmp_path / "half" / "checkpoints"
    half.mkdir(parents=True)
    list_checkpoints(tmp_path / "whole" / "checkpoints")[0].rename(half / "global_step_2")
    return load_config(config, (f"output_dir={tmp_path / 'half'}",)), digest(tmp_path / "whole", 4)


def resume(cfg):
    random.seed(99)  # another process would not be where this one is
    train(cfg)
    return digest(Path(cfg.output_dir), 4)


@pytest.mark.slow
def test_resumed_in_full_is_equal(interrupted):
    cfg, expected = interrupted
    assert resume(cfg) == expected


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["rng", "data_position", "flow_optimizer", "request_seeds"])
def test_negative_control_leaving_one_thing_out_is_seen(interrupted, monkeypatch, left_out):
    cfg, expected = interrupted
    if left_out == "rng":
        monkeypatch.setattr(state_module, "set_rng_state", lambda state: None)
    elif left_out == "request_seeds":
        original = hf_engine.request_seed
        monkeypatch.setattr(hf_engine, "request_seed", lambda *parts: original("another process", *parts))
    else:
        load = run_module.load_state

        def partial(folder, learner, prompts, state):
            load(folder, learner, prompts, state)
            if left_out == "data_position":
                prompts.stream.position = 0
            else:
                learner.flow_optimizer.torch.state.clear()
                learner.flow_optimizer.steps = 0

        monkeypatch.setattr(run_module, "load_state", partial)
    assert resume(cfg) != expected


def test_a_changed_config_is_not_resumed_in_silence(model_folder, tmp_path):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"), train={"steps": 1, "save_steps": 1})
    train(load_config(config))
    with pytest.raises(UserError, match=r"another config: optim\.lr: 0\.001 -> 0\.5"):
        train(load_config(config, ("optim.lr=0.5",)))


def test_two_runs_cannot_share_a_folder(model_folder, tmp_path):
    import filelock

    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"), train={"steps": 1})
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="in use by another run"):
        train(load_config(config))
