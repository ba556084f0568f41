"""Real runs of the demo with a fault planted in each: the right monitor stops it within ten steps
and names the cause.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlfr_vlm.commands import train_rank
from rlfr_vlm.config import load_config
from rlfr_vlm.demo import recipe
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import ALONE
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.run.monitors import CHECKS
from rlfr_vlm.run.watch import read_lines
from rlfr_vlm.training import collect
from tests.runs import cli, torchrun

PAYS_FOR_LENGTH = """
def score(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) / 100
"""
PAYS_FOR_LENGTH_ONCE = """
calls = 0

def score(reward_inputs):
    global calls
    calls += 1
    bad = 5 <= calls < 8
    return [{"overall": len(r["response"]) / 100 if bad else float(r["ground_truth"] in r["response"])} for r in reward_inputs]
"""
EXPECTED = {
    "flow_unfit"
}  # the demos begin with a new field, which knows nothing: it is warned of, and rightly
EVERY_STOP = [f"monitors.{name}=stop" for name in CHECKS if name not in EXPECTED]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, "-m", "rlfr_vlm.demo.digits", "build", str(folder)],
        check=True,
        capture_output=True,
    )
    return folder


def demo_config(folder, data, *overrides, task="vision"):
    names = [
        f"data.{field}={data / name}.jsonl"
        for field, name in (("train", "train"), ("eval", "test"), ("expert", "expert"))
    ]
    fixed = [
        "flow.profile=published",
        f"output_dir={folder}",
        "train.steps=10",
        "eval.every=0",
        "train.log_rollouts=1",
        "rollout.engine=hf",
        *names,
    ]
    return load_config(recipe(task), (*fixed, *overrides))


def stopped(cfg, monitor, make=None):
    """The event that ended this run, with the monitor at `stop` and the others only warning."""
    cfg = cfg.model_copy(update={"monitors": cfg.monitors.model_copy(update={monitor: "stop"})})
    with pytest.raises(StoppedError, match=rf"monitors.{monitor}=stop"):
        train_rank(cfg, ALONE, make)
    events = read_lines(Path(cfg.output_dir) / "events.jsonl")
    assert events[-1]["monitor"] == monitor and events[-1]["step"] <= 10
    return events[-1]


def test_a_reward_that_pays_for_length(tmp_path, data):
    (tmp_path / "pays.py").write_text(PAYS_FOR_LENGTH)
    event = stopped(
        demo_config(tmp_path / "run", data, f"reward.function={tmp_path / 'pays.py'}:score"),
        "length",
    )
    assert event["cause"] == f"the reward pays for length: {tmp_path / 'pays.py'}:score"


def test_a_policy_that_repeats_tokens(tmp_path, data):
    policy = Policy(demo_config(tmp_path / "run", data).model)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "language_model.layers" in name and name.endswith(
                ("o_proj.weight", "down_proj.weight")
            ):
                # each token predicts itself, the nearest to it in the tied embeddings
                parameter.zero_()
            if name.endswith("language_model.norm.weight"):
                parameter.mul_(8)
    policy.save(tmp_path / "model")
    event = stopped(
        demo_config(tmp_path / "run", data, f"model.path={tmp_path / 'model'}"), "repetition"
    )
    assert event["cause"] == "the model itself repeats tokens, from the first step on"
    assert "most of all" in event["what"]


def test_a_learning_rate_a_hundred_times_too_high(tmp_path, data):
    event = stopped(demo_config(tmp_path / "run", data, "optim.lr=0.02"), "update")
    assert event["cause"].startswith("the learning rate, optim.lr=0.02")


class StaleEngine(HFEngine):
    """Gets weights once, and says ever after that it has the newest."""

    loaded = False

    def load_weights(self, policy):
        if not self.loaded:
            super().load_weights(policy)
        self.loaded = True


def test_an_engine_with_stale_weights(tmp_path, data):
    cfg = demo_config(tmp_path / "run", data)
    event = stopped(cfg, "mismatch", lambda policy, _: StaleEngine(cfg.rollout, policy, cfg.model))
    assert event["cause"].startswith(
        "stale weights or a stale prefix cache: the engine was right at step 1"
    )


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_nucleus_behind_the_trainers_back(tmp_path, data, monkeypatch, engine):
    """transformers' log-probs stay those of the whole distribution, vLLM's are of the nucleus: both
    are found.
    """
    honest = collect.sampling
    monkeypatch.setattr(
        collect, "sampling", lambda *args: dataclasses.replace(honest(*args), top_p=0.5)
    )
    event = stopped(demo_config(tmp_path / "run", data, f"rollout.engine={engine}"), "mismatch")
    assert event["cause"].startswith("sampling settings: ")
    assert ("log-probs agree" if engine == "hf" else "of the distribution") in event["cause"]


def test_a_flow_reward_a_hundred_times_too_heavy(tmp_path, data):
    event = stopped(demo_config(tmp_path / "run", data, "flow.reward.coef=1.0"), "flow_share")
    assert event["cause"] == "the weight of the flow reward, flow.reward.coef=1"


def test_a_passing_fault_is_rolled_back_and_the_run_ends_well(tmp_path, data):
    (tmp_path / "pays.py").write_text(PAYS_FOR_LENGTH_ONCE)
    settings = [
        "train.save_steps=2",
        "train.steps=8",
        "monitors.length=roll_back",
        "rollout.num_prompts=16",
    ]
    cfg = demo_config(
        tmp_path / "run", data, f"reward.function={tmp_path / 'pays.py'}:score", *settings
    )
    folder = train_rank(cfg, ALONE)
    found, metrics, taken = (
        read_lines(folder / f"{name}.jsonl") for name in ("events", "metrics", "rolled_back")
    )
    (event,) = (event for event in found if event["monitor"] not in EXPECTED)
    assert (event["monitor"], event["action"], event["since"], event["step"], event["to"]) == (
        "length",
        "roll_back",
        5,
        7,
        4,
    )
    assert [row["step"] for row in metrics] == [*range(1, 9)]
    assert [row["step"] for row in taken] == [5, 6, 7]
    before, after = taken[0], metrics[4]
    assert after["actor/lr"] == pytest.approx(before["actor/lr"] / 2)  # monitors.roll_back_lr
    assert after["prompt_length/mean"] != before["prompt_length/mean"]  # other prompts and samples
    assert after["reward/length_corr"] == 0.0
    assert (folder / "checkpoints/latest").read_text() == "global_step_8"
    assert len([*(folder / "checkpoints").glob("rolled-back-1-global_step_6-*")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_roll_back_together(tmp_path, data, stage):
    (tmp_path / "pays.py").write_text(PAYS_FOR_LENGTH_ONCE)
    settings = [
        "train.save_steps=2",
        "train.steps=8",
        "monitors.length=roll_back",
        "rollout.num_prompts=16",
        f"deepspeed.zero_stage={stage}",
    ]
    cfg = demo_config(
        tmp_path / "run", data, f"reward.function={tmp_path / 'pays.py'}:score", *settings
    )
    (tmp_path / "config.yaml").write_text(json.dumps(cfg.model_dump(mode="json")))
    torchrun(2, "rlfr_vlm.cli", "train", "--config", tmp_path / "config.yaml", timeout=600)
    (event,) = (
        event
        for event in read_lines(tmp_path / "run/events.jsonl")
        if event["monitor"] not in EXPECTED
    )
    assert (event["action"], event["to"]) == ("roll_back", 4)
    assert [row["step"] for row in read_lines(tmp_path / "run/metrics.jsonl")] == [*range(1, 9)]


HEALTHY = [
    ("vision", ["seed=0"]),
    ("vision", ["seed=1"]),
    ("vision", ["seed=2", "flow=null"]),
    ("vision", ["seed=3", "algorithm.method=dapo"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "overrides"), HEALTHY, ids=[" ".join(overrides) for _, overrides in HEALTHY]
)
def test_no_monitor_stops_a_healthy_run(tmp_path, data, task, overrides):
    """The whole demo, with every monitor at `stop` but the one that speaks of its new field."""
    cfg = demo_config(tmp_path / "run", data, "train.steps=80", *EVERY_STOP, *overrides, task=task)
    folder = train_rank(cfg, ALONE)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 80
    assert {event["monitor"] for event in read_lines(folder / "events.jsonl")} <= EXPECTED


@pytest.mark.slow
def test_no_monitor_stops_the_text_demo(tmp_path):
    """In bfloat16, with vLLM."""
    for arguments in (["build", str(tmp_path / "text")], ["model", str(tmp_path / "smollm2")]):
        command = [sys.executable, "-m", "rlfr_vlm.demo.arithmetic", *arguments]
        subprocess.run(command, check=True, capture_output=True)
    data = [
        f"data.{field}={tmp_path / 'text' / name}.jsonl"
        for field, name in (("train", "train"), ("eval", "test"), ("expert", "expert"))
    ]
    config = str(recipe("text"))
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"model.path={tmp_path / 'smollm2'}",
        "eval.every=0",
        *data,
        *EVERY_STOP,
    ]
    done = cli("train", "--config", config, *overrides, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {event["monitor"] for event in read_lines(tmp_path / "run/events.jsonl")} <= EXPECTED
