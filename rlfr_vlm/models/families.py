"""Where each model family keeps its parts. A further family is one row."""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_vlm.errors import UserError


@dataclass(frozen=True)
class Family:
    """Dotted paths from the Hugging Face model to its parts, and what its rotary positions look
    like.
    """

    language: str = "model"  # the module with `layers` and `norm`
    vision: str | None = None  # the vision tower
    position_axes: int = 1  # 3: time, height and width (M-RoPE)


_QWEN_VL = Family(language="model.language_model", vision="model.visual", position_axes=3)

FAMILIES: dict[str, Family] = {
    "qwen2": Family(),
    "qwen3": Family(),
    "llama": Family(),
    "mistral": Family(),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
}


def find_family(model_type: str) -> Family:
    """The family of a config's `model_type`. Raises UserError naming the known ones."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path: model type `{model_type}` is not known; known: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
