"""What a disk refuses, told as such: which path, how much it needs and how much is free."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlfr_vlm.errors import DiskFullError, Preempted, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (*FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
NO_SPACE = "no space left"
NOTHING_FREE = 2**20  # bytes: whatever fails with less than that, a full disk is why


def refusal(error: BaseException, folder: Path) -> str | None:
    """Why the disk refused a write; None where the error is of another kind.

    safetensors and torch.save report a full disk as errors of their own: with the number of the
    system's error in the text, or without.
    """
    told = re.search(r"os error (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(told[1]) if told else None)
    if number not in REFUSALS and shutil.disk_usage(folder).free < NOTHING_FREE:
        number = errno.ENOSPC
    if number not in REFUSALS:
        return None
    return NO_SPACE if number in FULL else os.strerror(number)


@contextmanager
def refusals_named(target: Path, partial: Path, rest: str = "free some") -> Iterator[None]:
    """Raises DiskFullError for what the disk refuses in this block. `partial`: what is written
    there, on the way to becoming `target`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        root = next(folder for folder in partial.parents if folder.is_dir())
        why = refusal(error, root)
        if why is None:
            raise
        raise DiskFullError(
            message(
                why, target, f"more than the {size(written(partial))} that were written", root, rest
            )
        ) from error


@contextmanager
def fullness_named(folder: Path) -> Iterator[None]:
    """Raises DiskFullError, naming the folder or the file, for whatever finds its disk full in this
    block.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if refusal(error, folder) != NO_SPACE:
            raise
        where = getattr(error, "filename", None) or folder
        free = size(shutil.disk_usage(folder).free)
        raise DiskFullError(
            f"{NO_SPACE} for {where}: {free} are free on the disk of {folder}; free some and run "
            "the same command"
        ) from error


def check_room(target: Path, needed: int, rest: str = "free some") -> None:
    """Raises DiskFullError where less than `needed` bytes are free for `target`, before a byte is
    written.
    """
    if shutil.disk_usage(target.parent).free < needed:
        raise DiskFullError(message(NO_SPACE, target, size(needed), target.parent, rest))


def message(why: str, target: Path, needed: str, root: Path, rest: str) -> str:
    """One line."""
    return (
        f"{why} for {target}: it needs {needed}, and {size(shutil.disk_usage(root).free)} are "
        f"free; {rest}"
    )


def written(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(count: int) -> str:
    """Bytes in MiB, or in GiB where there are many."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
