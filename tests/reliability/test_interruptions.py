"""R1 and R3: killed at named points and at random moments, or asked to stop, a run that is started
again ends as if nothing had been.

The undisturbed runs are processes of their own; those of one rank that are disturbed, and go on,
are forks (tests/reliability/forks.py).
"""

import json
import random
import signal
import time

import pytest

from rlfr_vlm.storage.checkpoint import PREFIX, list_checkpoints, verify
from tests.reliability.started import (
    SAVE_STEPS,
    STEPS,
    Started,
    finished,
    ledger,
    newest_step,
    prepared,
    steps_done,
    sums,
)
from tests.runs import make_config

RANDOM = "random"
KILLS = {  # 8 in saves and the export, 4 in rollouts and syncs, 8 at random moments
    "text": [
        "checkpoint_file:5:tear",
        "checkpoint_files:2:kill",
        "checkpoint_rename:3:kill",
        "checkpoint_latest:4:kill",
        "checkpoint_prune:1:kill",
        "export:1:kill",
        "sync:1:kill",
        "rollout:8:kill",
        *[RANDOM] * 6,
    ],
    "vision": ["checkpoint_policy:3:kill", "sync:7:kill", RANDOM],
    "two ranks, ZeRO-2, bfloat16": ["checkpoint_manifest:3:kill", "rollout:5:kill", RANDOM],
}
STOPS = {
    "rollout:5:term": 5,
    "backward:7:term": 7,
    "checkpoint_file:5:term": 6,
    "eval:3:term": 9,
}  # and the step that it should stop at
SAVED_SECONDS = 30.0  # from the step before to the exit: the grace that schedulers give
TWICE, APART = 20, 0.1


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory):
    """By kind: how it is started, what it leaves, and the seconds between the time when it has
    restored nothing and its end.
    """
    known = {}

    def run(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            config, overrides, ranks = prepared(folder, model_folder, kind)
            whole = folder / "whole"
            with Started(config, whole, *overrides, ranks=ranks) as started:
                assert started.wait_for(whole / "config.resolved.yaml")
                begun = time.monotonic()
                assert started.end() == 0, started.text[-3000:]
                known[kind] = (
                    (config, overrides, ranks),
                    (sums(whole, STEPS), ledger(whole)),
                    time.monotonic() - begun,
                )
        return known[kind]

    return run


def killed_at_random(how, out, forks, share, seconds):
    """Kill the process that was started, and it alone, after this share of an undisturbed run's
    time.
    """
    config, overrides, ranks = how
    while True:
        with Started(config, out, *overrides, ranks=ranks, forks=forks) as run:
            assert run.wait_for(out / "config.resolved.yaml"), run.text[-3000:]
            time.sleep(share * seconds)
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
                assert not run.orphans(), run.text[-2000:]
                return
        seconds *= 0.8  # it was quicker this time
        out.rename(out.with_name(f"{out.name}_quicker_{seconds:.2f}"))


def killed_at(how, out, forks, fault):
    """Kill it (of several ranks: each that comes there) at a named point."""
    config, overrides, ranks = how
    with Started(config, out, *overrides, ranks=ranks, fault=fault, forks=forks) as run:
        assert run.end() == (-signal.SIGKILL if ranks == 1 else 1), run.text[-3000:]
        assert not run.orphans(), run.text[-2000:]


@pytest.mark.reliability
@pytest.mark.parametrize("kind", KILLS)
def test_killed_and_started_again_a_run_ends_with_the_same_bits(
    undisturbed, forks, tmp_path, figure, kind
):
    how, expected, seconds = undisturbed(kind)
    config, overrides, ranks = how
    moments, lost = random.Random(0), []
    for number, fault in enumerate(KILLS[kind]):
        out = tmp_path / f"killed{number}"
        if fault == RANDOM:
            killed_at_random(how, out, forks, moments.uniform(0, 0.95), seconds)
        else:
            killed_at(how, out, forks, fault)
        for checkpoint in list_checkpoints(out / "checkpoints"):
            verify(checkpoint)  # whole, or not called one
        lost.append(steps_done(out) - newest_step(out))
        finished(config, out, *overrides, ranks=ranks, forks=forks)
        assert sums(out, STEPS) == expected[0], fault
        assert ledger(out) == expected[1], fault
        assert not [p for p in out.rglob("*") if ".tmp" in p.name], fault
    assert max(lost) <= SAVE_STEPS
    named = len([fault for fault in KILLS[kind] if fault != RANDOM])
    figure(
        "R1",
        f"{len(lost)} of {len(lost)} kills ({kind}; {named} at named points, {len(lost) - named} "
        "at random moments) resumed by the same command: weights, field, optimisers, generators, "
        f"export and rewards equal by sha256; at most {max(lost)} steps repeated "
        f"(save_steps={SAVE_STEPS}); 0 processes left after 5 s",
    )


@pytest.mark.reliability
def test_asked_to_stop_it_saves_the_step_it_is_in_and_goes_on_to_the_same_bits(
    undisturbed, forks, tmp_path, figure
):
    (config, _, _), expected, _ = undisturbed("text")
    slowest = 0.0
    for number, (fault, step) in enumerate(STOPS.items()):
        out = tmp_path / f"stopped{number}"
        with Started(config, out, fault=fault, forks=forks) as run:
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
        finished(config, out, forks=forks)
        assert sums(out, STEPS) == expected[0], fault
        assert ledger(out) == expected[1], fault
    assert slowest < SAVED_SECONDS
    figure(
        "R3",
        f"SIGTERM in rollout, backward, save and evaluation: {len(STOPS)} of {len(STOPS)} exit 75 "
        f"with a verified checkpoint of that step, at most {slowest:.1f} s after the step before "
        f"it (limit {SAVED_SECONDS:g}), and resume to equal bits",
    )


@pytest.mark.reliability
def test_asked_twice_it_leaves_at_once_and_latest_names_a_whole_checkpoint(
    model_folder, forks, tmp_path, figure
):
    """One run, stopped like that again and again; it saves after every step, so that many a second
    signal comes in a save.
    """
    prepared(tmp_path / "a", model_folder, "text")
    config = make_config(
        tmp_path / "a", model_folder("qwen2"), train={"steps": 100_000, "save_steps": 1, "log_rollouts": 0}, eval={"every": 0}
    )  # fmt: skip
    out, step, in_time = tmp_path / "run", 0, 0
    for number in range(TWICE):
        with Started(config, out, forks=forks) as run:
            run.wait_for(out / "checkpoints" / "latest")
            while run.text.count("tokens/s") <= number % 3 and run.process.poll() is None:
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
        f"two SIGTERMs 100 ms apart: {TWICE} of {TWICE} times exit 75 and `latest` names a "
        f"verified checkpoint ({in_time} times the second one ended it before it had saved)",
    )
