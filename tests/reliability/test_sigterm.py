"""R3: a run that is asked to stop saves where it stands, says so by its exit code, and goes on as if nothing had been."""

import json
import signal
import time

import pytest

from rlfr_vlm.training.checkpoint import PREFIX, list_checkpoints, verify
from tests.reliability.started import Started, finished, ledger, newest_step, steps_done, sums
from tests.reliability.test_kills import prepared
from tests.runs import make_config

STEPS, SAVE_STEPS = 12, 3
POINTS = {"rollout:5:term": 5, "backward:7:term": 7, "checkpoint_file:5:term": 6, "eval:1:term": 6}  # and the step that it should stop at
SAVED_SECONDS = 10.0  # from the signal to the exit
TWICE, APART = 20, 0.1


@pytest.mark.reliability
def test_asked_to_stop_it_saves_the_step_it_is_in_and_goes_on_to_the_same_bits(model_folder, tmp_path, figure):
    config, _, _ = prepared(tmp_path / "a", model_folder, "text")
    finished(config, tmp_path / "whole")
    slowest = 0.0
    for number, (fault, step) in enumerate(POINTS.items()):
        out = tmp_path / f"stopped{number}"
        with Started(config, out, fault=fault) as run:
            while steps_done(out) < step - 1 and run.process.poll() is None:
                time.sleep(0.01)
            begun = time.monotonic()
            assert run.end() == 75, (fault, run.text[-3000:])
            slowest = max(slowest, time.monotonic() - begun)
            assert f"stopped at step {step} on SIGTERM; run the same command to go on" in run.text
            assert not run.orphans()
        assert newest_step(out) == step
        assert (out / "checkpoints/latest").read_text() == f"{PREFIX}{step}"
        verify(out / "checkpoints" / f"{PREFIX}{step}")
        finished(config, out)
        assert sums(out, STEPS) == sums(tmp_path / "whole", STEPS), fault
        assert ledger(out) == ledger(tmp_path / "whole"), fault
    assert slowest < SAVED_SECONDS
    figure(
        "R3",
        f"SIGTERM in rollout, backward, save and evaluation: {len(POINTS)} of {len(POINTS)} exit 75 with a verified checkpoint of that step, "
        f"at most {slowest:.1f} s after the step before it (limit {SAVED_SECONDS:g}), and resume to equal bits",
    )


@pytest.mark.reliability
def test_asked_twice_it_leaves_at_once_and_latest_names_a_whole_checkpoint(model_folder, tmp_path, figure):
    """One run, stopped like that again and again; it saves after every step, so that many a second signal comes in a save."""
    prepared(tmp_path / "a", model_folder, "text")
    config = make_config(
        tmp_path / "a", model_folder("qwen2"), train={"steps": 100_000, "save_steps": 1, "log_rollouts": 0}, eval={"every": 0}
    )  # fmt: skip
    out, step, in_time = tmp_path / "run", 0, 0
    for number in range(TWICE):
        with Started(config, out) as run:
            while steps_done(out) <= step + number % 3 and run.process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.02 * (number % 5))
            run.process.send_signal(signal.SIGTERM)
            time.sleep(APART)
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGTERM)
            assert run.end(30) == 75, run.text[-3000:]
            in_time += "on SIGTERM" not in run.text
            assert not run.orphans()
        latest = out / "checkpoints" / (out / "checkpoints/latest").read_text()
        verify(latest)
        for checkpoint in list_checkpoints(out / "checkpoints"):
            verify(checkpoint)
        state = json.loads((latest / "state.json").read_text())
        assert state["step"] >= step
        step = newest_step(out)
    assert in_time  # else the second signal never came before the end
    figure(
        "R3",
        f"two SIGTERMs 100 ms apart: {TWICE} of {TWICE} times exit 75 and `latest` names a verified checkpoint "
        f"({in_time} times the second one ended it before it had saved)",
    )
