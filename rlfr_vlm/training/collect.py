"""Rollouts of a step, graded; with dynamic sampling, until enough groups have something to learn from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlfr_vlm.advantages import MIN_STD
from rlfr_vlm.config import Config
from rlfr_vlm.data.render import PromptSource
from rlfr_vlm.errors import NonFiniteError, UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade, reasons, stop_on_errors
from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.training.timing import timed
from rlfr_vlm.types import Outcome, Rollout, RolloutGroup

NAMED = 8  # responses in a message


@dataclass(frozen=True)
class GradedGroup:
    """The responses to one prompt and what each earned."""

    group: RolloutGroup
    outcomes: tuple[Outcome, ...]
    position: int = 0  # among all groups of the step, whichever rank has them

    @property
    def informative(self) -> bool:
        """Whether its rewards differ by more than rounding: equal ones give no advantage."""
        return _differ([o.reward for o in self.outcomes if o.graded])

    @property
    def mixed(self) -> bool:
        """Whether some of its graded answers are right and some wrong, 0 < right < G (DAPO, arXiv:2503.14476, eq. 11).

        With `reward.function`, which may know more than right and wrong, whether its scores differ. Format and length do not count.
        """
        return _differ([o.parts.get("function", float(o.correct)) for o in self.outcomes if o.graded])


def _differ(values: Sequence[float]) -> bool:
    return len(values) > 1 and statistics.stdev(values) > MIN_STD


@dataclass(frozen=True)
class Collected:
    """A step's groups: this rank's share of them."""

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

    @property
    def positions(self) -> list[int]:
        """Places of these groups in the whole step."""
        return [g.position for g in self.kept]


def collect(
    cfg: Config,
    engine: RolloutEngine,
    prompts: PromptSource,
    grader: Grader,
    step: int,
    clock: dict[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> Collected:
    """Sample G responses to each of `num_prompts` prompts and verify them; each rank does its share.

    With `rollout.max_rounds` above 1 (dynamic sampling, DAPO, arXiv:2503.14476), groups that are all right or all wrong are replaced by
    groups of further prompts; where the last round still leaves too few, some of them fill up. A run never stops for want of difficulty.
    """
    wanted, rounds = cfg.rollout.num_prompts, cfg.rollout.max_rounds
    sampled: list[GradedGroup] = []
    mixed: list[bool] = []  # of all groups so far, by position
    failed: list[str] = []
    missing, done = wanted, 0
    while missing and done < rounds:
        positions = [len(mixed) + place for place in ranks.places(missing)]
        found, problem = _round(cfg, engine, prompts, grader, step, done, missing, positions, clock)
        ranks.agree(problem, f"rollouts of step {step}")
        sampled += found
        own = ([(g.position, g.mixed) for g in found], reasons([g.group for g in found], [o for g in found for o in g.outcomes]))
        for _, errors in (parts := ranks.gather(own, f"rewards of step {step}")):
            failed += errors
        mixed += [flag for _, flag in sorted(pair for flags, _ in parts for pair in flags)]
        missing = wanted - sum(mixed)
        done += 1
    stop_on_errors(failed, len(mixed) * cfg.rollout.group_size, cfg.reward.max_error_frac)
    uniform = {position for position, flag in enumerate(mixed) if not flag}
    fillers = set(sorted(uniform)[: max(0, missing)])
    kept = tuple(sampled) if rounds == 1 else tuple(g for g in sampled if g.mixed or g.position in fillers)
    return Collected(kept, tuple(sampled), done)


def _round(
    cfg: Config,
    engine: RolloutEngine,
    prompts: PromptSource,
    grader: Grader,
    step: int,
    done: int,
    count: int,
    positions: Sequence[int],
    clock: dict[str, float] | None,
) -> tuple[list[GradedGroup], UserError | None]:
    """One round of sampling and grading of this rank's share, or what went wrong: the other ranks must hear of it."""
    lenient = cfg.reward.model_copy(update={"max_error_frac": 1.0})  # a round may be small: errors are counted over the step
    drawn = prompts.next(count)
    try:
        with timed("rollout", clock):
            groups = engine.sample(drawn, sampling(cfg, step, done))
        faultpoint("rollout")
        with timed("reward", clock):
            outcomes = grade(groups, lenient, grader, cfg.rollout.max_new_tokens)
        check_finite(groups, outcomes)
    except UserError as error:
        return [], error
    remaining = iter(outcomes)
    return [
        GradedGroup(group, tuple(next(remaining) for _ in group.rollouts), position)
        for group, position in zip(groups, positions, strict=True)
    ], None


def check_finite(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome]) -> None:
    """Raises NonFiniteError naming the responses whose log-probs by the engine, or rewards, are not finite: weights may be, or a reward."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if unsure := [rollout for rollout in rollouts if not all(map(math.isfinite, rollout.logprobs))]:
        raise not_finite_of("the engine's log-probs", unsure)
    if wrong := [rollout for rollout, outcome in zip(rollouts, outcomes, strict=True) if not math.isfinite(outcome.reward)]:
        raise not_finite_of("the rewards", wrong)


def not_finite_of(what: str, rollouts: Sequence[Rollout]) -> NonFiniteError:
    """What to say of responses, as PROMPT#SAMPLE."""
    named = [f"{rollout.prompt.prompt.id}#{rollout.sample_index}" for rollout in rollouts]
    more = f" and {len(named) - NAMED} more" * (len(named) > NAMED)
    return NonFiniteError(f"not finite: {what} of response{'s' * (len(named) > 1)} {', '.join(named[:NAMED])}{more}")


def sampling(cfg: Config, step: int, further_round: int = 0) -> SamplingConfig:
    """How a step samples; every request's seed is a hash of (run seed, step, prompt id, sample index), and of the round after the first."""
    rollout = cfg.rollout
    return SamplingConfig(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
        seed_key=(cfg.run_seed, step, further_round) if further_round else (cfg.run_seed, step),
    )
