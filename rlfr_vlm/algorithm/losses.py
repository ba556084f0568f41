"""Policy losses as pure functions of tensors. Only torch is needed here.

N response tokens of B responses end to end; `lengths` [B] int with sum N. A loss is a weighted sum,
so that micro-batches add up to the whole.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def response_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tokens of each response. values: [N]; returns [B]."""
    index = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add(0, index, values) / lengths.clamp(min=1)


def token_weights(
    lengths: Tensor,
    aggregation: Literal["token", "sequence", "constant"],
    num_tokens: int,
    num_sequences: int,
    max_tokens: int = 0,
) -> Tensor:
    """Weight of each response token in the loss of an update.

    token:    1 / num_tokens: every token counts the same (DAPO, arXiv:2503.14476)
    sequence: 1 / (num_sequences * |y_b|): per-sequence means averaged (GRPO, arXiv:2402.03300)
    constant: 1 / (num_sequences * max_tokens): no response gains by its length (Dr. GRPO,
        arXiv:2503.20783)

    lengths: of this micro-batch. num_tokens, num_sequences: of the whole update; max_tokens: the
        response budget. Returns [N].
    """
    if aggregation == "sequence":
        return (1.0 / (num_sequences * lengths.clamp(min=1).float())).repeat_interleave(lengths)
    weight = 1.0 / num_tokens if aggregation == "token" else 1.0 / (num_sequences * max_tokens)
    return torch.full((int(lengths.sum()),), weight, device=lengths.device)


def policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, arXiv:1707.06347, eq. 7), with DAPO's separate bounds and an optional
    dual clip (arXiv:1912.09729).

    r_t = exp(log_ratio_t);  loss = sum_t w_t * max(-r_t A_t, -clip(r_t, 1 - low, 1 + high) A_t);
    where A_t < 0 at most c * |A_t|

    All inputs [N] float; only `log_ratio` carries gradient. Returns the weighted sum and its
    metrics (weighted sums as well).
    """
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return (weights * losses).sum(), {
        "actor/pg_clipfrac": (weights * (clipped > unclipped)).sum().detach()
    }


def cispo_loss(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_high: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with the importance weight clipped, not the update (CISPO, arXiv:2506.13585, eq. 4
    and 5): a token with a large ratio keeps its gradient.

    loss = -sum_t w_t sg(min(r_t, 1 + high)) A_t log pi_t;  sg: without gradient; no lower bound

    All inputs [N] float; only `logprobs` carries gradient. Returns the weighted sum and its
    metrics.
    """
    ratio = log_ratio.detach().exp()
    loss = -(weights * ratio.clamp(max=1 + clip_high) * advantages * logprobs).sum()
    return loss, {"actor/pg_clipfrac": (weights * (ratio > 1 + clip_high)).sum()}


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """GSPO's ratio in its per-token form (arXiv:2507.18071, eq. 7 and 14): log s_b = mean_t log r_t
    for every token of response b.

    The value is the sequence's; the gradient of each token's copy is that of its own log-prob, so
    that per-sequence means of `policy_loss` give GSPO exactly for equal advantages within a
    response, and token advantages keep their place.
    log_ratio: [N]. Returns [N].
    """
    sequence = response_means(log_ratio.detach(), lengths).repeat_interleave(lengths)
    return sequence + log_ratio - log_ratio.detach()


def gmpo_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    num_sequences: int,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Geometric mean of token ratios (GMPO, arXiv:2507.20673).

    l_t = s min(s log r_t, s clip(log r_t, -low, high)), s = sign(A);  loss = -1/B sum_b A
    exp(mean_t l_t);  A = mean_t A_t

    The paper has one advantage per response; where its tokens differ, the response gets their mean.
    log_ratio, advantages: [N]; num_sequences: B of the whole update. Returns the sum over this
        micro-batch and its metrics.
    """
    advantage = response_means(advantages, lengths)
    sign = advantage.sign().repeat_interleave(lengths)
    clamped = log_ratio.clamp(-clip_low, clip_high)
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * clamped)
    loss = -(advantage * response_means(pessimistic, lengths).exp()).sum() / num_sequences
    clipped = (sign * clamped < sign * log_ratio).to(log_ratio.dtype)
    return loss, {
        "actor/pg_clipfrac": (response_means(clipped, lengths).sum() / num_sequences).detach()
    }


def flowrl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    log_z: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    num_sequences: int,
    beta: float = 15.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Trajectory balance with a learned partition function (FlowRL, arXiv:2509.15207, eq. 6).

    loss = 1/B sum_b w_b (log Z_b + mean_t log pi - beta r_b - mean_t log pi_ref)^2,  w_b =
    clip(prod_t pi / pi_old, 1 - low, 1 + high), detached

    logprobs (with gradient), old_logprobs, ref_logprobs: [N]; log_z (with gradient), rewards
    (group-normalised): [B].
    num_sequences: B of the whole update. Returns the sum over this micro-batch and its metrics.
    """
    weight = (
        (response_means(logprobs - old_logprobs, lengths) * lengths)
        .exp()
        .clamp(1 - clip_low, 1 + clip_high)
        .detach()
    )
    mean_logprob, mean_ref = (
        response_means(logprobs, lengths),
        response_means(ref_logprobs, lengths),
    )
    residual = log_z + mean_logprob - beta * rewards - mean_ref
    share = 1.0 / num_sequences
    columns = {
        "log_z": log_z,
        "residual": residual.abs(),
        "weight": weight,
        "logprob": mean_logprob,
        "ref_logprob": mean_ref,
    }
    metrics = {
        f"flowrl/{name}": (column.sum() * share).detach() for name, column in columns.items()
    }
    return (weight * residual.square()).sum() * share, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error of a value head (PPO as in OpenRLHF and verl).

    loss = 1/2 sum_t w_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    All inputs [N]; only `values` carries gradient. Returns the weighted sum and its metrics.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    metrics = {
        "critic/vf_clipfrac": (weights * (clipped > unclipped)).sum().detach(),
        "critic/values": (weights * values).sum().detach(),
        "critic/returns": (weights * returns).sum().detach(),
    }
    return 0.5 * (weights * torch.maximum(unclipped, clipped)).sum(), metrics


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token estimate of KL(policy || reference) on sampled tokens
    (http://joschu.net/blog/kl-approx.html). All [N].

    k1 = d;  k2 = d^2 / 2;  k3 = exp(-d) - 1 + d;  with d = logp - ref
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Weight min(pi_old / pi_rollout, cap) of each token: corrects for an engine whose log-probs
    are not the trainer's.

    old_logprobs, rollout_logprobs: [N], no gradient. Returns [N].
    """
    return (old_logprobs - rollout_logprobs).exp().clamp(max=cap)
