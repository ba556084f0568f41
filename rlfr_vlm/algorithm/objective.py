"""The loss of a micro-batch: which of the published objectives, on which ratios, with what beside
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlfr_vlm.algorithm.losses import (
    cispo_loss,
    flowrl_loss,
    gmpo_loss,
    kl_estimate,
    policy_loss,
    sequence_log_ratio,
    token_weights,
    truncated_importance,
    value_loss,
)
from rlfr_vlm.algorithm.shaping import shape_by_entropy
from rlfr_vlm.batch import Credit, Sample, Scores, UpdateSize
from rlfr_vlm.config import Config
from rlfr_vlm.types import PolicyOutput


def objective(
    cfg: Config,
    head: nn.Module | None,
    output: PolicyOutput,
    scores: Scores,
    credit: Credit,
    samples: Sequence[Sample],
    size: UpdateSize,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the loss, and its metrics; the shares of an update add up."""
    algorithm = cfg.algorithm
    lengths = torch.tensor([s.length for s in samples], device=scores.logprobs.device)
    weights = token_weights(
        lengths,
        algorithm.loss_aggregation,
        size.num_tokens,
        size.num_sequences,
        cfg.rollout.max_new_tokens,
    )
    advantages = _final_advantages(cfg, output, scores, credit, samples)
    loss, metrics = _policy_objective(
        cfg, head, output, scores, advantages, samples, size, lengths, weights
    )
    metrics["actor/pg_loss"] = loss.detach()
    if cfg.shaping.entropy is not None:
        metrics["shaping/entropy_bonus"] = (weights * (advantages - credit.advantages)).sum()
    metrics["actor/ppo_kl"] = (weights * (scores.logprobs - output.logprobs)).sum().detach()
    if algorithm.kl.coef > 0:
        assert scores.ref_logprobs is not None
        kl = kl_estimate(output.logprobs, scores.ref_logprobs, algorithm.kl.estimator)
        divergence = (weights * kl).sum()
        metrics["actor/kl"] = divergence.detach()
        if algorithm.kl.place == "loss":
            loss = loss + algorithm.kl.coef * divergence
    if algorithm.advantage == "gae":
        assert head is not None and scores.values is not None and credit.returns is not None
        values = head(output.hidden)
        error, critic = value_loss(
            values, scores.values, credit.returns, weights, algorithm.value.clip
        )
        metrics |= {**critic, "critic/vf_loss": error.detach()}
        loss = loss + algorithm.value.coef * error
    return loss, _as_means(cfg, metrics, size)


def _policy_objective(
    cfg: Config,
    head: nn.Module | None,
    output: PolicyOutput,
    scores: Scores,
    advantages: Tensor,
    samples: Sequence[Sample],
    size: UpdateSize,
    lengths: Tensor,
    weights: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective that `algorithm.loss` names. advantages, weights: [N]; lengths: [B]."""
    algorithm, num_sequences = cfg.algorithm, size.num_sequences
    low, high, dual = algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip
    log_ratio = output.logprobs - scores.logprobs
    if algorithm.loss == "clip":
        return policy_loss(log_ratio, advantages, weights, low, high, dual)
    if algorithm.loss == "cispo":
        return cispo_loss(output.logprobs, log_ratio, advantages, weights, high)
    if algorithm.loss == "gspo":
        ratio = sequence_log_ratio(log_ratio, lengths)
        return policy_loss(ratio, advantages, weights, low, high, dual)
    if algorithm.loss == "gmpo":
        return gmpo_loss(log_ratio, advantages, lengths, num_sequences, low, high)
    assert head is not None and output.prompt_means is not None and scores.ref_logprobs is not None
    outcome = torch.tensor([s.outcome_credit for s in samples], device=log_ratio.device)
    logprobs = (output.logprobs, scores.logprobs, scores.ref_logprobs)
    log_z, beta = head(output.prompt_means), algorithm.flowrl.beta
    return flowrl_loss(*logprobs, log_z, outcome, lengths, num_sequences, beta, low, high)


def _final_advantages(
    cfg: Config, output: PolicyOutput, scores: Scores, credit: Credit, samples: Sequence[Sample]
) -> Tensor:
    """Advantages with entropy shaping and the correction of the engine's log-probs, where asked
    for. [N].
    """
    advantages = credit.advantages
    if (shaping := cfg.shaping.entropy) is not None:
        assert output.entropy is not None
        advantages = shape_by_entropy(advantages, output.entropy, shaping.alpha, shaping.kappa)
    # the loss is linear in the advantage: weighing one weighs the other
    if cfg.algorithm.importance_cap is not None:
        advantages = advantages * truncated_importance(
            scores.logprobs,
            rollout_logprobs(samples, advantages.device),
            cfg.algorithm.importance_cap,
        )
    return advantages


def rollout_logprobs(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Log-probs by the engine that sampled the tokens. [N]."""
    return torch.tensor([p for s in samples for p in s.rollout.logprobs], device=device)


def _as_means(cfg: Config, metrics: dict[str, Tensor], size: UpdateSize) -> dict[str, Tensor]:
    """Weights of the `constant` aggregation do not add up to one; metrics are means all the same,
    losses stay as they are.
    """
    if cfg.algorithm.loss_aggregation != "constant":
        return metrics
    scale = size.num_sequences * cfg.rollout.max_new_tokens / size.num_tokens
    return {
        name: value if name.endswith("_loss") else value * scale for name, value in metrics.items()
    }
