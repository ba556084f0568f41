"""R1: killed at named stages of a save, in rollouts and syncs, and at random moments, a run that is started again ends as if nothing had been."""

import random
import signal
import time

import pytest

from rlfr_vlm.training.checkpoint import list_checkpoints, verify
from tests.reliability.started import NOISY_REWARD, Started, finished, ledger, newest_step, steps_done, sums
from tests.runs import make_config, make_data, make_text_data

STEPS, SAVE_STEPS = 12, 3
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


def prepared(folder, model_folder, kind, **sections):
    """The config of a small run of this kind, and how it is started."""
    folder.mkdir(exist_ok=True)
    (make_data if kind == "vision" else make_text_data)(folder)
    (folder / "noisy.py").write_text(NOISY_REWARD)
    sections = {
        "reward": {"function": f"{folder / 'noisy.py'}:reward"},
        "train": {"steps": STEPS, "save_steps": SAVE_STEPS},
        "eval": {"every": 6, "num_samples": 1, "limit": 2},
        **sections,
    }
    config = make_config(folder, model_folder("qwen2_5_vl" if kind == "vision" else "qwen2"), **sections)
    two = kind.startswith("two ranks")
    return config, ["model.dtype=bfloat16", "deepspeed.zero_stage=2"] if two else [], 2 if two else 1


def timed_run(config, out, overrides, ranks):
    """An undisturbed run; the seconds between the time when it has restored nothing and its end."""
    with Started(config, out, *overrides, ranks=ranks) as run:
        assert run.wait_for(out / "config.resolved.yaml")
        begun = time.monotonic()
        assert run.end() == 0, run.text[-3000:]
        return time.monotonic() - begun


def killed_at_random(config, out, overrides, ranks, share, seconds):
    """Kill the process that was started, and it alone, after this share of an undisturbed run's time."""
    while True:
        with Started(config, out, *overrides, ranks=ranks) as run:
            assert run.wait_for(out / "config.resolved.yaml"), run.text[-3000:]
            time.sleep(share * seconds)
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
                assert not run.orphans(), run.text[-2000:]
                return
        seconds *= 0.8  # it was quicker this time
        out.rename(out.with_name(f"{out.name}_quicker_{seconds:.2f}"))


def killed_at(config, out, overrides, ranks, fault):
    """Kill it (of several ranks: each that comes there) at a named point."""
    with Started(config, out, *overrides, ranks=ranks, fault=fault) as run:
        code = run.end()
        assert code == (-signal.SIGKILL if ranks == 1 else 1), run.text[-3000:]
        assert not run.orphans(), run.text[-2000:]


@pytest.mark.reliability
@pytest.mark.parametrize("kind", KILLS)
def test_killed_and_started_again_a_run_ends_with_the_same_bits(model_folder, tmp_path, figure, kind):
    config, overrides, ranks = prepared(tmp_path / "a", model_folder, kind)
    seconds = timed_run(config, tmp_path / "whole", overrides, ranks)
    expected = sums(tmp_path / "whole", STEPS), ledger(tmp_path / "whole")
    moments, lost = random.Random(0), []
    for number, fault in enumerate(KILLS[kind]):
        out = tmp_path / f"killed{number}"
        if fault == RANDOM:
            killed_at_random(config, out, overrides, ranks, moments.uniform(0, 0.95), seconds)
        else:
            killed_at(config, out, overrides, ranks, fault)
        for checkpoint in list_checkpoints(out / "checkpoints"):
            verify(checkpoint)  # whole, or not called one
        lost.append(steps_done(out) - newest_step(out))
        finished(config, out, *overrides, ranks=ranks)
        assert sums(out, STEPS) == expected[0], fault
        assert ledger(out) == expected[1], fault
        assert not [p for p in out.rglob("*") if ".tmp" in p.name], fault
    assert max(lost) <= SAVE_STEPS
    named = len([fault for fault in KILLS[kind] if fault != RANDOM])
    figure(
        "R1",
        f"{len(lost)} of {len(lost)} kills ({kind}; {named} at named points, {len(lost) - named} at random moments) resumed by the same "
        f"command: weights, field, optimisers, generators, export and rewards equal by sha256; at most {max(lost)} steps repeated "
        f"(save_steps={SAVE_STEPS}); 0 processes left after 5 s",
    )
