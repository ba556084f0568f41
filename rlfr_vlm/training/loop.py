"""The algorithm: GRPO with flow rewards (RLFR, arXiv:2510.10201)."""

from __future__ import annotations

from itertools import pairwise

from rlfr_vlm.config import Config
from rlfr_vlm.data.render import PromptSource
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade
from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.training.run import Run, timed
from rlfr_vlm.training.update import Learner, Sample, make_samples, score_samples, update


def train(cfg: Config, learner: Learner, engine: RolloutEngine, prompts: PromptSource, grader: Grader, run: Run) -> None:
    """Group-relative policy optimisation with flow rewards; resumes from the run's newest good checkpoint."""
    for step in range(run.restore(learner, prompts) + 1, cfg.train.steps + 1):
        with timed("step") as clock:
            # 1. Sample G responses to each prompt from the current policy.
            with timed("sync", clock):
                engine.load_weights(learner.policy)
            with timed("rollout", clock):
                groups = engine.sample(prompts.next(cfg.rollout.num_prompts), sampling(cfg, step))
            faultpoint("rollout")

            # 2. Verify the answers: one outcome per response, normalised within its group.
            with timed("reward", clock):
                outcomes = grade(groups, cfg.reward, grader, cfg.rollout.max_new_tokens)
            samples = make_samples(groups, outcomes, cfg.seed, step)
            faultpoint("reward")

            # 3. Old log-probs and deviations from the flow; with one on-policy update, its own forward gives them.
            if cfg.algorithm.updates_per_rollout > 1:
                with timed("score", clock):
                    samples = score_samples(cfg, learner, samples)

            # 4. Clipped policy updates; the flow follows the latents of correct responses only.
            with timed("update", clock):
                results = [update(cfg, learner, part) for part in split(samples, cfg.algorithm.updates_per_rollout)]

        run.log(step, groups, outcomes, samples, results, clock)
        if run.due(step, cfg.train.save_steps):
            run.save(step, learner, prompts)
        if run.due(step, cfg.eval.every):
            engine.load_weights(learner.policy)
            run.evaluate(step, engine)
        run.stop_if_asked(step, learner, prompts)


def sampling(cfg: Config, step: int) -> SamplingConfig:
    """How this step samples; every request's seed is a hash of (run seed, step, prompt id, sample index)."""
    rollout = cfg.rollout
    return SamplingConfig(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
        seed_key=(cfg.seed, step),
    )


def split(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Contiguous shares of nearly equal size, none of them empty."""
    bounds = [len(samples) * i // parts for i in range(parts + 1)]
    return [samples[a:b] for a, b in pairwise(bounds) if b > a]
