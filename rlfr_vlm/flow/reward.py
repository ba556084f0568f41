"""From deviations to token rewards: normalise, drop the noise, keep the strongest, charge for
straying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["minmax", "bilateral", "mean", "group", "group_z", "token_type"]
WITHIN_RESPONSE = (
    "minmax",
    "bilateral",
    "mean",
)  # the level of a response is lost: a right one and a wrong one are charged alike
UNSIGNED = ("minmax", "group")
LEAST_COUNT = 8  # tokens of a type, below which it is pooled with the other rare ones
MIN_SPREAD = 1e-6


@dataclass(frozen=True)
class TokenTypes:
    """Usual score of a token by its id, on the data of the fit. The last entry of mean and std is
    of all rare ids together.
    """

    ids: Tensor  # [K] int, ascending
    mean: Tensor  # [K + 1]
    std: Tensor  # [K + 1]

    @classmethod
    def of(cls, scores: Tensor, token_ids: Tensor) -> TokenTypes:
        """Statistics of scores by token id. Both: [N]."""
        values, place, counts = token_ids.unique(return_inverse=True, return_counts=True)
        common = counts >= LEAST_COUNT
        row = torch.where(common[place], common.cumsum(0)[place] - 1, int(common.sum()))
        count = torch.zeros(
            int(common.sum()) + 1, dtype=torch.float64, device=scores.device
        ).index_add(0, row, torch.ones_like(row).double())
        mean = torch.zeros_like(count).index_add(0, row, scores.double()) / count.clamp(min=1)
        std = (
            torch.zeros_like(count).index_add(0, row, (scores.double() - mean[row]).square())
            / count.clamp(min=1)
        ).sqrt()
        if count[-1] < LEAST_COUNT:  # too few rare ones to say: those of all tokens
            mean[-1], std[-1] = scores.double().mean(), scores.double().std(correction=0)
        return cls(values[common], mean.float(), std.float())

    def z(self, scores: Tensor, token_ids: Tensor) -> Tensor:
        """(score - mean) / std of the token's id. [N], [N] -> [N]."""
        place = torch.searchsorted(self.ids, token_ids).clamp(max=max(0, len(self.ids) - 1))
        known = (
            self.ids[place] == token_ids
            if len(self.ids)
            else torch.zeros_like(token_ids, dtype=torch.bool)
        )
        row = torch.where(known, place, len(self.ids))
        return (scores - self.mean[row]) / self.std[row].clamp(min=MIN_SPREAD)


def normalise_scores(
    scores: Tensor, valid: Tensor, normalise: Normalise, gamma: float = 1.0
) -> Tensor:
    """Rescale the scores of ONE response over its valid tokens (arXiv:2510.10201).

    n = (s - min) / (max - min);  minmax: n in [0, 1];  bilateral: 2n - 1 in [-1, 1];  mean: n -
    mean(n);  then sign(n) |n|^gamma

    scores: [T]; valid: [T] bool (a token without a context is not valid). Returns [T]; zeros where
        not valid, and everywhere when all valid
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

    Kept: n > threshold (signed modes: |n| > threshold); a threshold <= 0 keeps all. Then, where at
        least `top_k` remain, the `top_k` largest
    (signed modes: top_k // 2 of each sign, among the survivors); ties keep the earlier token; 0
    keeps all.

    scores: [T], not modified. Returns [T].
    """
    signed = normalise not in UNSIGNED
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


def normalise_group(
    scores: Tensor, valid: Tensor, group: Tensor, normalise: Literal["group", "group_z"]
) -> Tensor:
    """Rescale scores over the valid tokens of all siblings of a prompt: the level of each response
    stays.

    group: (s - min) / (max - min) in [0, 1]; group_z: (s - mean) / std. Zeros where not valid, and
        where a group's scores are all equal.

    scores: [N]; valid: [N] bool; group: [N] int, the group of each token's response. Returns [N].
    """
    result = torch.zeros_like(scores)
    for each in group.unique():
        inside = valid & (group == each)
        kept = scores[inside]
        if kept.numel() < 2 or not bool(kept.max() > kept.min()):
            continue
        low, size = (
            (kept.min(), kept.max() - kept.min())
            if normalise == "group"
            else (kept.mean(), kept.std())
        )
        result[inside] = (kept - low) / size
    return result


