"""R4: a disk that fills up while a run saves. Nothing that stands is touched, nothing half-written
stays, and what is missing is said.
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlfr_vlm.errors import DiskFullError
from rlfr_vlm.storage.checkpoint import commit_checkpoint, list_checkpoints, newest_good, verify
from rlfr_vlm.storage.disk import written
from tests.runs import ROOT, cli, make_config, make_text_data, torchrun

REWARD = """
import hashlib, os
from pathlib import Path

def reward(prompts, completions, **columns):
    run = os.environ.get("RLFR_TEST_MAKE_ROOM")  # a folder: after two steps somebody frees some of its disk
    if run and len((Path(run) / "metrics.jsonl").read_text().splitlines() if (Path(run) / "metrics.jsonl").exists() else ()) == 2:
        (Path(run).parent / "ballast").unlink(missing_ok=True)
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""
NEEDS = (
    r"it needs (more than the )?[\d.]+ MiB( that were written)?, and [\d.]+ MiB are free; "
    r"free "
    r"some; the older checkpoints are intact"
)


@contextmanager
def small_disk(folder: Path, size: int):
    """A real file system of so many bytes."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, but for what names the time and the place of a run."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("state.json", "manifest.json")
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def litter(run: Path) -> list[Path]:
    """What is half written in a run's folder."""
    return [
        path for path in run.rglob("*") if path.name.startswith(".tmp-") or path.suffix == ".tmp"
    ]


# In a moment, without a run.


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path):
    def fill(content, count):
        return lambda folder: (folder / "policy.bin").write_bytes(content * count)

    with small_disk(tmp_path / "disk", 3 * 2**20) as disk:
        commit_checkpoint(disk, 1, fill(b"1", 2**20), keep=2)
        before = sums(disk / "global_step_1")
        with pytest.raises(
            DiskFullError, match=rf"no space left for {disk}/global_step_2: {NEEDS}"
        ) as late:
            commit_checkpoint(disk, 2, fill(b"2", 3 * 2**20), keep=2)
        assert "more than" in str(late.value)
        commit_checkpoint(disk, 3, fill(b"3", 2**20), keep=3)
        with pytest.raises(
            DiskFullError, match=rf"no space left for {disk}/global_step_4: {NEEDS}"
        ) as early:
            commit_checkpoint(disk, 4, lambda folder: pytest.fail("begun"), keep=3)
        assert "more than" not in str(early.value)
        assert before == sums(disk / "global_step_1") and not litter(disk)
        verify(disk / "global_step_1")


