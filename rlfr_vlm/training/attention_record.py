"""Where the policy looked in the pictures of a step's first groups: for the record, and for nothing
that learns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlfr_vlm.batch import AttentionRecord, GradedGroup
from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.flow.latents import resolve_layers
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.learner.microbatches import synchronised
from rlfr_vlm.models.attribution import attribute
from rlfr_vlm.training.timing import timed


def record_attention(
    cfg: Config,
    learner: Learner,
    groups: Sequence[GradedGroup],
    clock: dict[str, float] | None = None,
) -> AttentionRecord:
    """One more forward of the first `train.log_attention` groups with pictures among those that are
    logged, by the policy as it is.

    Before the step's update that is the policy that sampled (with rollouts a step ahead, the one
    after it). All ranks must call it; each gets what is its own.
    """
    policy, ranks = learner.policy, learner.ranks
    if not (cfg.train.log_attention and cfg.train.log_rollouts and policy.processor is not None):
        return {}
    with timed("attention", clock):
        found = ranks.merge(
            [(g.position, bool(g.group.prompt.vision)) for g in groups],
            "groups whose attention is logged",
        )
        pictured = [
            position for position, pictures in sorted(found)[: cfg.train.log_rollouts] if pictures
        ]
        chosen = set(pictured[: cfg.train.log_attention])
        own = [
            (g.position, rollout)
            for g in groups
            if g.position in chosen
            for rollout in g.group.rollouts
        ]
        fractions = (cfg.flow or FlowConfig()).layers
        layers = resolve_layers(fractions, len(policy.layers))
        record: AttentionRecord = {}
        for part in synchronised(
            [rollout for _, rollout in own], cfg.train.tokens_per_microbatch, policy, ranks
        ):
            rows = [own[i] for i in part.rows]
            attributions = attribute(policy, part.batch, [rollout for _, rollout in rows], layers)
            for (position, rollout), attribution in zip(rows, attributions, strict=True):
                if attribution is not None:
                    record[position, rollout.sample_index] = attribution.encoded()
    return record
