"""One batch of rollouts -> one or more optimiser steps of the policy and of the flow field."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlfr_vlm.advantages import group_advantages, rewards_to_go
from rlfr_vlm.config import Config, FlowOnlineConfig, FlowRewardConfig
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.reward import flow_reward
from rlfr_vlm.losses import policy_loss, token_weights
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.training.optim import Optimizer
from rlfr_vlm.types import Outcome, PolicyOutput, Rollout, RolloutGroup, request_seed


@dataclass(frozen=True)
class Scores:
    """What a response's tokens were worth to the policy that sampled them, and to the field as it was then."""

    logprobs: Tensor  # [T]
    deviations: Tensor  # [T]
    valid: Tensor  # [T] bool
    entropy: Tensor  # [T]


@dataclass(frozen=True)
class Sample:
    """One graded response, ready for the update."""

    rollout: Rollout
    outcome: Outcome
    advantage: float  # of the outcome, normalised within its group
    seed: int  # of its flow noise
    scores: Scores | None = None  # None: taken from the update's own forward, which for one on-policy step is the same

    @property
    def length(self) -> int:
        """Response tokens."""
        return len(self.rollout.token_ids)


@dataclass(frozen=True)
class TokenRecord:
    """What became of a response's tokens, for the page of rollouts."""

    advantages: list[float]
    flow_rewards: list[float] | None
    deviations: list[float] | None
    entropy: list[float]


@dataclass(frozen=True)
class Learner:
    """Everything that learns."""

    policy: Policy
    optimizer: Optimizer
    field: FlowField | None = None
    flow_optimizer: Optimizer | None = None  # None: the field is frozen


def make_samples(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome], seed: int, step: int) -> list[Sample]:
    """Outcome advantages within each group; responses that could not be graded are left out."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    index = torch.tensor([g for g, group in enumerate(groups) for _ in group.rollouts])
    advantages = group_advantages(
        torch.tensor([o.reward for o in outcomes], dtype=torch.float64), torch.tensor([o.graded for o in outcomes]), index
    )
    return [
        Sample(rollout, outcome, advantage, request_seed("flow", seed, step, rollout.prompt.prompt.id, rollout.sample_index))
        for rollout, outcome, advantage in zip(rollouts, outcomes, advantages.tolist(), strict=True)
        if outcome.graded
    ]


def score_samples(cfg: Config, learner: Learner, samples: Sequence[Sample]) -> list[Sample]:
    """One frozen pass: old log-probs and deviations of every response, needed when a batch serves several updates."""
    scored: list[Sample] = []
    for part in micro_batches([s.rollout for s in samples], cfg.train.tokens_per_microbatch):
        chosen = [samples[i] for i in part]
        with torch.no_grad():
            output = _forward(cfg, learner, chosen)
        sizes = [s.length for s in chosen]
        columns = zip(*(column.split(sizes) for column in _scores(learner, output, chosen)), strict=True)
        scored += [replace(sample, scores=Scores(*column)) for sample, column in zip(chosen, columns, strict=True)]
    return scored


def _forward(cfg: Config, learner: Learner, samples: Sequence[Sample]) -> PolicyOutput:
    request = learner.field.request if learner.field is not None else None
    batch = pack([s.rollout for s in samples], learner.policy.device)
    return learner.policy.forward(batch, cfg.rollout.temperature, request, with_entropy=True)


def _scores(learner: Learner, output: PolicyOutput, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old log-probs, deviations, their validity and the entropy, [N] each: as stored, or from this very forward."""
    stored = [s.scores for s in samples if s.scores is not None]
    if stored:
        return tuple(torch.cat([getattr(s, name) for s in stored]) for name in ("logprobs", "deviations", "valid", "entropy"))  # type: ignore[return-value]
    logprobs = output.logprobs.detach()
    assert output.entropy is not None
    if learner.field is None or output.latents is None:
        return logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs, dtype=torch.bool), output.entropy
    deviations = learner.field.score(output.latents, [s.length for s in samples], [s.seed for s in samples])
    return logprobs, deviations, output.latents.valid, output.entropy


def token_advantages(samples: Sequence[Sample], deviations: Tensor, valid: Tensor, cfg: FlowRewardConfig | None) -> tuple[Tensor, Tensor]:
    """A_t = outcome advantage of the response + flow rewards from t on (arXiv:2510.10201). Returns advantages and flow rewards, [N] each."""
    lengths = torch.tensor([s.length for s in samples], device=deviations.device)
    outcome = torch.tensor([s.advantage for s in samples], device=deviations.device).repeat_interleave(lengths)
    if cfg is None:
        return outcome, torch.zeros_like(outcome)
    rewards = flow_reward(deviations, valid, lengths, cfg.coef, cfg.normalise, cfg.threshold, cfg.top_k, cfg.gamma)
    return outcome + rewards_to_go(rewards, lengths), rewards


def flow_weights(cfg: FlowOnlineConfig, samples: Sequence[Sample]) -> list[float]:
    """Weight of each response in the online flow update: correct ones share 1, wrong ones count `soft_weight` (rejection sampling)."""
    raw = [1.0 if s.outcome.correct else cfg.soft_weight for s in samples]
    return [w / total for w in raw] if (total := sum(raw)) > 0 else raw


