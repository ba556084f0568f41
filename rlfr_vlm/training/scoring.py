"""The frozen pass: what the tokens of a step's responses were worth to the policy that sampled
them, to the reference and to the flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlfr_vlm.algorithm.credit import assign_credit, keep_step
from rlfr_vlm.batch import Credit, Sample, Scores, join, split
from rlfr_vlm.config import Config
from rlfr_vlm.faults import poison
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.learner.microbatches import synchronised
from rlfr_vlm.models.pack import PackedBatch
from rlfr_vlm.training.timing import timed
from rlfr_vlm.types import PolicyOutput


def score_samples(
    cfg: Config, learner: Learner, samples: Sequence[Sample], clock: dict[str, float] | None = None
) -> list[Sample]:
    """One frozen pass over the batch and the credit that follows from it: for several updates on
    one batch, and for whole-batch advantages.
    """
    parts: list[Scores] = []
    with torch.no_grad():
        for part in synchronised(
            [s.rollout for s in samples],
            cfg.train.tokens_per_microbatch,
            learner.policy,
            learner.ranks,
        ):
            output = forward(cfg, learner, part.batch)
            if part.rows:
                parts.append(
                    token_scores(
                        cfg, learner, part.batch, output, [samples[i] for i in part.rows], clock
                    )
                )
        if not samples:
            keep_step(cfg, learner.ranks)
            return []
        scores = join(parts)
        credit = assign_credit(cfg, samples, scores, learner.ranks, learner.token_types)
    sizes = [s.length for s in samples]
    return [
        replace(sample, scores=own, credit=due)
        for sample, own, due in zip(
            samples, split(scores, sizes), split(credit, sizes), strict=True
        )
    ]


def forward(cfg: Config, learner: Learner, batch: PackedBatch) -> PolicyOutput:
    """The policy's forward with whatever the objective, the field and the record ask for. [N]
    log-probs and entropy; latents detached.
    """
    request = learner.field.request if learner.field is not None else None
    means = cfg.algorithm.loss == "flowrl"
    return learner.policy.forward(
        batch, cfg.rollout.temperature, request, with_entropy=True, with_prompt_means=means
    )


@torch.no_grad()
def token_scores(
    cfg: Config,
    learner: Learner,
    batch: PackedBatch,
    output: PolicyOutput,
    samples: Sequence[Sample],
    clock: dict[str, float] | None,
) -> Scores:
    """Scores from a forward of the policy as it is."""
    assert output.entropy is not None
    scores = Scores(poison("old_logprob", output.logprobs.detach()), output.entropy)
    if learner.reference is not None:
        with timed("reference", clock):
            scores = replace(
                scores,
                ref_logprobs=learner.reference.forward(batch, cfg.rollout.temperature).logprobs,
            )
    if learner.head is not None and cfg.algorithm.advantage == "gae":
        scores = replace(scores, values=learner.head(output.hidden))
    if learner.field is not None and output.latents is not None and cfg.flow is not None:
        with timed("flow_score", clock):
            seeds = [s.seed for s in samples]
            sizes = [s.length for s in samples]
            deviations, contrast = learner.field.score_both(
                output.latents, sizes, seeds, cfg.flow.reward.draws
            )
        scores = replace(
            scores, deviations=deviations, contrast=contrast, valid=output.latents.scorable
        )
    return scores


def known_or_scored(
    cfg: Config,
    learner: Learner,
    batch: PackedBatch,
    output: PolicyOutput,
    samples: Sequence[Sample],
    clock: dict[str, float] | None,
) -> tuple[Scores, Credit]:
    """What the scoring pass left with the samples; with one on-policy update, where there is none,
    from the update's own forward.
    """
    stored = [s.scores for s in samples if s.scores is not None]
    scores = join(stored) if stored else token_scores(cfg, learner, batch, output, samples, clock)
    due = [s.credit for s in samples if s.credit is not None]
    return scores, join(due) if due else assign_credit(
        cfg, samples, scores, types=learner.token_types
    )
