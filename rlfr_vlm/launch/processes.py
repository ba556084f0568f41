"""Processes of a run as their launcher sees them: where each is, how it ended, and making sure that
it has.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlfr_vlm.errors import DiskFullError, Preempted, UserError
from rlfr_vlm.ranks import lost_others
from rlfr_vlm.rollout.worker import ErrorMessage

END_SECONDS = 30.0  # for a killed process to be gone


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    host: str
    node: str
    pid: int
    started: str | None  # with the pid, names one process for good
    device: str


@dataclass(frozen=True)
class Ended:
    """How a training rank ended by itself."""

    path: str | None = None  # the run's folder
    problem: ErrorMessage | None = None  # meant for the user
    trace: str = ""  # of an error that is not
    peer: bool = False  # it only lost the others

    @classmethod
    def of(cls, error: Exception) -> Ended:
        """What an error means for the run."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = DiskFullError(f"no space left on the disk: {error.filename}")
        if isinstance(error, UserError | Preempted):
            return cls(problem=ErrorMessage.of(error), peer=lost_others(error))
        return cls(trace="".join(traceback.format_exception(error)), peer=lost_others(error))

    @property
    def stopped(self) -> bool:
        """Whether it saved and stopped because it was asked to."""
        return self.problem is not None and self.problem.kind == Preempted.__name__


def verdict(ended: Mapping[int, Ended], died: Mapping[int, str], silent: list[int]) -> str | None:
    """Why all ranks have to start again; None where all are done. silent: ranks that still run
    though others have failed.

    Raises what one of the ranks stopped at: a second run would stop there as well.
    """
    own = [(rank, end) for rank, end in sorted(ended.items()) if end.path is None and not end.peer]
    own.sort(
        key=lambda found: (
            found[1].problem is None or re.match(r"rank \d+: ", found[1].problem.text) is not None
        )
    )
    for rank, end in own:
        if end.problem is not None and not end.stopped:
            raise end.problem.error()
        if end.problem is None and not died:  # else it may follow from the death
            raise RuntimeError(f"rank {rank} failed:\n{end.trace}")
    if own and not died and not silent:
        assert own[0][1].problem is not None
        raise own[0][1].problem.error()
    if died:
        return "; ".join(f"rank {rank} {how}" for rank, how in sorted(died.items()))
    lost = [(rank, end) for rank, end in sorted(ended.items()) if end.peer]
    if lost:
        rank, end = lost[0]
        what = (
            end.problem.text
            if end.problem is not None
            else f"rank {rank}: {end.trace.strip().splitlines()[-1][:300]}"
        )
        return f"{', '.join(f'rank {rank}' for rank in silent) or 'a rank'} did not answer ({what})"
    return None


def started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is none, or no /proc.

    Not psutil's `create_time`: that is counted from the clock's idea of when the machine booted,
    and another process that asks after the clock was set gets another number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def send(pid: int, since: str | None, number: int) -> bool:
    """Send a signal to a process of this machine. False where it is gone."""
    if since is None or started(pid) != since:
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


def end_process(pid: int, since: str | None, grace_s: float = 0.0) -> bool:
    """Wait until a process of this machine is gone; kill it after `grace_s`, even a stopped one.
    False where it still is not.
    """
    begun = time.monotonic()
    while started(pid) == since is not None:
        waited = time.monotonic() - begun
        if waited >= grace_s:
            send(pid, since, signal.SIGKILL)
        if waited > grace_s + END_SECONDS:
            return False
        time.sleep(0.05)
    return True


def end_leftovers(entry: str, grace_s: float) -> None:
    """Let the processes of `processes_with` end by themselves for a while, and kill those that do
    not.
    """
    deadline = time.monotonic() + grace_s
    while (left := processes_with(entry)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, since in left:
        send(pid, since, signal.SIGKILL)
    for pid, since in left:
        end_process(pid, since)


def processes_with(entry: str) -> list[tuple[int, str | None]]:
    """This user's processes, other than this one, that were started with an environment variable of
    this value (`NAME=value`).
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with suppress(OSError):
            if pid != os.getpid() and entry.encode() in path.read_bytes().split(b"\0"):
                found.append((pid, started(pid)))
    return found


def brief(error: Exception) -> str:
    """Ray's message on one line, less its advice."""
    text = " ".join(str(error).split())
    return (
        text.partition("Worker exit detail: ")[2].partition(" Some common causes")[0][:160]
        or text[:160]
    )
