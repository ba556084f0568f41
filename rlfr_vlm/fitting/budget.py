"""How many steps a fit takes and at which rate, where its field goes, and whether a fitted one
suits a config: known without torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config, FlowConfig, FlowFitConfig
from rlfr_vlm.errors import UserError

HELDOUT_FRAC, MOST_HELDOUT = 0.05, 64  # of the expert rows
FIT_WARMUP_FRAC = 0.1
FIT_LOOKS = 20  # at what is held out
FIT_STEPS = 2400  # small ones, where `flow.fit.steps` is unset
LR_TIMES_SIZE = 0.384
FIELD_SPEC = "flow_config.json"  # the last file that a fit writes
EXTRAS = ("standardise", "prompt_context", "contrast")  # that published fields do not have


def new_field_folder(cfg: Config) -> Path:
    """Where a fit puts its field. Raises UserError where a finished one is."""
    folder = Path(cfg.output_dir) / "flow"
    if (folder / FIELD_SPEC).exists():
        raise UserError(
            f"{folder} holds a fitted field, which is not written over: remove it, or choose "
            "another output_dir"
        )
    return folder


def check_field(cfg: FlowConfig) -> None:
    """Raises UserError where `flow.checkpoint` says that it was fitted otherwise than this config
    reads it.

    Loading it compares layers and backbone too; this comes before anything is loaded.
    """
    path = Path(str(cfg.checkpoint)) / FIELD_SPEC
    try:
        found = json.loads(path.read_text())
        theirs = {name: found[name] for name in ("context", "shift", "times", "depth")}
        theirs |= {"standardise": False, "prompt_context": False, "contrast": "none"} | {
            k: found[k] for k in EXTRAS if k in found
        }
    except OSError as error:
        raise UserError(
            f"flow.checkpoint: {path}: {error.strerror}; fit a field first with `rlfr-vlm flow`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"flow.checkpoint: {path} is not a flow spec: {error!r}") from None
    modes, shifts = zip(*cfg.sides, strict=True)
    ours = {
        "context": [*modes],
        "shift": [*shifts],
        "times": [*cfg.times],
        "depth": cfg.network.depth,
    }
    ours |= {name: getattr(cfg, name) for name in EXTRAS}
    wrong = [
        f"{k}: checkpoint {_joined(theirs[k])}, run {_joined(ours[k])}"
        for k in ours
        if theirs[k] != ours[k]
    ]
    if wrong:
        raise UserError(
            f"flow.checkpoint: {cfg.checkpoint} does not fit this run ({'; '.join(wrong)}); set "
            "flow.* as it was fitted, or fit another field"
        )


def _joined(value: Any) -> str:
    """Several values as configs write them: a+b."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def num_heldout(rows: int) -> int:
    """Expert rows that the fit is judged by."""
    return min(MOST_HELDOUT, max(1, int(rows * HELDOUT_FRAC)))


def fit_steps(cfg: Config, rows: int) -> tuple[int, int]:
    """Expert solutions per step, and steps: `flow.fit.steps`, else the passes over the rows not
    held out.
    """
    assert cfg.flow is not None
    fit = cfg.flow.fit
    train = rows - num_heldout(rows)
    if train < 1:
        raise UserError(f"data.expert: {rows} rows are too few to fit a flow and hold some out")
    batch = min(fit.batch_size, train)
    return batch, fit.steps or max(1, math.ceil(train * fit.epochs / batch))


def fit_lr(fit: FlowFitConfig, size: int) -> float:
    """`flow.fit.lr`, or what suits latents of this size: 3e-3 at 128, 1e-4 (as published) at
    3,584.
    """
    return fit.lr or LR_TIMES_SIZE / size