def centre_in_group(values: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """Values less the mean over the valid tokens of their group; zeros where not valid. [N] each ->
    [N].
    """
    _, index = group.unique(return_inverse=True)
    weight = valid.to(values.dtype)
    sums = torch.zeros(
        int(index.max()) + 1 if len(index) else 0, dtype=values.dtype, device=values.device
    )
    mean = sums.index_add(0, index, values * weight) / sums.index_add(0, index, weight).clamp(min=1)
    return (values - mean[index]) * weight


def centre_by_type(
    values: Tensor,
    valid: Tensor,
    token_ids: Tensor,
    total: Callable[[dict[str, float]], dict[str, float]] = dict,
) -> Tensor:
    """Values less the mean over the step's valid tokens with the same id; zeros where not valid.
    [N] each -> [N].

    What is left does not know which token it stands at: a policy that is paid for it cannot earn by
    a liking for some tokens.
    total: sums by name over the parts of a step that is spread over processes, of which `values` is
        one.
    """
    ids, index = token_ids.unique(return_inverse=True)
    weight, names = valid.double(), [str(i) for i in ids.tolist()]
    sums = torch.zeros(2, len(ids), dtype=torch.float64, device=values.device)
    sums = sums.index_add(1, index, torch.stack([values.double() * weight, weight]))
    own = dict(
        zip(
            (f"{part} {name}" for part in ("sum", "count") for name in names),
            sums.flatten().tolist(),
            strict=True,
        )
    )
    found = total(own)
    mean = torch.tensor(
        [found[f"sum {name}"] / max(1.0, found[f"count {name}"]) for name in names],
        dtype=values.dtype,
        device=values.device,
    )
    return (values - mean[index]) * weight.to(values.dtype)


def book_later(values: Tensor, lengths: Tensor, shift: int) -> Tensor:
    """Move every value `shift` tokens on within its response: from a target to the context after
    it. [N] -> [N]; zeros at the first ones.

    What would be moved past the end has no context there, so is zero already.
    """
    moved = [
        torch.cat([part.new_zeros(min(shift, len(part))), part[: max(0, len(part) - shift)]])
        for part in values.split(lengths.tolist())
    ]
    return torch.cat(moved) if moved else values.clone()


@dataclass(frozen=True)
class Siblings:
    """What rewards that compare siblings or token types need to know of a batch's tokens."""

    group: Tensor  # [N] int, of each token's response
    token_ids: Tensor  # [N]
    types: TokenTypes | None = None


def flow_reward(
    deviations: Tensor,
    valid: Tensor,
    lengths: Tensor,
    coef: float,
    normalise: Normalise,
    threshold: float,
    top_k: int,
    gamma: float = 1.0,
    siblings: Siblings | None = None,
) -> Tensor:
    """Token rewards of a packed batch: r_t = -coef * filter(normalise(s))_t, filtered response by
    response.

    deviations: [N] debias-weighted scores, responses end to end; valid: [N] bool; lengths: [B] int
        with sum N; siblings: for the normalisations
    over groups, which must be whole, and token types. Returns [N] float32.
    """
    if coef == 0:
        return torch.zeros_like(deviations)
    sizes = lengths.tolist()
    if normalise in WITHIN_RESPONSE:
        pairs = zip(deviations.split(sizes), valid.split(sizes), strict=True)
        normalised = [normalise_scores(score, mask, normalise, gamma) for score, mask in pairs]
    else:
        normalised = list(_over_batch(deviations, valid, normalise, gamma, siblings).split(sizes))
    parts = [filter_scores(scores, normalise, threshold, top_k) for scores in normalised]
    return -coef * torch.cat(parts) if parts else deviations.clone()


def _over_batch(
    scores: Tensor, valid: Tensor, normalise: Normalise, gamma: float, siblings: Siblings | None
) -> Tensor:
    if siblings is None:
        raise ValueError(f"normalise={normalise} needs to know groups and token ids")
    if normalise == "token_type":
        if siblings.types is None:
            raise ValueError("normalise=token_type needs the statistics of a fit")
        n = torch.where(
            valid, siblings.types.z(scores, siblings.token_ids), torch.zeros_like(scores)
        )
    else:
        assert normalise in ("group", "group_z")
        n = normalise_group(scores, valid, siblings.group, normalise)
    return n if gamma == 1.0 else n.sign() * n.abs().pow(gamma)
