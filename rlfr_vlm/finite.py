"""The gates that nothing but numbers passes: what goes to an engine or into a checkpoint is looked
through first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlfr_vlm.errors import NonFiniteWeightError


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first of these that holds NaN or an infinity. Reads each once and copies none: a
    sum is finite where all its terms are.

    The other way round a sum may overflow; then the elements themselves are looked at.
    """
    floating = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not floating:
        return None
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in floating.values()])
    doubtful = [
        name for name, fine in zip(floating, sums.isfinite().tolist(), strict=True) if not fine
    ]
    return next((name for name in doubtful if not bool(floating[name].isfinite().all())), None)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises NonFiniteWeightError naming the first of these that holds NaN or an infinity, and
    where it was about to go.
    """
    if (name := not_finite(tensors)) is not None:
        raise NonFiniteWeightError(f"`{name}` holds NaN or an infinity on its way to {where}")
