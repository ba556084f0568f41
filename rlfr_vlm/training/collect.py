"""Rollouts of a step, graded; with dynamic sampling, until enough groups have something to learn
from.
"""

from __future__ import annotations

from rlfr_vlm.batch import Collected, GradedGroup
from rlfr_vlm.config import Config
from rlfr_vlm.data.stream import PromptSource
from rlfr_vlm.errors import UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade, reasons, stop_on_errors
from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.training.not_finite import check_rollouts
from rlfr_vlm.training.timing import timed


def collect(
    cfg: Config,
    engine: RolloutEngine,
    prompts: PromptSource,
    grader: Grader,
    step: int,
    clock: dict[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> Collected:
    """Sample G responses to each of `num_prompts` prompts and verify them; each rank does its
    share.

    With `rollout.max_rounds` above 1 (dynamic sampling, DAPO, arXiv:2503.14476), groups that are
    all right or all wrong are replaced by groups of further prompts; where the last round still
    leaves too few, some of them fill up. A run never stops for want of difficulty.
    """
    wanted, rounds = cfg.rollout.num_prompts, cfg.rollout.max_rounds
    sampled: list[GradedGroup] = []
    mixed: list[bool] = []  # of all groups so far, by position
    failed: list[str] = []
    missing, done = wanted, 0
    while missing and done < rounds:
        found, problem = _round(
            cfg, engine, prompts, grader, step, done, missing, len(mixed), ranks, clock
        )
        ranks.agree(problem, f"rollouts of step {step}")
        sampled += found
        own = (
            [(g.position, g.mixed) for g in found],
            reasons([g.group for g in found], [o for g in found for o in g.outcomes]),
        )
        for _, errors in (parts := ranks.gather(own, f"rewards of step {step}")):
            failed += errors
        mixed += [flag for _, flag in sorted(pair for flags, _ in parts for pair in flags)]
        missing = wanted - sum(mixed)
        done += 1
    stop_on_errors(failed, len(mixed) * cfg.rollout.group_size, cfg.reward.max_error_frac)
    uniform = {position for position, flag in enumerate(mixed) if not flag}
    fillers = set(sorted(uniform)[: max(0, missing)])
    kept = (
        tuple(sampled)
        if rounds == 1
        else tuple(g for g in sampled if g.mixed or g.position in fillers)
    )
    return Collected(kept, tuple(sampled), done)


def _round(
    cfg: Config,
    engine: RolloutEngine,
    prompts: PromptSource,
    grader: Grader,
    step: int,
    done: int,
    count: int,
    first: int,
    ranks: Ranks,
    clock: dict[str, float] | None,
) -> tuple[list[GradedGroup], UserError | None]:
    """One round of sampling and grading of this rank's share, or what went wrong: the other ranks
    must hear of it.
    """
    positions = [first + place for place in ranks.places(count)]
    # a round may be small: errors are counted over the step
    lenient = cfg.reward.model_copy(update={"max_error_frac": 1.0})
    drawn = prompts.next(count, ranks)
    try:
        with timed("rollout", clock):
            groups = engine.sample(drawn, sampling(cfg, step, done))
        faultpoint("rollout")
        with timed("reward", clock):
            outcomes = grade(groups, lenient, grader, cfg.rollout.max_new_tokens)
        check_rollouts(groups, outcomes)
    except UserError as error:
        return [], error
    remaining = iter(outcomes)
    return [
        GradedGroup(group, tuple(next(remaining) for _ in group.rollouts), position)
        for group, position in zip(groups, positions, strict=True)
    ], None


def sampling(cfg: Config, step: int, further_round: int = 0) -> SamplingConfig:
    """How a step samples; every request's seed is a hash of (run seed, step, prompt id, sample
    index), and of the round after the first.
    """
    rollout = cfg.rollout
    return SamplingConfig(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
        seed_key=(cfg.run_seed, step, further_round) if further_round else (cfg.run_seed, step),
    )
