"""The algorithm: policy optimisation with verifiable rewards and flow rewards (RLFR,
arXiv:2510.10201), and the methods beside it.
"""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

from rlfr_vlm.algorithm.credit import make_samples, needs_scoring
from rlfr_vlm.batch import Sample
from rlfr_vlm.config import Config
from rlfr_vlm.data.stream import PromptSource
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import RolloutEngine
from rlfr_vlm.run.run import Run
from rlfr_vlm.storage.state import generators_kept
from rlfr_vlm.training.attention_record import record_attention
from rlfr_vlm.training.rollouts import Rollouts
from rlfr_vlm.training.scoring import score_samples
from rlfr_vlm.training.timing import timed
from rlfr_vlm.training.update import update


def train(
    cfg: Config,
    learner: Learner,
    engine: RolloutEngine,
    prompts: PromptSource,
    grader: Grader,
    run: Run,
) -> None:
    """Group-relative policy optimisation with flow rewards; resumes from the run's newest good
    checkpoint.

    Every rank runs this on its share of each batch; sums go over all of them, so that the numbers
    are those of one process.
    """
    done = run.restore(learner, prompts)
    if run.owes_evaluation(done):
        evaluate(learner, engine, prompts, run, done)
    with closing(Rollouts(cfg, learner, engine, prompts, grader)) as rollouts, run.guarded():
        for step in range(done + 1, cfg.train.steps + 1):
            with timed("step") as clock:
                # 1. Sample G responses to each prompt from the current policy, and verify the
                # answers: one outcome per response.
                batch = rollouts.next(step, clock)

                # 2. What each outcome is worth: relative to its group, or as it is.
                samples = make_samples(
                    batch.groups, batch.outcomes, cfg.run_seed, step, cfg.algorithm, batch.positions
                )
                faultpoint("reward")

                # 3. Old log-probs, deviations from the flow, and credit; with one on-policy update,
                # its own forward gives them.
                if needs_scoring(cfg, samples, learner.ranks):
                    with timed("score", clock):
                        samples = score_samples(cfg, learner, samples, clock)

                # for the record: where in the pictures each token looked
                looks = record_attention(cfg, learner, batch.kept, clock)

                # 4. Policy updates; the flow follows the latents of selected responses, by default
                # the correct ones.
                with timed("update", clock):
                    parts = split_evenly(samples, cfg.algorithm.updates_per_rollout, learner.ranks)
                    results = [
                        update(cfg, learner, part, trains_policy(cfg, step), clock)
                        for part in parts
                    ]

            run.log(step, batch, samples, results, clock, looks)
            if run.due(step, cfg.train.save_steps):
                run.save(step, learner, prompts)
            if run.due(step, cfg.eval.every):
                rollouts.settle()
                evaluate(learner, engine, prompts, run, step)
            run.stop_if_asked(step, learner, prompts)


def evaluate(
    learner: Learner, engine: RolloutEngine, prompts: PromptSource, run: Run, step: int
) -> None:
    """Evaluate the policy as it is; the best checkpoint is kept."""
    engine.load_weights(learner.policy)
    faultpoint("eval")
    with generators_kept():
        score = run.evaluate(step, engine)
    run.keep_if_best(step, score, learner, prompts)
    engine.sleep()


def trains_policy(cfg: Config, step: int) -> bool:
    """False in the first steps where only the flow field learns."""
    return cfg.flow is None or step > cfg.flow.online.warmup_steps


def split_evenly(samples: list[Sample], parts: int, ranks: Ranks = ALONE) -> list[list[Sample]]:
    """Contiguous shares of the whole step's samples, of nearly equal size and none of them empty;
    of each share, those of this rank.
    """
    own = [(sample.position, sample.rollout.sample_index) for sample in samples]
    order = {key: i for i, key in enumerate(sorted(ranks.merge(own, "sharing out updates")))}
    bounds = [len(order) * i // parts for i in range(parts + 1)]
    shares = [range(a, b) for a, b in pairwise(bounds) if b > a]
    return [
        [sample for sample, key in zip(samples, own, strict=True) if order[key] in share]
        for share in shares
    ]
