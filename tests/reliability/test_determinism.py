"""R16: the same command gives the same bits, however many grader workers there are and in whatever
order they answer.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.reliability.started import Started, finished, ledger, prepared, sums

STEPS = 6
REWARD = {
    "function": None,
    "answer": "text",
    "grader": {"workers": 1, "wall_seconds": 120},
}  # by worker processes, and never `error`
CLEAN = 3


def disturbed(config, out, forks, *overrides):
    """A run whose grader workers are stopped for a moment, now and then, so that verdicts come in
    other orders. Returns how often.
    """
    chance, times = random.Random(0), 0
    with Started(config, out, *overrides, forks=forks) as run:
        while run.process.poll() is None:
            workers = [pid for pid, _ in run.left() if is_grader(pid)]
            if workers and (out / "config.resolved.yaml").exists():
                pid = chance.choice(workers)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(chance.uniform(0.005, 0.05))
                    os.kill(pid, signal.SIGCONT)
                    times += 1
            time.sleep(0.005)
        assert run.end() == 0, run.text[-3000:]
    return times


def is_grader(pid):
    with suppress(OSError):
        return b"rlfr_vlm.rewards.grader" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_clean_runs_are_equal_whatever_the_graders_do(model_folder, forks, tmp_path, figure, kind):
    config, _, _ = prepared(
        tmp_path / "a", model_folder, kind, reward=REWARD, train={"steps": STEPS, "save_steps": 3}
    )
    for number in range(CLEAN):
        finished(
            config, tmp_path / f"clean{number}"
        )  # each a process of its own, whose hashes of texts are seeded anew
    finished(config, tmp_path / "two_workers", "reward.grader.workers=2", forks=forks)
    times = disturbed(config, tmp_path / "shuffled", forks, "reward.grader.workers=2")
    runs = [*(f"clean{number}" for number in range(CLEAN)), "two_workers", "shuffled"]
    found = [(sums(tmp_path / run, STEPS), ledger(tmp_path / run)) for run in runs]
    for run, (bits, rewards) in zip(runs[1:], found[1:], strict=True):
        assert bits == found[0][0], run
        assert rewards == found[0][1], run
    assert times > STEPS
    figure(
        "R16",
        f"{kind}: {CLEAN} clean runs, one with 2 grader workers instead of 1, and one whose "
        f"workers were stopped for a moment {times} times: {len(runs)} of {len(runs)} equal "
        "(weights, field, optimisers, generators, export, rewards)",
    )
