"""Negative controls that stand beside no test of their own: with its protection switched off, what
a line of the contract promises is not so.

The others: R1 and R16 in test_left_out.py, R5 in test_corruption.py, R7 and R19 in tests/rollout,
    R8 in test_non_finite.py, R9 in
test_strange_rows.py, R10 in test_graded_answers.py, R13 in test_concurrent.py, R14 in
test_network.py, R15 in test_secrets.py, R18 in test_resume_matrix.py.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

import pytest

from rlfr_vlm.errors import DiskFullError
from rlfr_vlm.storage import checkpoint
from tests.evaluation.scripted_server import TRANSIENT, ScriptedServer, right_verdict
from tests.launch.test_soak import MOST_GROWTH, soaked
from tests.reliability.test_disk_full import litter, small_disk
from tests.reliability.test_judged_runs import KEY, Run, model
from tests.runs import ROOT, make_config, make_text_data
from tests.test_launch import peers

DEAF = """
import signal
keep = signal.signal
signal.signal = lambda number, handler: None if number == signal.SIGTERM else keep(number, handler)
from rlfr_vlm.cli import main
main()
"""
LEAKING = """
kept = []

def reward(prompts, completions, **columns):
    kept.append(b"x" * 2**20)
    return [0.5 for _ in completions]
"""


@pytest.mark.reliability
def test_without_a_handler_sigterm_loses_the_step(model_folder, tmp_path, figure):
    make_text_data(tmp_path)
    config = make_config(
        tmp_path, model_folder("qwen2"), flow=None, train={"steps": 4, "save_steps": 100}
    )
    command = [sys.executable, "-c", DEAF, "train", "--config", str(config)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RLFR_FAULT": "backward:2:term",
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr[-2000:]
    assert not (tmp_path / "run/checkpoints/latest").exists()
    figure("R3", "control, no handler: SIGTERM ends the run without a checkpoint")


@pytest.mark.reliability
def test_without_its_care_a_full_disk_says_nothing_and_keeps_litter(tmp_path, monkeypatch, figure):
    monkeypatch.setattr(checkpoint, "refusals_named", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
    with small_disk(tmp_path / "disk", 3 * 2**20) as disk, monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(OSError) as error:
            checkpoint.commit_checkpoint(
                disk,
                1,
                lambda folder: (folder / "policy.bin").write_bytes(b"1" * 4 * 2**20),
                keep=2,
            )
        assert not isinstance(error.value, DiskFullError) and str(
            disk / "global_step_1"
        ) not in str(error.value)
        assert litter(disk)
    figure(
        "R4",
        "control, nothing caught and cleared: an error that names no checkpoint, and a "
        "half-written folder",
    )


@pytest.mark.reliability
def test_without_a_limit_a_stopped_rank_is_not_missed(figure):
    waiting, silent = peers(600)
    try:
        silent.send_signal(signal.SIGSTOP)
        assert select.select([waiting.stdout], [], [], 15)[0] == []
    finally:
        silent.kill()
        waiting.kill()
    figure("R6", "control, no limit: a stopped rank is not noticed within 15 s")


@pytest.mark.reliability
def test_without_retries_a_judge_that_fails_leaves_no_accuracy(tmp_path, figure):
    with ScriptedServer(model) as models, ScriptedServer(right_verdict, key=KEY) as judges:
        faults = ScriptedServer(faults={kind: 0.4 / len(TRANSIENT) for kind in TRANSIENT}, seed=3)
        judges.faults = lambda prompt, before: (
            faults.fault(prompt, before) if "What is" in prompt else None
        )
        run = Run(tmp_path, models, judges, retries=0, timeout=1.0)
        assert run.finish() == 3
        assert run.summary["accuracy"] is None
        failed = run.summary["verdicts"]["failed"]
    figure("R12", f"control, no retries: {failed} verdicts missing, no accuracy, exit 3")


@pytest.mark.reliability
def test_a_leak_is_seen(model_folder, tmp_path, figure):
    make_text_data(tmp_path)
    (tmp_path / "leaking.py").write_text(LEAKING)
    config = make_config(
        tmp_path, model_folder("qwen2"), flow=None, rollout={"num_prompts": 2, "group_size": 2, "max_new_tokens": 4},
        train={"steps": 150, "save_steps": 75, "log_rollouts": 0}, reward={"function": f"{tmp_path / 'leaking.py'}:reward"},
    )  # fmt: skip
    found = soaked(config, tmp_path, 150)
    assert found.growth > MOST_GROWTH
    figure("R17", f"control, 1 MiB lost at each step: {found.growth:+.1%} from step 50 to 150")
