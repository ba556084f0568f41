"""The checkpoint protocol on small files."""

import errno
import json
from collections import Counter

import pytest

from rlfr_vlm import faults
from rlfr_vlm.errors import CheckpointError, DiskFullError
from rlfr_vlm.storage.checkpoint import (
    commit_checkpoint,
    list_checkpoints,
    newest_good,
    read_best,
    verify,
    write_best,
)


def write(content):
    def into(folder):
        (folder / "flow").mkdir()
        (folder / "policy.bin").write_bytes(content * 100)
        (folder / "flow" / "flow.bin").write_bytes(content)

    return into


def committed(root, *steps):
    for step in steps:
        commit_checkpoint(root, step, write(bytes([step])), keep=10)
    return root


def test_a_committed_checkpoint_verifies_and_latest_names_it(tmp_path):
    committed(tmp_path, 1, 2)
    assert (tmp_path / "latest").read_text() == "global_step_2"
    for folder in list_checkpoints(tmp_path):
        verify(folder)
    assert set(json.loads((tmp_path / "global_step_1/manifest.json").read_text())["files"]) == {
        "policy.bin",
        "flow/flow.bin",
    }


def test_old_ones_go_only_after_the_new_one_stands(tmp_path):
    for step in (1, 2, 3):
        commit_checkpoint(tmp_path, step, write(b"x"), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["global_step_2", "global_step_3"]


def test_the_best_one_stays_whatever_its_age(tmp_path):
    def kept():
        return [int(p.name.removeprefix("global_step_")) for p in list_checkpoints(tmp_path)]

    committed(tmp_path, 1)
    write_best(tmp_path, 1, 0.9)
    for step in (2, 3, 4):
        commit_checkpoint(tmp_path, step, write(b"x"), keep=2)
    assert kept() == [1, 3, 4] and read_best(tmp_path) == {"step": 1, "score": 0.9}
    write_best(tmp_path, 3, 0.95)
    for step in (5, 6):
        commit_checkpoint(tmp_path, step, write(b"x"), keep=2)
    assert kept() == [3, 5, 6]


def test_a_failed_write_leaves_nothing_and_a_stale_folder_is_cleared(tmp_path):
    committed(tmp_path, 1)

    def fails(folder):
        (folder / "half").write_text("x")
        raise OSError("device went away")

    with pytest.raises(OSError, match="went away"):
        commit_checkpoint(tmp_path, 2, fails, keep=2)
    (tmp_path / ".tmp-global_step_9-dead").mkdir()
    committed(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step_1",
        "global_step_3",
        "latest",
    ]


def forget_a_file(folder):
    """The manifest without a line, the file gone: nothing else shows it."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["files"]["flow/flow.bin"]
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "flow/flow.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "policy.bin").write_bytes(b"\x03" * 99 + b"\x04"),
            r"policy\.bin has sha256",
        ),
        (
            lambda f: (f / "policy.bin").write_bytes(b"\x03" * 50),
            r"policy\.bin has 50 bytes, expected 100",
        ),
        (lambda f: (f / "flow/flow.bin").unlink(), r"flow\.bin is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
        (forget_a_file, r"manifest\.json was changed after it was written"),
        (lambda f: (f / "flow/more.bin").write_bytes(b"x"), r"more\.bin is not in the manifest"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, damage, message):
    committed(tmp_path, 2, 3)
    damage(tmp_path / "global_step_3")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "global_step_3")
    warnings = []
    assert newest_good(tmp_path, warnings.append).name == "global_step_2"
    assert "global_step_3" in warnings[0]


def test_the_one_just_committed_is_never_pruned_and_a_damaged_one_takes_no_place(tmp_path):
    committed(tmp_path, 250, 200)
    commit_checkpoint(tmp_path, 50, write(b"x"), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["global_step_50", "global_step_250"]
    (tmp_path / "global_step_250/policy.bin").unlink()
    assert newest_good(tmp_path, lambda message: None).name == "global_step_50"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["global_step_50"]
    assert any(p.name.startswith("damaged-global_step_250") for p in tmp_path.iterdir())


def test_the_same_step_again_replaces_it(tmp_path):
    committed(tmp_path, 1)
    commit_checkpoint(tmp_path, 1, write(b"new"), keep=2)
    verify(tmp_path / "global_step_1")
    assert (tmp_path / "global_step_1/flow/flow.bin").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_1", "latest"]


def test_a_full_disk_is_told_and_nothing_half_written_stays(tmp_path):
    committed(tmp_path, 1)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError, match="no space left") as raised:
        commit_checkpoint(tmp_path, 2, full, keep=2)
    assert raised.value.exit_code == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_1", "latest"]


def test_no_good_checkpoint_is_never_a_fresh_start(tmp_path):
    committed(tmp_path, 1)
    (tmp_path / "global_step_1/policy.bin").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint") as raised:
        newest_good(tmp_path, lambda message: None)
    assert raised.value.exit_code == 4
    assert newest_good(tmp_path / "empty", lambda message: None) is None


STAGES = [
    "checkpoint_files",
    "checkpoint_manifest",
    "checkpoint_replaced",
    "checkpoint_rename",
    "checkpoint_latest",
    "checkpoint_prune",
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [3, 4])
def test_ended_at_any_stage_of_a_commit_a_whole_checkpoint_is_left_and_nothing_else_is_called_one(
    tmp_path, monkeypatch, stage, step
):
    """Step 3 is saved a second time: the only whole checkpoint of that step is out of the way for a
    moment.
    """
    committed(tmp_path, 2, 3)
    monkeypatch.setattr(faults, "_reached", Counter())
    monkeypatch.setenv("RLFR_FAULT", f"{stage}:1:raise")
    reached = (stage != "checkpoint_replaced" or step == 3) and (
        stage != "checkpoint_prune" or step == 4
    )
    try:
        commit_checkpoint(tmp_path, step, write(b"new"), keep=2)
        assert not reached
    except RuntimeError as fault:
        assert reached and stage in str(fault)
    monkeypatch.delenv("RLFR_FAULT")
    found = newest_good(tmp_path, lambda message: pytest.fail(message))
    assert found is not None and found.name == (
        f"global_step_{step}" if stage not in STAGES[:3] or not reached else "global_step_3"
    )
    for folder in list_checkpoints(tmp_path):
        verify(folder)
    assert (tmp_path / (tmp_path / "latest").read_text()).is_dir()
    commit_checkpoint(tmp_path, 5, write(b"newer"), keep=2)
    assert not [*tmp_path.glob(".tmp-*")]


def test_a_stale_file_of_a_roll_back_is_cleared_as_well(tmp_path):
    committed(tmp_path, 1)
    (tmp_path / ".tmp-roll_backs.json").write_text("[")
    committed(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step_1",
        "global_step_2",
        "latest",
    ]


def test_a_best_checkpoint_that_is_gone_is_none(tmp_path):
    assert read_best(tmp_path) is None
    committed(tmp_path, 1)
    write_best(tmp_path, 2, 0.5)
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text("{")
    assert read_best(tmp_path) is None
