"""Checkpoints that are either complete and verified, or invisible.

Written into a hidden folder, every file flushed to disk, then a manifest with sizes and sha256
sums, then one rename; `latest` is replaced after that, and only then are old ones removed. Read in
the opposite order of trust: manifest, sizes, sums, then content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlfr_vlm.errors import CheckpointError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.storage.disk import check_room, refusals_named, written

if TYPE_CHECKING:
    from rlfr_vlm.ranks import Ranks  # needs torch, which the lists of checkpoints below must not

MANIFEST = "manifest.json"
PREFIX = "global_step_"
# and the name of a checkpoint, while another of the same step takes its place
REPLACED = ".tmp-replaced-"
RANK = "rank_"  # and its number: a folder inside a checkpoint
INTACT = "free some; the older checkpoints are intact"

T = TypeVar("T")


def commit_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], keep: int, ranks: Ranks | None = None
) -> Path:
    """Let `write` fill a folder and make it `root/global_step_N`, atomically. Keeps the newest
    `keep` checkpoints, and the best one.

    Every rank writes, flushes and hashes its own files; the first one commits them when all are
    done. Raises DiskFullError on every rank, with every older checkpoint intact and nothing
    half-written left, when the disk has no room for it or refuses it.
    """
    from rlfr_vlm.ranks import ALONE

    ranks = ranks or ALONE
    final, place = root / f"{PREFIX}{step}", f"checkpoint of step {step}"
    temporary = root / ranks.broadcast(f".tmp-{final.name}-{uuid.uuid4().hex[:8]}", place)

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _put_back(root)
        _clear_temporary(root)
        if found := list_checkpoints(root):
            check_room(final, written(found[-1]), INTACT)
        temporary.mkdir()

    def fill() -> dict[str, dict[str, Any]]:
        rank_folder(temporary, ranks.rank).mkdir(parents=True, exist_ok=True)
        write(temporary)
        faultpoint("checkpoint_files")
        return _flushed(temporary, ranks)

    def finish(parts: list[dict[str, dict[str, Any]]]) -> None:
        _seal(temporary, step, {name: entry for part in parts for name, entry in part.items()})
        _commit(root, temporary, final, keep)

    def together(act: Callable[[], T], here: bool) -> T | None:
        """Where one rank fails, all do; none waits for one that has left."""
        done, problem = None, None
        try:
            with refusals_named(final, temporary, INTACT):
                done = act() if here else None
        except Exception as error:
            problem = error
        ranks.agree(problem, place)
        return done

    try:
        together(begin, ranks.first)
        parts = ranks.gather(together(fill, True) or {}, place)
        together(lambda: finish(parts), ranks.first)
    except Exception:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            (root / "latest.tmp").unlink(missing_ok=True)
        raise
    return final


def _commit(root: Path, temporary: Path, final: Path, keep: int) -> None:
    faultpoint("checkpoint_manifest")
    if final.exists():  # of the same step: replaced, but never before the new one is complete
        final.rename(root / f"{REPLACED}{final.name}-{uuid.uuid4().hex[:8]}")
        faultpoint("checkpoint_replaced")
    temporary.rename(final)
    _sync_folder(root)
    faultpoint("checkpoint_rename")
    write_latest(root, final.name)
    faultpoint("checkpoint_latest")
    best = read_best(root)
    spared = {final.name, f"{PREFIX}{best['step']}" if best is not None else ""}
    others = [p for p in list_checkpoints(root) if p != final]
    for old in others[: -(keep - 1)]:
        if old.name not in spared:
            # half removed, it would look like a damaged one
            old.rename(root / f".tmp-old-{old.name}-{uuid.uuid4().hex[:8]}")
            faultpoint("checkpoint_prune")
    _clear_temporary(root)


def write_latest(root: Path, name: str) -> None:
    """Let `latest` name this checkpoint."""
    _write_durably(root / "latest.tmp", name)
    (root / "latest.tmp").replace(root / "latest")
    _sync_folder(root)


def read_best(root: Path) -> dict[str, float] | None:
    """{"step", "score"} of the checkpoint with the best evaluation; None where there was none, or
    where it is gone.
    """
    try:
        best = json.loads((root / "best.json").read_text())
    except (OSError, ValueError):
        return None
    return best if (root / f"{PREFIX}{best['step']}").is_dir() else None


def write_best(root: Path, step: int, score: float) -> None:
    """Name the checkpoint with the best evaluation."""
    _write_durably(root / "best.tmp", json.dumps({"step": step, "score": score}))
    (root / "best.tmp").replace(root / "best.json")
    _sync_folder(root)


def set_aside(root: Path, step: int, why: str) -> None:
    """Keep a checkpoint, under a name by which nothing resumes from it."""
    path = root / f"{PREFIX}{step}"
    path.rename(root / f"{why}-{path.name}-{uuid.uuid4().hex[:8]}")


def _clear_temporary(root: Path) -> None:
    for stale in root.glob(".tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def rank_folder(folder: Path, rank: int) -> Path:
    """Where a rank writes its share of a checkpoint; the first rank also writes beside these
    folders.
    """
    return folder / f"{RANK}{rank:04d}"


def _flushed(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """This rank's files, flushed to disk: size and hash by name."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] == rank_folder(folder, ranks.rank).name or (
            ranks.first and not name.parts[0].startswith(RANK)
        ):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            _sync_folder(path.parent)
            entries[str(name)] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return entries


