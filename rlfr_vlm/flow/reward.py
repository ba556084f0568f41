"""From deviations to token rewards: normalise within the response, drop the noise, keep the strongest, charge for straying."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["minmax", "bilateral", "mean"]


def normalise_scores(scores: Tensor, valid: Tensor, normalise: Normalise, gamma: float = 1.0) -> Tensor:
    """Rescale the scores of ONE response over its valid tokens (arXiv:2510.10201).

    n = (s - min) / (max - min);  minmax: n in [0, 1];  bilateral: 2n - 1 in [-1, 1];  mean: n - mean(n);  then sign(n) |n|^gamma

    scores: [T]; valid: [T] bool (a token without a context is not valid). Returns [T]; zeros where not valid, and everywhere when all valid
    scores are equal. A positive factor on the scores changes nothing.
    """
    result = torch.zeros_like(scores)
    kept = scores[valid]
    if kept.numel() < 2:
        return result
    low, high = kept.min(), kept.max()
    if not bool(high > low):
        return result
    n = (kept - low) / (high - low)
    if normalise == "bilateral":
        n = 2 * n - 1
    elif normalise == "mean":
        n = n - n.mean()
    if gamma != 1.0:
        n = n.sign() * n.abs().pow(gamma)
    result[valid] = n
    return result


def filter_scores(scores: Tensor, normalise: Normalise, threshold: float, top_k: int) -> Tensor:
    """Zero what is within the noise, then keep the strongest of ONE response (arXiv:2510.10201).

    Kept: n > threshold (signed modes: |n| > threshold); a threshold <= 0 keeps all. Then, where at least `top_k` remain, the `top_k` largest
    (signed modes: top_k // 2 of each sign, among the survivors); ties keep the earlier token; 0 keeps all.

    scores: [T], not modified. Returns [T].
    """
    signed = normalise != "minmax"
    kept = scores.clone()
    if threshold > 0:
        kept[(kept.abs() if signed else kept) <= threshold] = 0
    if top_k <= 0 or int((kept != 0).sum()) < top_k:
        return kept
    if not signed:
        return _largest(kept, top_k)
    return _largest(kept.clamp(min=0), top_k // 2) - _largest((-kept).clamp(min=0), top_k // 2)


def _largest(scores: Tensor, k: int) -> Tensor:
    """The k largest positive scores, the earlier of equals; zero elsewhere. [T] -> [T]."""
    order = torch.argsort(scores, descending=True, stable=True)[:k]
    result = torch.zeros_like(scores)
    result[order] = scores[order]
    return result


def flow_reward(
    deviations: Tensor, valid: Tensor, lengths: Tensor, coef: float, normalise: Normalise, threshold: float, top_k: int, gamma: float = 1.0
) -> Tensor:
    """Token rewards of a packed batch: r_t = -coef * filter(normalise(s))_t, response by response.

    deviations: [N] debias-weighted scores, responses end to end; valid: [N] bool; lengths: [B] int with sum N. Returns [N] float32.
    """
    if coef == 0:
        return torch.zeros_like(deviations)
    sizes = lengths.tolist()
    parts = [
        filter_scores(normalise_scores(score, mask, normalise, gamma), normalise, threshold, top_k)
        for score, mask in zip(deviations.split(sizes), valid.split(sizes), strict=True)
    ]
    return -coef * torch.cat(parts) if parts else deviations.clone()
