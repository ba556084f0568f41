"""The demos, as make runs them."""

import json
import subprocess
import sys

import pytest

from tests.runs import ROOT


def demo(task, *arguments, timeout=1800):
    """The JSON line that a demo ends with."""
    command = [sys.executable, "-m", "rlfr_vlm.cli", "demo", task, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (ROOT / result["report"]).stat().st_size < 15 * 2**20
    return result


def test_the_demo_runs_through():
    """The smoke case of the figures below."""
    overrides = [
        "eval.limit=8",
        "eval.every=2",
        "train.steps=2",
        "flow.fit.steps=2",
        "rollout.engine=hf",
        "rollout.num_prompts=4",
    ]
    result = demo("vision", *overrides)
    assert result["steps"] == 2
    assert result["engine"] == "hf"
    assert {
        "accuracy_before",
        "accuracy_after",
        "greedy_before",
        "greedy_after",
        "seconds",
        "accuracy_blank_pictures",
    } <= result.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vision_accuracy_rises_and_the_pictures_are_used(seed):
    result = demo("vision", "--seed", str(seed))
    assert 0.15 <= result["accuracy_before"] <= 0.60
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.15
    assert result["greedy_after"] >= result["greedy_before"]
    assert result["accuracy_blank_pictures"] <= result["commonest_answer"] + 0.05
    assert result["seconds"] < 600


@pytest.mark.slow
def test_text_accuracy_rises():
    result = demo("text")
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.10
    assert result["seconds"] < 1800