def flow_token_weights(cfg: FlowOnlineConfig, weights: Sequence[float], lengths: Sequence[int], valid: Tensor, entropy: Tensor) -> Tensor:
    """A response's weight shared out over its tokens that have a context; with an entropy quantile, mostly over those at or above it.

    sum_t w_t m_t l_t / sum_t w_t m_t for each response, w_t = 1 or soft_weight (arXiv:2510.10201).
    weights: one per response; valid, entropy: [N]. Returns [N] float32.
    """
    parts = []
    for weight, mask, values in zip(weights, valid.split(list(lengths)), entropy.split(list(lengths)), strict=True):
        share = mask.float()
        if cfg.entropy_quantile is not None and bool(mask.any()):
            low = values < values[mask].quantile(cfg.entropy_quantile)
            share = torch.where(low, share * cfg.soft_weight, share)
        parts.append(share * (weight / share.sum().clamp(min=1e-12)))
    return torch.cat(parts)


def update(cfg: Config, learner: Learner, samples: Sequence[Sample]) -> tuple[dict[str, float], list[TokenRecord]]:
    """One optimiser step of the policy, and one of the field, on these samples, micro-batch by micro-batch.

    The result does not depend on how the samples fall into micro-batches. Returns metrics and, per sample, what its tokens got.
    """
    num_tokens = sum(s.length for s in samples)
    online = flow_weights(cfg.flow.online, samples) if cfg.flow is not None and learner.flow_optimizer is not None else []
    sums: defaultdict[str, float] = defaultdict(float)
    records: list[TokenRecord] = []
    for part in micro_batches([s.rollout for s in samples], cfg.train.tokens_per_microbatch):
        chosen = [samples[i] for i in part]
        output = _forward(cfg, learner, chosen)
        old, deviations, valid, entropy = _scores(learner, output, chosen)
        advantages, rewards = token_advantages(chosen, deviations, valid, cfg.flow.reward if cfg.flow else None)
        lengths = torch.tensor([s.length for s in chosen], device=old.device)
        weights = token_weights(lengths, cfg.algorithm.loss_aggregation, num_tokens, len(samples))
        loss, metrics = policy_loss(
            output.logprobs, old, advantages, weights, cfg.algorithm.clip_low, cfg.algorithm.clip_high, cfg.algorithm.dual_clip
        )
        if not math.isfinite(loss.item()):
            raise StoppedError(f"the policy loss is not finite; responses: {[s.rollout.prompt.prompt.id for s in chosen][:8]}")
        loss.backward()
        learner.optimizer.accumulate()
        faultpoint("backward")
        if learner.flow_optimizer is not None and learner.field is not None and output.latents is not None:
            assert cfg.flow is not None
            sizes = [s.length for s in chosen]
            shares = flow_token_weights(cfg.flow.online, [online[i] for i in part], sizes, valid, entropy)
            sums["flow/loss"] += learner.field.accumulate_gradient(output.latents, sizes, [s.seed for s in chosen], shares)
        sums["actor/pg_loss"] += loss.item()
        for name, value in metrics.items():
            sums[name] += value.item()
        share = 1 / num_tokens
        sums["actor/entropy"] += entropy.sum().item() * share
        sampled = torch.tensor([p for s in chosen for p in s.rollout.logprobs], device=old.device)
        sums["rollout/logprob_diff_mean"] += (old - sampled).abs().sum().item() * share
        if learner.field is not None:
            outcome = torch.tensor([s.advantage for s in chosen], device=old.device).repeat_interleave(lengths)
            _add_flow_metrics(sums, deviations, rewards, advantages, outcome, share, len(samples))
        records += _records(chosen, advantages, rewards, deviations, entropy, learner.field is not None)
    if learner.field is not None:
        flow_size, outcome_size = sums.pop("flow/advantage_size"), sums.pop("flow/outcome_size")
        sums["flow/advantage_share"] = flow_size / max(flow_size + outcome_size, 1e-12)
    sums["actor/lr"] = learner.optimizer.current_lr
    sums["actor/grad_norm"] = learner.optimizer.step()
    learner.policy.version += 1
    faultpoint("step")
    if learner.flow_optimizer is not None:
        sums["flow/lr"] = learner.flow_optimizer.current_lr
        sums["flow/grad_norm"] = learner.flow_optimizer.step()
    return dict(sums), records


def _add_flow_metrics(
    sums: defaultdict[str, float],
    deviations: Tensor,
    rewards: Tensor,
    advantages: Tensor,
    outcome: Tensor,
    share: float,
    num_samples: int,
) -> None:
    """Sizes are means over tokens of absolute values; rewards are sums per response."""
    sums["flow/deviation_mean"] += deviations.sum().item() * share
    sums["flow/reward_mean"] += rewards.sum().item() / num_samples
    sums["flow/num_reward_tokens"] += (rewards != 0).sum().item() / num_samples
    sums["flow/advantage_size"] += (advantages - outcome).abs().sum().item() * share
    sums["flow/outcome_size"] += outcome.abs().sum().item() * share


def _records(
    samples: Sequence[Sample], advantages: Tensor, rewards: Tensor, deviations: Tensor, entropy: Tensor, with_flow: bool
) -> list[TokenRecord]:
    sizes = [s.length for s in samples]
    columns = [column.cpu().split(sizes) for column in (advantages, rewards, deviations, entropy)]
    return [
        TokenRecord(a.tolist(), r.tolist() if with_flow else None, d.tolist() if with_flow else None, e.tolist())
        for a, r, d, e in zip(*columns, strict=True)
    ]
