"""A run killed anywhere and started again ends with the same weights, to the bit (all of it:
tests/reliability).
"""

import json
import random

import numpy as np
import pytest
import torch

from rlfr_vlm.commands import train
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.storage.state import generators_kept, seed_generators
from tests.reliability.started import NOISY_REWARD
from tests.runs import POLICY, cli, digest, make_config, make_data

POINTS = [
    "rollout:3:kill",
    "reward:2:kill",
    "backward:4:kill",
    "step:3:kill",
    "checkpoint_policy:2:kill",
]


def prepared(folder, model, **sections):
    folder.mkdir(exist_ok=True)
    make_data(folder)
    (folder / "noisy.py").write_text(
        NOISY_REWARD
    )  # draws from a generator that only the checkpoint can bring back
    return make_config(
        folder, model, reward={"function": f"{folder / 'noisy.py'}:reward"}, **sections
    )


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
    assert killed_and_resumed(config, tmp_path / "killed", "checkpoint_policy:2:kill") == digest(
        tmp_path / "whole", 4
    )
    metrics = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert metrics == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_kill_between_an_evaluation_and_its_verdict_costs_neither(model_folder, tmp_path):
    """The checkpoint is there, the accuracy as well, and not yet which checkpoint is the best."""
    config = prepared(tmp_path / "a", model_folder("qwen2_5_vl"), eval={"every": 2})
    killed_and_resumed(config, tmp_path / "killed", "best:1:kill")
    done = cli("train", "--config", str(config), f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    best, scores = [], []
    for name in ("killed", "whole"):
        best.append((tmp_path / name / "checkpoints/best.json").read_text())
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        scores.append([line for line in lines if any(key.startswith("val/") for key in line)])
    assert (
        best[0] == best[1]
        and scores[0] == scores[1]
        and [line["step"] for line in scores[0] if "val/score" in line] == [2, 4]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "flowrl", "dapo"])
def test_heads_references_and_dynamic_sampling_resume_to_the_same_weights(
    model_folder, tmp_path, method
):
    rounds = {} if method == "ppo" else {"rollout": {"max_rounds": 3}}
    sections = {"algorithm": {"method": method, "updates_per_rollout": 2}, **rounds}
    config = prepared(
        tmp_path / "a",
        model_folder("qwen2_5_vl"),
        **({"flow": None} if method == "flowrl" else {}),
        **sections,
    )
    done = cli("train", "--config", str(config), f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    killed = cli(
        "train", "--config", str(config), f"output_dir={tmp_path / 'killed'}", fault="reward:4:kill"
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = cli("train", "--config", str(config), f"output_dir={tmp_path / 'killed'}")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    names = [POLICY, *(["head.safetensors"] if method != "dapo" else [])]
    for name in names:
        whole, killed_run = (
            (tmp_path / run / "checkpoints/global_step_4" / name).read_bytes()
            for run in ("whole", "killed")
        )
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


def test_a_changed_config_is_not_resumed_in_silence(model_folder, tmp_path):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"), train={"steps": 1, "save_steps": 1})
    train(load_config(config))
    with pytest.raises(UserError, match=r"another config: optim\.lr: 0\.001 -> 0\.5"):
        train(load_config(config, ("optim.lr=0.5",)))


def test_what_an_evaluation_draws_training_does_not_miss():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_generators(1)
    expected = draw()
    seed_generators(1)
    with generators_kept():
        draw()
    assert draw() == expected


def test_two_runs_cannot_share_a_folder(model_folder, tmp_path):
    import filelock

    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"), train={"steps": 1})
    (tmp_path / "run").mkdir()
    with (
        filelock.FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(UserError, match="in use by another run"),
    ):
        train(load_config(config))
