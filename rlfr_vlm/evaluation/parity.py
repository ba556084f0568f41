"""Is a model evaluated as it was trained? Prompts, pictures and sampling of an evaluation beside
those of the run that made the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlfr_vlm.config import Config, load_config
from rlfr_vlm.errors import UserError

if TYPE_CHECKING:
    from rlfr_vlm.evaluation.suite import Planned

RESOLVED = "config.resolved.yaml"


def training_config(model_path: str) -> Config | None:
    """The config of the run that a model lies in (RUN/hf/global_step_N), or none."""
    for folder in Path(model_path).resolve().parents[:3]:
        if (folder / RESOLVED).is_file():
            try:
                return load_config(folder / RESOLVED)
            except UserError:
                return None  # of another version of this package: nothing to compare with
    return None


def training_settings(model_path: str) -> dict[str, Any]:
    """Dotted settings that an evaluation takes over from the run that made the model, unless told
    otherwise: prompt, pictures, answer format.
    """
    trained = training_config(model_path)
    if trained is None:
        return {}
    data = trained.data
    settings = {
        "data.system": data.system,
        "data.suffix": data.suffix or None,
        "data.min_pixels": data.min_pixels,
        "data.max_pixels": data.max_pixels,
        "model.dtype": trained.model.dtype,
        "reward.answer": trained.reward.answer,
    }
    return {key: value for key, value in settings.items() if value is not None}


def parity(cfg: Config, planned: Sequence[Planned]) -> list[str]:
    """Every difference between how the model was trained and how each benchmark asks it, with both
    values; empty where none is known.
    """
    trained = training_config(cfg.model.path)
    if trained is None:
        return []
    found = [
        f"{name}: trained with {before!r}, evaluated with {now!r}"
        for name, before, now in (
            ("data.min_pixels", trained.data.min_pixels, cfg.data.min_pixels),
            ("data.max_pixels", trained.data.max_pixels, cfg.data.max_pixels),
            ("model.dtype", trained.model.dtype, cfg.model.dtype),
        )
        if before != now
    ]
    for each in planned:
        benchmark = each.benchmark
        pairs: list[tuple[str, Any, Any]] = [
            ("system", trained.data.system, benchmark.system),
            ("suffix", trained.data.suffix, benchmark.suffix),
            ("answer", trained.reward.answer, benchmark.answer),
            ("max_new_tokens", trained.rollout.max_new_tokens, benchmark.max_new_tokens),
            ("temperature", trained.rollout.temperature, benchmark.temperature),
        ]
        found += [
            f"{benchmark.name} {name}: trained with {before!r}, evaluated with {now!r}"
            for name, before, now in pairs
            if before != now
        ]
    return found
