"""Which responses and which of their tokens the flow field follows online, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlfr_vlm.batch import Sample
from rlfr_vlm.config import FlowOnlineConfig
from rlfr_vlm.ranks import ALONE, Ranks


def flow_weights(
    cfg: FlowOnlineConfig,
    samples: Sequence[Sample],
    ranks: Ranks = ALONE,
    contrast: Literal["none", "own", "wrong"] = "none",
) -> list[float]:
    """Weight of each response in the online flow update: selected ones share 1, the others count
    `soft_weight` (rejection sampling).

    contrast: the weights are those for the field's contrast, which follows all responses (own), or
        those that are not correct.
    """
    raw = [
        1.0 if s.outcome.correct or "correct" not in cfg.select else cfg.soft_weight
        for s in samples
    ]
    if contrast != "none":
        raw = [float(contrast == "own" or not s.outcome.correct) for s in samples]
    (total,) = ranks.total([sum(raw)], "weights of the flow update")
    return [w / total for w in raw] if total > 0 else raw


def flow_token_weights(
    cfg: FlowOnlineConfig,
    weights: Sequence[float],
    lengths: Sequence[int],
    valid: Tensor,
    entropy: Tensor,
) -> Tensor:
    """A response's weight shared out over its tokens that have a context; by entropy, mostly over
    those at or above its quantile.

    sum_t w_t m_t l_t / sum_t w_t m_t for each response, w_t = 1 or soft_weight (arXiv:2510.10201).
    weights: one per response; valid, entropy: [N]. Returns [N] float32.
    """
    parts = []
    for weight, mask, values in zip(
        weights, valid.split(list(lengths)), entropy.split(list(lengths)), strict=True
    ):
        share = mask.float()
        if "entropy" in cfg.select and bool(mask.any()):
            low = values < values[mask].quantile(cfg.entropy_quantile)
            share = torch.where(low, share * cfg.soft_weight, share)
        parts.append(share * (weight / share.sum().clamp(min=1e-12)))
    return torch.cat(parts)
