"""One batch of samples -> one optimiser step of the policy, and one of the flow field."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from rlfr_vlm.algorithm.objective import objective
from rlfr_vlm.batch import Credit, Sample, Scores, TokenRecord, UpdateSize
from rlfr_vlm.config import Config
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.faults import faultpoint, poison
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.sketch import sketch_latents
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.learner.microbatches import synchronised
from rlfr_vlm.models.heads import ValueHead
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.training.follow import Following, moved
from rlfr_vlm.training.metrics import UpdateMetrics
from rlfr_vlm.training.not_finite import in_microbatch
from rlfr_vlm.training.scoring import forward, known_or_scored
from rlfr_vlm.training.timing import timed
from rlfr_vlm.types import PolicyOutput


def update(
    cfg: Config,
    learner: Learner,
    samples: Sequence[Sample],
    train_policy: bool = True,
    clock: dict[str, float] | None = None,
) -> tuple[dict[str, float], list[TokenRecord]]:
    """One optimiser step of the policy (unless told not to) and one of the field on these samples,
    micro-batch by micro-batch.

    The result does not depend on how the samples fall into micro-batches. Returns metrics and, per
    sample, what its tokens got.
    """
    ranks = learner.ranks
    size = update_size(samples, ranks)
    metrics, records = UpdateMetrics(cfg, size), list[TokenRecord]()
    following = Following.of(cfg, learner, samples, size, metrics)
    problem: NonFiniteError | None = None
    for part in synchronised(
        [s.rollout for s in samples], cfg.train.tokens_per_microbatch, learner.policy, ranks
    ):
        chosen = [samples[i] for i in part.rows]
        with torch.set_grad_enabled(train_policy):
            output = forward(cfg, learner, part.batch)
        if not chosen:
            # Other ranks have more: sharded weights are gathered by all of them, backwards too.
            if train_policy:
                learner.optimizer.backward(0.0 * output.logprobs.sum())
            continue
        scores, credit = known_or_scored(cfg, learner, part.batch, output, chosen, clock)
        if train_policy:
            found = _policy_gradient(cfg, learner, output, scores, credit, chosen, metrics)
            problem = problem or found
        if following is not None and output.latents is not None:
            with timed("flow_update", clock):
                seen = following.see(part.rows, chosen, output.latents, scores)
            problem = problem or seen
        metrics.add_tokens(chosen, scores, credit)
        records += _records(
            chosen, scores, credit, output.latents, cfg.shaping.likelihood is not None
        )
    ranks.agree(problem, "losses of the update")  # before any weight moves
    result = metrics.result(ranks)
    if following is not None:
        following.drop_absent(result)
    result |= _policy_step(learner, train_policy)
    if following is not None:
        with timed("flow_update", clock):
            result |= following.step()
        result |= following.drift()
    return result, records


def update_size(samples: Sequence[Sample], ranks: Ranks) -> UpdateSize:
    """Of all ranks' samples: every mean divides by the whole update's, never a micro-batch's."""
    own = [sum(s.length for s in samples), len(samples)]
    num_tokens, num_sequences = ranks.total(own, "size of the update")
    return UpdateSize(int(num_tokens), int(num_sequences))


def _policy_gradient(
    cfg: Config,
    learner: Learner,
    output: PolicyOutput,
    scores: Scores,
    credit: Credit,
    samples: Sequence[Sample],
    metrics: UpdateMetrics,
) -> NonFiniteError | None:
    """Add this micro-batch's share of the gradient and of the metrics. Returns what is not finite
    in it.
    """
    loss, found = objective(cfg, learner.head, output, scores, credit, samples, metrics.size)
    problem = in_microbatch(output, scores, credit, samples, loss)
    output.logprobs.register_hook(partial(poison, "gradient"))
    learner.optimizer.backward(loss)
    faultpoint("backward")
    metrics.add({name: value.item() for name, value in found.items()})
    return problem


def _policy_step(learner: Learner, train_policy: bool) -> dict[str, float]:
    """Steps of the policy's optimiser and its head's. Returns rates, gradient norms and how far
    weights moved.
    """
    metrics: dict[str, float] = {}
    before = learner.optimizer.sample()
    if train_policy:
        head = "critic" if isinstance(learner.head, ValueHead) else "flowrl"
        for name, optimizer in (("actor", learner.optimizer), (head, learner.head_optimizer)):
            if optimizer is not None:
                metrics[f"{name}/lr"] = optimizer.current_lr
                metrics[f"{name}/grad_norm"] = optimizer.step()
        learner.policy.version += 1
        metrics["actor/update_ratio"] = moved(before, learner.optimizer.sample(), learner.ranks)
        first = next(p for p in learner.policy.model.parameters() if p.requires_grad)
        with torch.no_grad():
            first.copy_(poison("parameter", first))  # nothing happens where it is the same tensor
    faultpoint("step")
    return metrics


def _records(
    samples: Sequence[Sample], scores: Scores, credit: Credit, latents: Latents | None, shaped: bool
) -> list[TokenRecord]:
    sizes = [s.length for s in samples]
    zeros = torch.zeros_like(scores.entropy)
    with_flow = scores.straying is not None
    all_columns = (
        credit.advantages,
        credit.token_rewards,
        scores.straying if with_flow else zeros,
        scores.entropy,
    )
    columns = [column.cpu().split(sizes) for column in all_columns if column is not None]
    sketches = [None] * len(samples) if latents is None else sketch_latents(latents, sizes).tolist()
    return [
        TokenRecord(
            a.tolist(),
            r.tolist() if with_flow or shaped else None,
            d.tolist() if with_flow else None,
            e.tolist(),
            sketch,
        )
        for a, r, d, e, sketch in zip(*columns, sketches, strict=True)
    ]
