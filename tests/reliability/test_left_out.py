"""R2: what the checkpoint holds is needed. Left out of the restore, each part makes the run end
with other weights.
"""

import random
import shutil
from pathlib import Path

import pytest

from rlfr_vlm.commands import train
from rlfr_vlm.config import load_config
from rlfr_vlm.rollout import hf_engine
from rlfr_vlm.run import run as run_module
from rlfr_vlm.storage import state as state_module
from rlfr_vlm.storage.checkpoint import list_checkpoints
from tests.reliability.started import NOISY_REWARD
from tests.runs import digest, make_config, make_data

PARTS = ["rng", "data_position", "flow_optimizer", "request_seeds"]


@pytest.fixture(scope="module")
def interrupted(model_folder, tmp_path_factory):
    """A run of four steps in this process, and where a run stands that was killed after two of
    them.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    make_data(folder)
    (folder / "noisy.py").write_text(NOISY_REWARD)
    config = make_config(
        folder, model_folder("qwen2_5_vl"), reward={"function": f"{folder / 'noisy.py'}:reward"}
    )
    train(load_config(config, (f"output_dir={folder / 'whole'}",)))
    return (
        config,
        list_checkpoints(folder / "whole" / "checkpoints")[0],
        digest(folder / "whole", 4),
    )


def resumed(interrupted, folder):
    """Digest of the run that goes on."""
    config, checkpoint, _ = interrupted
    shutil.copytree(checkpoint, folder / "run" / "checkpoints" / checkpoint.name)
    cfg = load_config(config, (f"output_dir={folder / 'run'}",))
    random.seed(99)  # another process would not be where this one is
    train(cfg)
    return digest(Path(cfg.output_dir), 4)


def leave_out(part, monkeypatch):
    """Restore all but one part."""
    if part == "rng":
        monkeypatch.setattr(state_module, "set_rng_state", lambda state: None)
    elif part == "request_seeds":
        original = hf_engine.request_seed
        monkeypatch.setattr(
            hf_engine, "request_seed", lambda *parts: original("another process", *parts)
        )
    else:
        load = run_module.load_state

        def partial(folder, learner, prompts, state):
            load(folder, learner, prompts, state)
            if part == "data_position":
                prompts.stream.position = 0
            else:
                learner.flow_optimizer.torch.state.clear()
                learner.flow_optimizer.steps = 0

        monkeypatch.setattr(run_module, "load_state", partial)


@pytest.mark.slow
@pytest.mark.reliability
def test_resumed_in_full_is_equal_and_with_one_part_left_out_is_not(
    interrupted, tmp_path, monkeypatch, figure
):
    assert resumed(interrupted, tmp_path / "all") == interrupted[2]
    for part in PARTS:
        with monkeypatch.context() as patched:
            leave_out(part, patched)
            assert resumed(interrupted, tmp_path / part) != interrupted[2], part
    figure(
        "R2",
        f"{len(PARTS)} of {len(PARTS)} parts left out of the restore ({', '.join(PARTS)}) give "
        "other weights; none left out: equal",
    )
