"""Advantages as pure functions of tensors. Only torch is needed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlfr_vlm.batch import MIN_STD


def _group_statistics(
    reward: Tensor, graded: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each response's group, over graded responses, in float64: count, reward less the mean (0
    if ungraded), unbiased std. [B] each.
    """
    _, index = torch.unique(group, return_inverse=True)
    num_groups = int(index.max()) + 1 if index.numel() else 0
    weight = graded.double()
    zeros = torch.zeros(num_groups, dtype=torch.float64, device=reward.device)
    count = zeros.index_add(0, index, weight)
    mean = zeros.index_add(0, index, weight * reward.double()) / count.clamp(min=1)
    centred = (reward.double() - mean[index]) * weight
    std = (zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)).sqrt()
    return count[index], centred, std[index]


def group_advantages(reward: Tensor, graded: Tensor, group: Tensor, scale: bool = True) -> Tensor:
    """Outcome reward normalised within its group: A = (R - mean_g) / std_g, unbiased std, over
    graded responses (GRPO, arXiv:2402.03300).

    scale False leaves the division out (Dr. GRPO, arXiv:2503.20783). Statistics are taken in
    float64, and a group whose std is below 1e-6, or with fewer than two graded responses, gives
    exactly zero: rounding noise of equal rewards is never blown up into an advantage. Ungraded
    responses get zero.

    reward: [B] float; graded: [B] bool; group: [B] int, any labels. Returns [B] float32.
    """
    count, centred, std = _group_statistics(reward, graded, group)
    usable = (std > MIN_STD) & (count >= 2)
    factor = 1 / std.clamp(min=MIN_STD) if scale else torch.ones_like(std)
    return torch.where(usable, centred * factor, torch.zeros_like(centred)).float()


def leave_one_out(reward: Tensor, graded: Tensor, group: Tensor) -> Tensor:
    """Outcome reward less the mean of its graded siblings: A_i = R_i - mean_{j != i} R_j (RLOO,
    arXiv:2402.14740).

    Arguments, zeros and result as in `group_advantages`.
    """
    count, _, _ = _group_statistics(reward, graded, group)
    return (
        group_advantages(reward, graded, group, scale=False).double()
        * count
        / (count - 1).clamp(min=1)
    ).float()


def rewards_to_go(token_rewards: Tensor, lengths: Tensor, gamma: float = 1.0) -> Tensor:
    """Return from each token on, within its own response: G_t = sum_{s >= t} gamma^(s - t) r_s.

    token_rewards: [N], responses end to end; lengths: [B] int with sum N. Returns [N], the dtype of
        the rewards.
    """
    if not len(lengths):
        return token_rewards.clone()
    backwards = [segment.flip(0) for segment in token_rewards.split(lengths.tolist())]
    if gamma == 1.0:
        return torch.cat([segment.cumsum(0).flip(0) for segment in backwards])
    columns = pad_sequence(backwards).unbind()  # the last token of every response first
    running, returns = torch.zeros_like(columns[0]) if columns else token_rewards, []
    for column in columns:
        running = column + gamma * running
        returns.append(running)
    rows = torch.stack(returns, dim=1)
    return torch.cat(
        [row[: len(segment)].flip(0) for row, segment in zip(rows, backwards, strict=True)]
    )


def gae(
    token_rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16), within each response.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token;  A_t = delta_t + gamma lam
    A_{t+1};  returns R_t = A_t + V_t

    token_rewards, values (of the state before the token): [N]; lengths: [B] int with sum N. Returns
    advantages and returns, [N] each.
    """
    parts = []
    for rewards, own in zip(
        token_rewards.split(lengths.tolist()), values.split(lengths.tolist()), strict=True
    ):
        following = torch.cat([own[1:], own.new_zeros(min(1, len(own)))])
        parts.append(rewards + gamma * following - own)
    deltas = torch.cat(parts) if parts else token_rewards.clone()
    advantages = rewards_to_go(deltas, lengths, gamma * lam)
    return advantages, advantages + values


def whiten(values: Tensor, total: Callable[[Sequence[float]], Sequence[float]] = tuple) -> Tensor:
    """Shifted and scaled to mean 0 and population std 1 over the whole batch, in float64; zeros
    where all are equal. [N] -> [N].

    total: sums over the parts of a batch that is spread over processes, of which `values` is one.
    """
    precise = values.double()
    count, sum_ = total((float(len(values)), precise.sum().item()))
    mean = sum_ / max(1.0, count)
    (squares,) = total(((precise - mean).square().sum().item(),))
    std = math.sqrt(squares / max(1.0, count))
    return ((precise - mean) / std).to(values.dtype) if std > MIN_STD else torch.zeros_like(values)
