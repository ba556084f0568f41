"""A run's folder belongs to one process at a time.

By the system's own call rather than by `filelock`: 3.15 empties the file when somebody else asks
for it, holder's name and all, and takes a file system that has no locks to give (ENOLCK) for a
folder in use; 4.3 fails there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil

from rlfr_vlm.errors import UserError
from rlfr_vlm.storage.disk import fullness_named

NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
)  # of some network file systems: nobody can be kept out there
WRITE_SECONDS = 1.0  # between taking a folder and saying so
LOCK = ".lock"  # in the folder; it stays, and says who holds the folder or held it last


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none. The system lets go of it when the process
    ends, however it ends.

    Raises UserError naming the process that holds it, or why it cannot be written to, and
    DiskFullError for what finds the disk full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be made or written to: {error.strerror}"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            who = f" ({holder})" if holder else ""
            raise UserError(
                f"output_dir {folder} is in use by another run{who}; choose another one or wait"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        os.ftruncate(handle, 0)
        os.pwrite(
            handle,
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{datetime.now():%Y-%m-%d %H:%M:%S}\n".encode(),
            0,
        )
        with fullness_named(folder):
            yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """What the holder wrote into the lock file; "" where it does not say. One that took it this
    very moment has not written yet.
    """
    deadline = time.monotonic() + WRITE_SECONDS
    while True:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
        found = re.match(r"process (\d+) on (\S+) ", holder)
        gone = found is None or (
            found[2] == socket.gethostname() and not psutil.pid_exists(int(found[1]))
        )
        if not gone:
            return holder
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)
