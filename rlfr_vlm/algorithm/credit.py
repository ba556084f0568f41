"""From graded responses to what each of their tokens gets: scores of the sampling policy, token
rewards, advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlfr_vlm.algorithm.advantages import (
    gae,
    group_advantages,
    leave_one_out,
    rewards_to_go,
    whiten,
)
from rlfr_vlm.algorithm.losses import kl_estimate
from rlfr_vlm.algorithm.shaping import likelihood_scores
from rlfr_vlm.batch import Credit, Sample, Scores
from rlfr_vlm.config import AlgorithmConfig, Config, TokenRewardConfig
from rlfr_vlm.faults import poison
from rlfr_vlm.flow.reward import (
    WITHIN_RESPONSE,
    Siblings,
    TokenTypes,
    book_later,
    centre_by_type,
    centre_in_group,
    flow_reward,
)
from rlfr_vlm.models.pack import micro_batches
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.types import Outcome, RolloutGroup, request_seed

CENTRING = "centring token rewards"


def make_samples(
    groups: Sequence[RolloutGroup],
    outcomes: Sequence[Outcome],
    seed: int,
    step: int,
    algorithm: AlgorithmConfig | None = None,
    positions: Sequence[int] | None = None,
) -> list[Sample]:
    """Outcome advantages (default: GRPO's); responses that could not be graded are left out.
    positions: of the groups in the whole step.
    """
    if not groups:
        return []
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    index = torch.tensor([g for g, group in enumerate(groups) for _ in group.rollouts])
    reward = torch.tensor([o.reward for o in outcomes], dtype=torch.float64)
    advantages = outcome_advantages(
        reward, torch.tensor([o.graded for o in outcomes]), index, algorithm or AlgorithmConfig()
    )
    places = range(len(groups)) if positions is None else positions
    return [
        Sample(
            rollout,
            outcome,
            advantage,
            request_seed("flow", seed, step, rollout.prompt.prompt.id, rollout.sample_index),
            places[group],
        )
        for rollout, outcome, advantage, group in zip(
            rollouts, outcomes, advantages.tolist(), index.tolist(), strict=True
        )
        if outcome.graded
    ]


def outcome_advantages(
    reward: Tensor, graded: Tensor, group: Tensor, algorithm: AlgorithmConfig
) -> Tensor:
    """What stands at the last token of each response. reward: [B] float; graded: [B] bool; group:
    [B] int. Returns [B].
    """
    if algorithm.advantage == "leave_one_out":
        return leave_one_out(reward, graded, group)
    if algorithm.advantage in ("whitened", "gae"):
        return reward
    return group_advantages(reward, graded, group, scale=algorithm.advantage == "group")


def needs_scoring(cfg: Config, samples: Sequence[Sample], ranks: Ranks = ALONE) -> bool:
    """Whether advantages or ratios need a pass over the whole batch before its first update."""
    if scores_first(cfg):
        return True
    if not compares_siblings(cfg):
        return False
    parts = micro_batches([s.rollout for s in samples], cfg.train.tokens_per_microbatch)
    groups = [{samples[i].position for i in part} for part in parts]
    return any(
        ranks.gather(
            sum(map(len, groups)) > len(set().union(*groups)), "whether micro-batches split groups"
        )
    )


def scores_first(cfg: Config) -> bool:
    """Whether that pass is needed however responses fall into micro-batches."""
    return (
        cfg.algorithm.updates_per_rollout > 1
        or cfg.algorithm.advantage in ("whitened", "gae")
        or _centres_types(cfg)
    )


def _centres_types(cfg: Config) -> bool:
    how = cfg.flow.reward if cfg.flow is not None else cfg.shaping.likelihood
    return how is not None and how.coef > 0 and how.centre == "type"


def compares_siblings(cfg: Config) -> bool:
    """Whether token rewards need all siblings of a group at once."""
    how = cfg.flow.reward if cfg.flow is not None else cfg.shaping.likelihood
    return (
        how is not None
        and how.coef > 0
        and (how.credit == "token" or how.normalise not in WITHIN_RESPONSE)
    )


def assign_credit(
    cfg: Config,
    samples: Sequence[Sample],
    scores: Scores,
    ranks: Ranks = ALONE,
    types: TokenTypes | None = None,
) -> Credit:
    """Token rewards r_t = 1[last] * outcome - kl_coef * KL_t + r_flow, and from them advantages
    (arXiv:2510.10201; PPO for the others).

    With credit=token the token rewards are no rewards but advantages: added to their own token's,
    summed over nothing.

    For outcome advantages within a group `samples` may be any of its responses, for token rewards
    that compare siblings all of a group's; whitened ones, GAE and centre=type need the whole batch,
    or each rank's share of it: then all ranks must call this. types: of the field.
    """
    whole_batch = partial(whiten, total=partial(ranks.total, place="whitening advantages"))
    algorithm = cfg.algorithm
    lengths = torch.tensor([s.length for s in samples], device=scores.logprobs.device)
    extra = token_rewards(cfg, samples, scores, lengths, types, ranks)
    rewards = torch.zeros_like(extra) if credits_tokens(cfg) else extra.clone()
    rewards[lengths.cumsum(0) - 1] += torch.tensor(
        [s.outcome_credit for s in samples], dtype=extra.dtype, device=extra.device
    )
    if algorithm.kl.coef > 0 and algorithm.kl.place == "reward":
        assert scores.ref_logprobs is not None
        rewards -= algorithm.kl.coef * kl_estimate(
            scores.logprobs, scores.ref_logprobs, algorithm.kl.estimator
        )
    if algorithm.advantage == "gae":
        assert scores.values is not None
        advantages, returns = gae(
            rewards, scores.values, lengths, algorithm.gamma, algorithm.gae_lambda
        )
        return Credit(poison("advantage", whole_batch(advantages)), extra, returns)
    advantages = rewards_to_go(rewards, lengths, algorithm.gamma)
    if credits_tokens(cfg):
        advantages = advantages + extra
    return Credit(
        poison(
            "advantage",
            whole_batch(advantages) if algorithm.advantage == "whitened" else advantages,
        ),
        extra,
    )


def keep_step(cfg: Config, ranks: Ranks) -> None:
    """What a rank without a single sample does while the others assign credit."""
    if cfg.algorithm.advantage in ("whitened", "gae"):
        whiten(torch.zeros(0), total=partial(ranks.total, place="whitening advantages"))
    if _centres_types(cfg):
        ranks.sum({}, CENTRING)


def credits_tokens(cfg: Config) -> bool:
    """Whether token rewards are advantages of their own token."""
    how = cfg.flow.reward if cfg.flow is not None else cfg.shaping.likelihood
    return how is not None and how.credit == "token"


def token_rewards(
    cfg: Config,
    samples: Sequence[Sample],
    scores: Scores,
    lengths: Tensor,
    types: TokenTypes | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Rewards of single tokens: of the flow, of likelihood shaping, or zeros. [N]. With centre=type
    all ranks must call this.
    """
    if cfg.flow is not None and scores.straying is not None and scores.valid is not None:
        later = cfg.flow.sides[0][1] if cfg.flow.reward.at == "context" else 0
        return _charged(
            scores.straying, scores.valid, lengths, cfg.flow.reward, samples, ranks, types, later
        )
    if (likelihood := cfg.shaping.likelihood) is not None:
        signal = likelihood_scores(scores.logprobs, scores.entropy, likelihood.signal)
        return -likelihood.sign * _charged(
            signal, torch.ones_like(signal, dtype=torch.bool), lengths, likelihood, samples, ranks
        )
    return torch.zeros_like(scores.logprobs)


def _charged(
    scores: Tensor,
    valid: Tensor,
    lengths: Tensor,
    cfg: TokenRewardConfig,
    samples: Sequence[Sample],
    ranks: Ranks,
    types: TokenTypes | None = None,
    later: int = 0,
) -> Tensor:
    """later: tokens by which the charge is moved on, from the target to its context."""
    siblings = None
    if cfg.normalise not in WITHIN_RESPONSE or cfg.credit == "token":
        group = torch.tensor([s.position for s in samples], device=scores.device).repeat_interleave(
            lengths
        )
        siblings = Siblings(
            group,
            torch.tensor([t for s in samples for t in s.rollout.token_ids], device=scores.device),
            types,
        )
    rewards = flow_reward(
        scores,
        valid,
        lengths,
        cfg.coef,
        cfg.normalise,
        cfg.threshold,
        cfg.top_k,
        cfg.gamma,
        siblings,
    )
    if later:
        rewards, valid = book_later(rewards, lengths, later), book_later(valid, lengths, later)
    if siblings is None or cfg.credit != "token" or cfg.coef == 0:
        return rewards
    if cfg.centre == "type":
        return centre_by_type(
            rewards, valid, siblings.token_ids, partial(ranks.sum, place=CENTRING)
        )
    return centre_in_group(rewards, valid, siblings.group)
