"""Folders and files that the command line names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rlfr_vlm.errors import UserError


def existing_folder(folder: Path) -> Path:
    """The folder. Raises UserError naming it, and folders of nearly that name, where it is not
    there or may not be read.
    """
    try:
        if folder.is_dir():
            os.listdir(folder)
            return folder
        found = folder.exists()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    if found:
        raise UserError(f"{folder} is a file; name the run's folder, which holds metrics.jsonl")
    raise UserError(f"there is no run folder {folder}{_near(folder)}")


def _near(folder: Path) -> str:
    """Folders of nearly that name beside it."""
    try:
        beside = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
    except OSError:
        return f", nor a folder {folder.parent} that it could be in"
    near = difflib.get_close_matches(folder.name, beside, n=3, cutoff=0.6)
    return (
        f"; did you mean {' or '.join(str(folder.parent / name) for name in near)}?" if near else ""
    )


def writable_file(path: Path) -> Path:
    """The path of a page to be written. Raises UserError where it names a folder, or a folder above
    is not there.
    """
    if path.is_dir():
        raise UserError(
            f"--out {path}: is a folder; name a file in it, such as {path / 'comparison.html'}"
        )
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    return path
