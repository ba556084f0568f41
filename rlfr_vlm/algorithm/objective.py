"""The loss of a micro-batch: which of the published objectives, on which ratios, with what beside
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlfr_vlm.algorithm.losses import (
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
    log_ratio = output.logprobs - scores.logprobs
    advantages = _final_advantages(cfg, output, scores, credit, samples)
    clips = (algorithm.clip_low, algorithm.clip_high)
    if algorithm.loss == "clip":
        loss, metrics = policy_loss(log_ratio, advantages, weights, *clips, algorithm.dual_clip)
    elif algorithm.loss == "gspo":
        loss, metrics = policy_loss(
            sequence_log_ratio(log_ratio, lengths), advantages, weights, *clips, algorithm.dual_clip
        )
    elif algorithm.loss == "gmpo":
        loss, metrics = gmpo_loss(log_ratio, advantages, lengths, size.num_sequences, *clips)
    else:
        assert (
            head is not None and output.prompt_means is not None and scores.ref_logprobs is not None
        )
        outcome = torch.tensor([s.outcome_credit for s in samples], device=log_ratio.device)
        loss, metrics = flowrl_loss(
            output.logprobs,
            scores.logprobs,
            scores.ref_logprobs,
            head(output.prompt_means),
            outcome,
            lengths,
            size.num_sequences,
            algorithm.flowrl.beta,
            *clips,
        )
    metrics["actor/pg_loss"] = loss.detach()
    if cfg.shaping.entropy is not None:
        metrics["shaping/entropy_bonus"] = (weights * (advantages - credit.advantages)).sum()
    metrics["actor/ppo_kl"] = (weights * -log_ratio).sum().detach()
    if algorithm.kl.coef > 0:
        assert scores.ref_logprobs is not None
        divergence = (
            weights * kl_estimate(output.logprobs, scores.ref_logprobs, algorithm.kl.estimator)
        ).sum()
        metrics["actor/kl"] = divergence.detach()
        if algorithm.kl.place == "loss":
            loss = loss + algorithm.kl.coef * divergence
    if algorithm.advantage == "gae":
        assert head is not None and scores.values is not None and credit.returns is not None
        error, critic = value_loss(
            head(output.hidden), scores.values, credit.returns, weights, algorithm.value.clip
        )
        metrics |= {**critic, "critic/vf_loss": error.detach()}
        loss = loss + algorithm.value.coef * error
    return loss, _as_means(cfg, metrics, size)


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