# Real runs.


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory):
    """Config of a run of six steps that saves at each, its folder, and the bytes of one of its
    checkpoints.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    make_text_data(folder)
    (folder / "reward.py").write_text(REWARD)
    config = make_config(
        folder,
        model_folder("qwen2"),
        reward={"function": f"{folder / 'reward.py'}:reward"},
        train={"steps": 6, "save_steps": 1, "keep_checkpoints": 6},
    )
    done = cli("train", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    return config, folder / "run", written(folder / "run/checkpoints/global_step_6")


def kept(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.reliability
def test_a_run_on_a_full_disk_goes_on_for_two_failed_saves_and_ends_with_5_after_the_third(
    undisturbed, tmp_path, figure
):
    config, whole, size = undisturbed
    with small_disk(tmp_path / "disk", int(1.5 * size)) as disk:
        done = cli("train", "--config", str(config), f"output_dir={disk}/run")
        assert done.returncode == 5, done.stderr[-3000:]
        path = f"no space left for {disk}/run/checkpoints/global_step_"
        warned = re.findall(rf"warning: {path}(\d): {NEEDS}\. Training goes on", done.stderr)
        assert [step for step, *_ in warned] == ["2", "3"]
        assert (
            re.search(rf"^rlfr-vlm train: {path}4: {NEEDS}$", done.stderr, re.M)
            and "Traceback" not in done.stderr
        )
        assert kept(disk / "run") == ["global_step_1"] and not litter(disk / "run")
        verify(disk / "run/checkpoints/global_step_1")
        assert sums(disk / "run/checkpoints/global_step_1") == sums(
            whole / "checkpoints/global_step_1"
        )
        steps = [
            json.loads(line)["step"]
            for line in (disk / "run/metrics.jsonl").read_text().splitlines()
        ]
        assert steps == [1, 2, 3, 4]
    figure(
        "R4",
        "tmpfs of 1.5 checkpoints: exit 5 after 3 failed saves, path, need and free named; the old "
        "one's sha256 unchanged, 0 partial",
    )


@pytest.mark.reliability
def test_somebody_frees_some_and_nothing_is_lost(undisturbed, tmp_path, figure):
    config, whole, size = undisturbed
    with small_disk(tmp_path / "disk", 8 * size) as disk:
        (disk / "ballast").write_bytes(bytes(int(6.6 * size)))
        done = cli(
            "train",
            "--config",
            str(config),
            f"output_dir={disk}/run",
            RLFR_TEST_MAKE_ROOM=f"{disk}/run",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("Training goes on") == 1
        assert kept(disk / "run") == [
            f"global_step_{step}" for step in (1, 3, 4, 5, 6)
        ] and not litter(disk / "run")
        assert sums(disk / "run/checkpoints/global_step_6") == sums(
            whole / "checkpoints/global_step_6"
        )
        assert sums(disk / "run/hf") == sums(whole / "hf")
    figure(
        "R4",
        "room made after one failed save: exit 0, weights equal to an undisturbed run's to the bit",
    )


@pytest.mark.reliability
def test_without_a_single_checkpoint_and_at_the_end(undisturbed, tmp_path, figure):
    config, _, size = undisturbed
    with small_disk(tmp_path / "disk", size // 2) as disk:
        done = cli("train", "--config", str(config), f"output_dir={disk}/run")
        assert done.returncode == 5, done.stderr[-3000:]
        assert re.search(
            rf"no space left for {disk}/run/checkpoints/global_step_3: {NEEDS}$", done.stderr, re.M
        )
        assert kept(disk / "run") == [] and not litter(disk / "run")
        assert newest_good(disk / "run/checkpoints", pytest.fail) is None
    with small_disk(
        tmp_path / "end", int(0.8 * size)
    ) as disk:  # no room for the optimiser's moments, but for the model
        done = cli("train", "--config", str(config), f"output_dir={disk}/run", "train.steps=1")
        assert done.returncode == 5, done.stderr[-3000:]
        assert re.search(
            rf"^rlfr-vlm train: no space left for {disk}/run/checkpoints/global_step_1: {NEEDS}$",
            done.stderr,
            re.M,
        )
        assert (disk / "run/hf/global_step_1/model.safetensors").is_file() and kept(
            disk / "run"
        ) == []
    figure(
        "R4",
        "no room for the first save, or for the last: exit 5, nothing partial, the model of the "
        "last step is exported all the same",
    )


@pytest.mark.reliability
def test_two_ranks_on_a_full_disk(undisturbed, tmp_path, figure):
    config, _, size = undisturbed
    with small_disk(tmp_path / "disk", int(1.6 * size)) as disk:
        with pytest.raises(AssertionError) as failed:
            torchrun(
                2,
                "rlfr_vlm.cli",
                "train",
                "--config",
                config,
                f"output_dir={disk}/run",
                "deepspeed.zero_stage=2",
                "train.timeout_s=30",
            )
        said = str(failed.value)
        assert f"rlfr-vlm train: no space left for {disk}/run/checkpoints/global_step_4" in said, (
            said
        )
        assert "got no answer" not in said
        assert kept(disk / "run") == ["global_step_1"] and not litter(disk / "run")
        verify(disk / "run/checkpoints/global_step_1")
    figure("R4", "two ranks: both end with the first one's message, none waits for the other")


LIMITED = (
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
    "sys.argv = sys.argv[1:]; "
)


@pytest.mark.reliability
def test_a_limit_on_files_is_named_too(undisturbed, tmp_path, figure):
    """Where nothing can be mounted: the policy's file is larger than files may be."""
    config, _, _ = undisturbed
    limit = (
        undisturbed[1] / "checkpoints/global_step_1/rank_0000/policy-0000.safetensors"
    ).stat().st_size // 2
    code = LIMITED.format(limit) + "runpy.run_module('rlfr_vlm.cli', run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        code,
        "rlfr-vlm",
        "train",
        "--config",
        str(config),
        f"output_dir={tmp_path}/run",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert done.returncode == 5, done.stderr[-3000:]
    assert done.stderr.count("warning: File too large for ") == 2
    assert kept(tmp_path / "run") == [] and not litter(tmp_path / "run")
    figure("R4", "RLIMIT_FSIZE: the same, exit 5 after the third")


@pytest.mark.reliability
def test_a_folder_that_is_read_only_stops_before_anything_loads(undisturbed, tmp_path, figure):
    config, _, _ = undisturbed
    with small_disk(tmp_path / "disk", 2**20) as disk:
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = cli("train", "--config", str(config), f"output_dir={disk}/run", "model.path=nowhere")
    assert done.returncode == 2
    assert (
        f"output_dir {disk}/run cannot be made or written to: Read-only file system" in done.stderr
    )
    figure("R4", "a read-only folder: exit 2, named before the model loads")
