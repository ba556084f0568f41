"""Policy losses as pure functions of tensors. Only torch is needed here."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where nothing is selected. Both [...], returns a scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def token_weights(lengths: Tensor, aggregation: Literal["token", "sequence"], num_tokens: int, num_sequences: int) -> Tensor:
    """Weight of each response token in the loss of an update, so that micro-batch sums add up to the whole.

    token:    1 / num_tokens                      every token counts the same (DAPO, arXiv:2503.14476)
    sequence: 1 / (num_sequences * |y_b|)         per-sequence means averaged (GRPO, arXiv:2402.03300)

    lengths: [B] int, tokens per response of this micro-batch. num_tokens, num_sequences: of the whole update. Returns [N], N = sum(lengths).
    """
    if aggregation == "token":
        return torch.full((int(lengths.sum()),), 1.0 / num_tokens, device=lengths.device)
    return (1.0 / (num_sequences * lengths.clamp(min=1).float())).repeat_interleave(lengths)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, arXiv:1707.06347, eq. 7), with DAPO's separate bounds and an optional dual clip (arXiv:1912.09729).

    r_t = exp(logp_t - old_t);  loss = sum_t w_t * max(-r_t A_t, -clip(r_t, 1 - low, 1 + high) A_t);  where A_t < 0 at most c * |A_t|

    All inputs [N] float; only `logprobs` carries gradient. Returns the weighted sum and its metrics (weighted sums as well).
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    with torch.no_grad():
        metrics = {
            "actor/pg_clipfrac": (weights * (clipped > unclipped)).sum(),
            "actor/ppo_kl": (weights * -log_ratio).sum(),
        }
    return (weights * losses).sum(), metrics


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference) on sampled tokens (http://joschu.net/blog/kl-approx.html). All [N].

    k1 = d;  k2 = d^2 / 2;  k3 = exp(-d) - 1 + d;  with d = logp - ref
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference
