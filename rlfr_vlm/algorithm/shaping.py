"""Baselines that shape advantages or token rewards from the policy's own distribution, without a
flow field.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def shape_by_entropy(
    advantages: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """Advantages with a bonus for uncertain tokens (arXiv:2506.14758): A_t + min(alpha * H_t, |A_t|
    / kappa).

    With kappa > 1 no advantage changes its sign, and zero stays zero. advantages; entropy of the
    current policy where the token was drawn, nats, without gradient: [N]. Returns [N], no gradient.
    """
    return (advantages + torch.minimum(alpha * entropy, advantages.abs() / kappa)).detach()


def likelihood_scores(
    old_logprobs: Tensor, entropy: Tensor, signal: Literal["surprisal", "entropy"]
) -> Tensor:
    """Scores that stand in for the flow's deviations, to tell latent from logit: s_t = -log
    pi_old(y_t), or s_t = H_t. [N] -> [N].
    """
    return -old_logprobs if signal == "surprisal" else entropy