def _seal(folder: Path, step: int, entries: dict[str, dict[str, Any]]) -> None:
    content = {"step": step, "files": entries}
    _write_durably(folder / MANIFEST, json.dumps({**content, "sha256": _digest(content)}, indent=1))
    _sync_folder(folder)


def _digest(content: dict[str, Any]) -> str:
    """Of what a manifest says: a changed number or a missing line shows as a changed file does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [
        p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def verify(folder: Path) -> None:
    """Raises CheckpointError naming the file, with what was expected and found."""
    for name, entry in _manifest(folder).items():
        _check(folder / name, entry)


def verify_file(folder: Path, name: str) -> None:
    """The same of one file."""
    files = _manifest(folder)
    if name not in files:
        raise CheckpointError(f"{folder / MANIFEST} does not name {name}")
    _check(folder / name, files[name])


def _check(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != entry["size"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {entry['size']}")
    if (found := sha256(path)) != entry["sha256"]:
        raise CheckpointError(f"{path} has sha256 {found[:12]}, expected {entry['sha256'][:12]}")


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sum of each file, by name. Raises CheckpointError where they are not what was
    written, or files were added.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        told = content.pop("sha256")
        files: dict[str, dict[str, Any]] = content["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None
    if told != _digest(content):
        raise CheckpointError(f"{path} was changed after it was written")
    for found in folder.rglob("*"):  # what is read back is found by its name
        name = found.relative_to(folder)
        if (
            found.is_file()
            and str(name) not in files
            and str(name) != MANIFEST
            and not any(part.startswith(".") for part in name.parts)
        ):
            raise CheckpointError(f"{found} is not in the manifest")
    return files


def _put_back(root: Path) -> None:
    """Undo a replacement that a kill cut short: the checkpoint that was taken away, and the new one
    that is not there.
    """
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED).rpartition("-")[0]
        if not final.exists():
            replaced.rename(final)


def newest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each damaged one is reported and set aside. None where
    none was ever committed.

    Raises CheckpointError when there are checkpoints and none is good: a run never starts afresh in
    silence.
    """
    _put_back(root)
    _clear_temporary(root)
    found = list_checkpoints(root)
    problems = []
    for folder in reversed(found):
        try:
            verify(folder)
            for damaged in found[found.index(folder) + 1 :]:
                set_aside(root, int(damaged.name.removeprefix(PREFIX)), "damaged")
            return folder
        except CheckpointError as error:
            problems.append(str(error))
            warn(
                f"checkpoint {folder.name} is damaged: {error}; it is set aside, trying the one "
                "before"
            )
    if problems:
        raise CheckpointError(
            f"no good checkpoint is left in {root}: {problems[0]}; use another output_dir to start "
            "afresh"
        )
    return None
