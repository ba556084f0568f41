"""Rollouts of a step, graded; with dynamic sampling, until enough groups have something to learn from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlfr_vlm.advantages import MIN_STD
from rlfr_vlm.config import Config
from rlfr_vlm.data.render import PromptSource
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade, stop_on_errors
from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.training.timing import timed
from rlfr_vlm.types import Outcome, RolloutGroup


@dataclass(frozen=True)
class GradedGroup:
    """The responses to one prompt and what each earned."""

    group: RolloutGroup
    outcomes: tuple[Outcome, ...]

    @property
    def informative(self) -> bool:
        """Whether its rewards differ by more than rounding: equal ones give no advantage."""
        rewards = [o.reward for o in self.outcomes if o.graded]
        return len(rewards) > 1 and statistics.stdev(rewards) > MIN_STD


@dataclass(frozen=True)
class Collected:
    """A step's groups."""

    kept: tuple[GradedGroup, ...]  # what the update learns from
    sampled: tuple[GradedGroup, ...]  # everything, for unbiased figures
    rounds: int

    @property
    def groups(self) -> list[RolloutGroup]:
        """Groups of the update."""
        return [g.group for g in self.kept]

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of the update's responses, in order."""
        return [o for g in self.kept for o in g.outcomes]


def collect(
    cfg: Config, engine: RolloutEngine, prompts: PromptSource, grader: Grader, step: int, clock: dict[str, float] | None = None
) -> Collected:
    """Sample G responses to each of `num_prompts` prompts and verify them.

    With `rollout.max_rounds` above 1 (dynamic sampling, DAPO, arXiv:2503.14476), groups whose rewards are all equal are replaced by
    groups of further prompts; where the last round still leaves too few, the flat ones fill up. A run never stops for want of difficulty.
    """
    wanted, rounds = cfg.rollout.num_prompts, cfg.rollout.max_rounds
    lenient = cfg.reward.model_copy(update={"max_error_frac": 1.0})  # a round may be small: errors are counted over the step
    sampled: list[GradedGroup] = []
    missing, done = wanted, 0
    while missing and done < rounds:
        with timed("rollout", clock):
            groups = engine.sample(prompts.next(missing), sampling(cfg, step, done))
        faultpoint("rollout")
        with timed("reward", clock):
            outcomes = grade(groups, lenient, grader, cfg.rollout.max_new_tokens)
        sampled += _graded(groups, outcomes)
        missing = wanted - sum(g.informative for g in sampled)
        done += 1
    rollouts = [rollout for g in sampled for rollout in g.group.rollouts]
    stop_on_errors([o for g in sampled for o in g.outcomes], rollouts, cfg.reward.max_error_frac)
    flat = [g for g in sampled if not g.informative][: max(0, missing)]
    kept = tuple(sampled) if rounds == 1 else tuple(g for g in sampled if g.informative or any(g is f for f in flat))
    return Collected(kept, tuple(sampled), done)


def _graded(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome]) -> list[GradedGroup]:
    remaining = iter(outcomes)
    return [GradedGroup(group, tuple(next(remaining) for _ in group.rollouts)) for group in groups]


def sampling(cfg: Config, step: int, further_round: int = 0) -> SamplingConfig:
    """How a step samples; every request's seed is a hash of (run seed, step, prompt id, sample index), and of the round after the first."""
    rollout = cfg.rollout
    return SamplingConfig(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
        seed_key=(cfg.seed, step, further_round) if further_round else (cfg.seed, step),
    )
