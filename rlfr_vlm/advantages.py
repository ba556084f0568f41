"""Advantages as pure functions of tensors. Only torch is needed here."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(reward: Tensor, graded: Tensor, group: Tensor, min_std: float = 1e-6) -> Tensor:
    """Outcome reward normalised within its group (GRPO, arXiv:2402.03300): A = (R - mean_g) / std_g, unbiased std, over graded responses.

    Statistics are taken in float64, and a group whose std is below `min_std`, or with fewer than two graded responses, gives exactly zero:
    rounding noise of equal rewards is never blown up into an advantage. Ungraded responses get zero.

    reward: [B] float; graded: [B] bool; group: [B] int, any labels. Returns [B] float32.
    """
    _, index = torch.unique(group, return_inverse=True)
    num_groups = int(index.max()) + 1 if index.numel() else 0
    weight = graded.double()
    zeros = torch.zeros(num_groups, dtype=torch.float64, device=reward.device)
    count = zeros.index_add(0, index, weight)
    mean = zeros.index_add(0, index, weight * reward.double()) / count.clamp(min=1)
    centred = (reward.double() - mean[index]) * weight
    std = (zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)).sqrt()
    usable = (std > min_std) & (count >= 2)
    scale = torch.where(usable, 1 / std.clamp(min=min_std), torch.zeros_like(std))
    return (centred * scale[index]).float()


def rewards_to_go(token_rewards: Tensor, lengths: Tensor, gamma: float = 1.0) -> Tensor:
    """Return from each token on, within its own response: G_t = sum_{s >= t} gamma^(s - t) r_s.

    token_rewards: [N], responses end to end; lengths: [B] int with sum N. Returns [N], the dtype of the rewards.
    """
    parts = []
    for segment in token_rewards.split(lengths.tolist()):
        if gamma == 1.0:
            parts.append(segment.flip(0).cumsum(0).flip(0))
            continue
        returns, running = torch.empty_like(segment), segment.new_zeros(())
        for t in range(len(segment) - 1, -1, -1):
            running = segment[t] + gamma * running
            returns[t] = running
        parts.append(returns)
    return torch.cat(parts) if parts else token_rewards.clone()
