"""What a disk refuses, and who holds a folder."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from rlfr_vlm.errors import DiskFullError, Preempted, UserError
from rlfr_vlm.storage.checkpoint import commit_checkpoint, list_checkpoints, verify
from rlfr_vlm.storage.disk import fullness_named, refusal
from rlfr_vlm.storage.run_lock import LOCK, held
from tests.runs import ROOT
from tests.storage.test_checkpoint import committed, write


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (
            RuntimeError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "no space left",
        ),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (OSError(errno.EIO, "x"), "Input/output error"),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_what_a_disk_refuses_is_told_from_other_errors(tmp_path, error, why):
    assert refusal(error, tmp_path) == why


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    committed(tmp_path, 1)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 5 * 2**20, 5 * 2**20),
    )
    with (tmp_path / "global_step_1" / "policy.bin").open("ab") as file:
        file.truncate(6 * 2**20)
    with pytest.raises(
        DiskFullError,
        match=r"for .*/global_step_2: it needs 6\.0 MiB, and 5\.0 MiB are free; .* the older "
        r"checkpoints are",
    ):
        commit_checkpoint(tmp_path, 2, lambda folder: pytest.fail("begun"), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["global_step_1"] and not [
        *tmp_path.glob(".tmp-*")
    ]


def test_a_failure_to_name_the_newest_leaves_a_checkpoint_and_no_litter(tmp_path, monkeypatch):
    committed(tmp_path, 1)
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("latest.tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        commit_checkpoint(tmp_path, 2, write(b"x"), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step_1",
        "global_step_2",
        "latest",
    ]
    for folder in list_checkpoints(tmp_path):
        verify(folder)


def test_a_full_disk_met_anywhere_is_named_and_other_ends_are_left_alone(tmp_path):
    with (
        pytest.raises(
            DiskFullError,
            match=f"no space left for {tmp_path}: .* are free on the disk of {tmp_path}",
        ),
        fullness_named(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    for error in (Preempted("stopped"), UserError("x"), KeyError("own")):
        with pytest.raises(type(error)), fullness_named(tmp_path):
            raise error


HOLDER = """
import sys, time
from pathlib import Path
from rlfr_vlm.storage.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        said = f"in use by another run .process {holder.pid} on .* since "
        for _ in range(2):
            with pytest.raises(UserError, match=said), held(tmp_path / "run"):
                pass
        assert (
            str(holder.pid) in (tmp_path / "run" / LOCK).read_text()
        )  # who cannot have it leaves it as it is
        holder.send_signal(signal.SIGKILL)
    with held(tmp_path / "run"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / LOCK).read_text()
    with held(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "before", ["", "process 99999999 on {host} since yesterday\n"], ids=["nobody", "a dead run"]
)
def test_whoever_took_a_folder_this_very_moment_is_named(tmp_path, before):
    """It holds the lock, and has not yet written who it is."""
    host = socket.gethostname()
    (tmp_path / LOCK).write_text(before.format(host=host))
    with (tmp_path / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run; choose"), held(tmp_path):
            pass
        threading.Timer(
            0.3, (tmp_path / LOCK).write_text, [f"process {os.getpid()} on {host} since now\n"]
        ).start()
        with (
            pytest.raises(
                UserError,
                match=rf"in use by another run \(process {os.getpid()} on {host} since now\)",
            ),
            held(tmp_path),
        ):
            pass


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"output_dir .*/file cannot be made or written to: "),
        held(tmp_path / "file"),
    ):
        pass
