"""How long a command takes to begin, in CPU seconds: what else runs on the machine is not counted.

Bounds are of this process and its children on one thread; they leave room for a slow machine, not
for another library.
"""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

RECIPE = "scripts/qwen2.5-vl-3b/rlfr.yaml"


def cpu_seconds(*arguments, code=0):
    """CPU seconds of a Python interpreter and of all it waited for, and what it printed."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == code, printed[-3000:]
    return used.ru_utime + used.ru_stime, printed


@pytest.mark.parametrize(
    ("bound", "arguments"),
    [
        pytest.param(5, ("doctor",), id="doctor"),
        pytest.param(3, ("--help",), id="help"),
        pytest.param(3, ("train", "--config", RECIPE, "--dry-run"), id="dry-run"),
        pytest.param(3, ("demo", "--help"), id="demo"),
    ],
)
def test_a_verb_that_computes_nothing_answers_at_once(bound, arguments):
    used, printed = cpu_seconds("-m", "rlfr_vlm.cli", *arguments)
    assert used < bound, f"{used:.1f} CPU seconds\n{printed}"


def test_importing_what_train_needs():
    heavy = ("transformers", "torchvision", "tensorboard", "plotly", "sympy", "math_verify")
    code = (
        "import sys, rlfr_vlm.commands\n"
        f"print(sorted({{*{heavy}, 'torch._dynamo', 'scipy', 'pandas'}} & set(sys.modules)))"
    )
    used, printed = cpu_seconds("-c", code)
    assert printed.strip() == "[]"
    assert used < 5, f"{used:.1f} CPU seconds"


def test_a_plan_of_a_model_of_three_billion_parameters():
    """It times single layers of that size; 11 CPU seconds where it was measured."""
    used, printed = cpu_seconds(
        "-m", "rlfr_vlm.cli", "plan", "--config", RECIPE, "model.device=cpu", code=2
    )
    assert "does not fit" in printed
    assert used < 20, f"{used:.1f} CPU seconds"
