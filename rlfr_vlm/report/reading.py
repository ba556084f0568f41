"""Files as they are: missing, empty, torn by a kill, or damaged. What is wrong becomes a `FileNote`
to be shown; nothing here raises for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

# of a line, or of a file that is read whole; what is longer is no record of a run
MAX_BYTES = 64_000_000

# What it means that a file of a run is not there, and what to do.
ABSENT = {
    "config.resolved.yaml": "no settings to show; training writes it when it starts",
    "env.json": "no versions to show; training writes it when it starts",
    "metrics.jsonl": "no curves; the run has not finished its first step, or this is no run folder",
    "checkpoints": "none written yet; train.save_steps says when the first one is due",
    "checkpoints/latest": "no checkpoint is complete yet, so the run would begin anew",
    "eval": "no held-out accuracy; eval.every is 0, or the first evaluation has not ended",
    "rollouts": "no responses to read; the run has not finished its first step, or "
    "train.log_rollouts is 0",
}
OF_A_RUN = (
    "config.resolved.yaml",
    "env.json",
    "metrics.jsonl",
    "events.jsonl",
    "checkpoints",
    "eval",
    "rollouts",
    "flow",
)


@dataclass(frozen=True)
class FileNote:
    """Something a reader of the run should know about its files."""

    kind: Literal["missing", "damaged", "note"]
    file: str  # relative to the run folder
    text: str


def about_folder(folder: Path) -> list[FileNote]:
    """What a folder that holds nothing of a run is, and what may have been meant."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        return [unreadable(folder, error)]
    if not entries:
        return [
            FileNote(
                "note",
                relative(folder.resolve()),
                "an empty folder; if a run is to write here, it has not started",
            )
        ]
    if {entry.name for entry in entries} & set(OF_A_RUN):
        return []
    runs = sorted(entry.name for entry in entries if is_there(Path(entry.path) / "metrics.jsonl"))
    hint = (
        f"; runs lie in it, such as {', '.join(runs[:3])}: name one of them, or several to compare "
        "them"
        if runs
        else ""
    )
    return [
        FileNote(
            "note",
            relative(folder.resolve()),
            f"no run folder: nothing that training writes is in it{hint}",
        )
    ]


def is_there(path: Path) -> bool:
    """Whether it exists; False also where nobody may look."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def json_lines(
    path: Path, problems: list[FileNote], growing: bool = False, may_be_empty: bool = False
) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. What parses counts, also without its line break; a last line
    that does not is named as torn.

    growing: the file is written line by line for hours, and resumed: a torn end, or nothing yet, is
        nothing to speak of.
    may_be_empty: so is a file without a line.
    """
    bad: list[int] = []
    torn = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                elif not line.endswith(b"\n"):
                    torn = True
                elif line.strip():
                    bad.append(number)
            if file.tell() == 0 and not growing and not may_be_empty:
                problems.append(
                    FileNote(
                        "note",
                        relative(path),
                        "empty: nothing was written yet, or a kill came first",
                    )
                )
    except OSError as error:
        problems.append(unreadable(path, error))
    if bad:
        problems.append(
            FileNote(
                "damaged",
                relative(path),
                f"{len(bad)} lines are not JSON objects, first line {bad[0]}; left out",
            )
        )
    if torn and not growing:
        problems.append(
            FileNote(
                "note",
                relative(path),
                "the last line is not whole: it is being written, or a kill cut it; left out",
            )
        )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of at most MAX_BYTES; of a longer one its line break, which is no object."""
    while line := file.readline(MAX_BYTES):
        if line.endswith(b"\n") or len(line) < MAX_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_BYTES)
        yield b"-\n"


def json_object(path: Path, problems: list[FileNote]) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    text = read_text(path, problems)
    if not text:
        return {}
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        problems.append(FileNote("damaged", relative(path), "not a whole JSON object"))
        return {}
    return tree


def read_text(path: Path, problems: list[FileNote]) -> str:
    """A file's text; "" where there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        problems.append(unreadable(path, error))
        return ""
    text = content.decode("utf-8", "replace")
    if len(content) > MAX_BYTES:
        problems.append(
            FileNote(
                "damaged",
                relative(path),
                f"larger than {MAX_BYTES // 1_000_000} MB, which no such file is; left out",
            )
        )
        return ""
    if not text.strip():
        problems.append(FileNote("damaged", relative(path), "empty"))
        return ""
    return text


def unreadable(path: Path, error: OSError) -> FileNote:
    """What a failed attempt to read says."""
    if isinstance(error, FileNotFoundError):
        return FileNote("missing", relative(path), ABSENT.get(relative(path), "not there"))
    return FileNote("damaged", relative(path), f"cannot be read: {error.strerror}")


def relative(path: Path) -> str:
    """The path as the reader of a run knows it: without the folders above the run."""
    name, above = (
        os.fsencode(part).decode("utf-8", "replace") for part in (path.name, path.parent.name)
    )
    return f"{above}/{name}" if above in ("rollouts", "eval", "checkpoints", "flow") else name


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value: Any) -> float | None:
    """A finite float, or None."""
    # the first test alone spares most of the time
    if type(value) is not float and not is_number(value):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def as_whole(value: Any) -> int | None:
    """A finite number without its fraction, or None."""
    number = as_number(value)
    return None if number is None else int(number)


def as_text(value: Any) -> str:
    """Text as it is; nothing for null; other JSON values as JSON (a gold answer may be a
    number).
    """
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)
