"""One batch of samples -> one optimiser step of the policy, and one of the flow field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from rlfr_vlm.config import Config, FlowOnlineConfig
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.faults import faultpoint, poison
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.reward import TokenTypes
from rlfr_vlm.flow.sketch import sketch_latents
from rlfr_vlm.models.heads import ValueHead
from rlfr_vlm.models.pack import PackedBatch
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.training.collect import not_finite_of
from rlfr_vlm.training.credit import Credit, Sample, Scores, assign_credit, join, keep_step, split
from rlfr_vlm.training.figures import Figures
from rlfr_vlm.training.latent_window import LOSSES, NORMS, LatentWindow, follow
from rlfr_vlm.training.microbatches import in_step
from rlfr_vlm.training.objective import UpdateSize, objective
from rlfr_vlm.training.optim import PolicyOptimizer
from rlfr_vlm.training.timing import timed
from rlfr_vlm.types import PolicyOutput

TOO_FAST = "the field or the policy's latents are broken; lower flow.online.lr"


@dataclass(frozen=True)
class TokenRecord:
    """What became of a response's tokens, for the page of rollouts."""

    advantages: list[float]
    flow_rewards: list[float] | None  # or those of likelihood shaping
    deviations: list[float] | None  # with a contrast, less those from it: what is charged for
    entropy: list[float]
    latent: list[float] | None = None  # [64], of the whole response: see flow/sketch.py


@dataclass(frozen=True)
class Learner:
    """Everything that learns, and the reference that does not."""

    policy: Policy
    optimizer: PolicyOptimizer
    field: FlowField | None = None
    flow_optimizer: PolicyOptimizer | None = None  # None: the field is frozen
    reference: Policy | None = None
    head: nn.Module | None = None  # of values (PPO), or log Z (FlowRL)
    head_optimizer: PolicyOptimizer | None = None
    contrast_optimizer: PolicyOptimizer | None = None  # of the field's contrast
    window: LatentWindow | None = None  # what the field learns from in small steps; None: each update's own latents
    field_start: Tensor | None = None  # a sample of the field's weights as the run began with them
    ranks: Ranks = ALONE  # who learns together: each has its share of every batch

    @property
    def optimizers(self) -> dict[str, PolicyOptimizer]:
        """Those that there are, by the name under which a checkpoint holds them."""
        every = {"optimizer": self.optimizer, "flow_optimizer": self.flow_optimizer, "head_optimizer": self.head_optimizer}
        every["contrast_optimizer"] = self.contrast_optimizer
        return {name: optimizer for name, optimizer in every.items() if optimizer is not None}

    @property
    def field_optimizers(self) -> dict[str, PolicyOptimizer]:
        """Of the field's networks that learn, by their names."""
        every = {"network": self.flow_optimizer, "contrast": self.contrast_optimizer}
        return {name: optimizer for name, optimizer in every.items() if optimizer is not None}

    @property
    def token_types(self) -> TokenTypes | None:
        """Of the field."""
        return None if self.field is None else self.field.types


def score_samples(cfg: Config, learner: Learner, samples: Sequence[Sample], clock: dict[str, float] | None = None) -> list[Sample]:
    """One frozen pass over the batch and the credit that follows from it: for several updates on one batch, and for whole-batch advantages."""
    parts: list[Scores] = []
    with torch.no_grad():
        for part in in_step([s.rollout for s in samples], cfg.train.tokens_per_microbatch, learner.policy, learner.ranks):
            output = _forward(cfg, learner, part.batch)
            if part.rows:
                parts.append(_scores(cfg, learner, part.batch, output, [samples[i] for i in part.rows], clock))
        if not samples:
            keep_step(cfg, learner.ranks)
            return []
        scores = join(parts)
        credit = assign_credit(cfg, samples, scores, learner.ranks, learner.token_types)
    sizes = [s.length for s in samples]
    return [
        replace(sample, scores=own, credit=due)
        for sample, own, due in zip(samples, split(scores, sizes), split(credit, sizes), strict=True)
    ]


def _forward(cfg: Config, learner: Learner, batch: PackedBatch) -> PolicyOutput:
    request = learner.field.request if learner.field is not None else None
    means = cfg.algorithm.loss == "flowrl"
    return learner.policy.forward(batch, cfg.rollout.temperature, request, with_entropy=True, with_prompt_means=means)


@torch.no_grad()
def _scores(
    cfg: Config, learner: Learner, batch: PackedBatch, output: PolicyOutput, samples: Sequence[Sample], clock: dict[str, float] | None
) -> Scores:
    """Scores from a forward of the policy as it is."""
    assert output.entropy is not None
    scores = Scores(poison("old_logprob", output.logprobs.detach()), output.entropy)
    if learner.reference is not None:
        with timed("reference", clock):
            scores = replace(scores, ref_logprobs=learner.reference.forward(batch, cfg.rollout.temperature).logprobs)
    if learner.head is not None and cfg.algorithm.advantage == "gae":
        scores = replace(scores, values=learner.head(output.hidden))
    if learner.field is not None and output.latents is not None and cfg.flow is not None:
        with timed("flow_score", clock):
            seeds = [s.seed for s in samples]
            sizes = [s.length for s in samples]
            deviations, contrast = learner.field.score_both(output.latents, sizes, seeds, cfg.flow.reward.draws)
        scores = replace(scores, deviations=deviations, contrast=contrast, valid=output.latents.scorable)
    return scores


def flow_weights(
    cfg: FlowOnlineConfig, samples: Sequence[Sample], ranks: Ranks = ALONE, contrast: Literal["none", "own", "wrong"] = "none"
) -> list[float]:
    """Weight of each response in the online flow update: selected ones share 1, the others count `soft_weight` (rejection sampling).

    contrast: the weights are those for the field's contrast, which follows all responses (own), or those that are not correct.
    """
    raw = [1.0 if s.outcome.correct or "correct" not in cfg.select else cfg.soft_weight for s in samples]
    if contrast != "none":
        raw = [float(contrast == "own" or not s.outcome.correct) for s in samples]
    (total,) = ranks.total([sum(raw)], "weights of the flow update")
    return [w / total for w in raw] if total > 0 else raw


def flow_token_weights(cfg: FlowOnlineConfig, weights: Sequence[float], lengths: Sequence[int], valid: Tensor, entropy: Tensor) -> Tensor:
    """A response's weight shared out over its tokens that have a context; by entropy, mostly over those at or above its quantile.

    sum_t w_t m_t l_t / sum_t w_t m_t for each response, w_t = 1 or soft_weight (arXiv:2510.10201).
    weights: one per response; valid, entropy: [N]. Returns [N] float32.
    """
    parts = []
    for weight, mask, values in zip(weights, valid.split(list(lengths)), entropy.split(list(lengths)), strict=True):
        share = mask.float()
        if "entropy" in cfg.select and bool(mask.any()):
            low = values < values[mask].quantile(cfg.entropy_quantile)
            share = torch.where(low, share * cfg.soft_weight, share)
        parts.append(share * (weight / share.sum().clamp(min=1e-12)))
    return torch.cat(parts)


def update(
    cfg: Config, learner: Learner, samples: Sequence[Sample], train_policy: bool = True, clock: dict[str, float] | None = None
) -> tuple[dict[str, float], list[TokenRecord]]:
    """One optimiser step of the policy (unless told not to) and one of the field on these samples, micro-batch by micro-batch.

    The result does not depend on how the samples fall into micro-batches. Returns metrics and, per sample, what its tokens got.
    """
    ranks = learner.ranks
    num_tokens, num_sequences = ranks.total([sum(s.length for s in samples), len(samples)], "size of the update")
    size = UpdateSize(int(num_tokens), int(num_sequences))
    online: dict[str, list[float]] = {}
    if cfg.flow is not None:
        for name in learner.field_optimizers:
            online[name] = flow_weights(cfg.flow.online, samples, ranks, cfg.flow.contrast if name == "contrast" else "none")
    figures = Figures(cfg, size)
    if "network" in online and cfg.flow is not None:
        right = sum(s.outcome.correct or "correct" not in cfg.flow.online.select for s in samples)
        figures.add({"flow/selected_frac": right / size.num_sequences})
    records: list[TokenRecord] = []
    problem: NonFiniteError | None = None
    followed = dict.fromkeys(online, 0.0)  # weight of the tokens that each network learns from
    for part in in_step([s.rollout for s in samples], cfg.train.tokens_per_microbatch, learner.policy, ranks):
        chosen, batch = [samples[i] for i in part.rows], part.batch
        with torch.set_grad_enabled(train_policy):
            output = _forward(cfg, learner, batch)
        if not chosen:  # other ranks have more
            if train_policy:
                learner.optimizer.backward(0.0 * output.logprobs.sum())
            continue
        stored = [s.scores for s in chosen if s.scores is not None]
        scores = join(stored) if stored else _scores(cfg, learner, batch, output, chosen, clock)
        due = [s.credit for s in chosen if s.credit is not None]
        credit = join(due) if due else assign_credit(cfg, chosen, scores, types=learner.token_types)
        if train_policy:
            loss, metrics = objective(cfg, learner.head, output, scores, credit, chosen, size)
            problem = problem or not_finite_here(output, scores, credit, chosen, loss)
            output.logprobs.register_hook(partial(poison, "gradient"))
            learner.optimizer.backward(loss)
            faultpoint("backward")
            figures.add({name: value.item() for name, value in metrics.items()})
        if online and learner.field is not None and output.latents is not None and cfg.flow is not None:
            sizes, seeds = [s.length for s in chosen], [s.seed for s in chosen]
            with timed("flow_update", clock):
                if learner.window is not None:
                    learner.window.add(age(cfg, learner), output.latents, chosen, size.num_tokens)
                for name, weights in online.items() if learner.window is None else ():
                    own = [weights[i] for i in part.rows]
                    shares = flow_token_weights(cfg.flow.online, own, sizes, output.latents.scorable, scores.entropy)
                    network = learner.field.networks[name]
                    loss_here = learner.field.accumulate_gradient(output.latents, sizes, seeds, shares, cfg.flow.online.times, network)
                    if not math.isfinite(loss_here):
                        problem = problem or NonFiniteError(f"the flow loss is not finite: {TOO_FAST}")
                    followed[name] += shares.sum().item()
                    figures.add({LOSSES[name]: loss_here})
        figures.add_tokens(chosen, scores, credit)
        records += _records(chosen, scores, credit, output.latents, cfg.shaping.likelihood is not None)
    ranks.agree(problem, "losses of the update")
    result = figures.result(ranks)
    if online and learner.window is None:
        totals = ranks.total(list(followed.values()), "tokens that the flow follows")
        selected = {name: total > 0 for name, total in zip(followed, totals, strict=True)}
        for name, found in selected.items():
            if not found:  # where nothing selected has a context there is no loss, not a loss of 0
                result.pop(LOSSES[name], None)
        return {**result, **_step(cfg, learner, train_policy, selected, clock)}, records
    return {**result, **_step(cfg, learner, train_policy, {}, clock)}, records


def age(cfg: Config, learner: Learner) -> int:
    """Updates that the field has followed in small steps."""
    assert cfg.flow is not None
    return max(optimizer.steps for optimizer in learner.field_optimizers.values()) // cfg.flow.online.updates


def not_finite_here(output: PolicyOutput, scores: Scores, credit: Credit, samples: Sequence[Sample], loss: Tensor) -> NonFiniteError | None:
    """The first column of a micro-batch, in the order in which they come to be, that is not finite, and the responses to blame."""
    columns = {
        "the log-probs": output.logprobs.detach(),
        "the old log-probs": scores.logprobs,
        "the reference's log-probs": scores.ref_logprobs,
        "the values": scores.values,
        f"the deviations from the flow ({TOO_FAST})": scores.straying,
        "the token rewards": credit.token_rewards,
        "the advantages": credit.advantages,
        "the returns": credit.returns,
    }
    present = {what: column for what, column in columns.items() if column is not None}
    good = torch.stack([*(column.isfinite().all() for column in present.values()), loss.isfinite()]).tolist()
    if all(good):
        return None
    for (what, column), fine in zip(present.items(), good, strict=False):
        if not fine:
            parts = column.split([s.length for s in samples])
            return not_finite_of(what, [s.rollout for s, part in zip(samples, parts, strict=True) if not bool(part.isfinite().all())])
    return not_finite_of("the policy loss", [s.rollout for s in samples])


def _step(cfg: Config, learner: Learner, train_policy: bool, selected: dict[str, bool], clock: dict[str, float] | None) -> dict[str, float]:
    """The optimisers' steps; without a selected response the field only gets older. Returns rates, gradient norms and how far weights moved."""
    figures: dict[str, float] = {}
    before = learner.optimizer.sample()
    if train_policy:
        head = "critic" if isinstance(learner.head, ValueHead) else "flowrl"
        for name, optimizer in (("actor", learner.optimizer), (head, learner.head_optimizer)):
            if optimizer is not None:
                figures[f"{name}/lr"] = optimizer.current_lr
                figures[f"{name}/grad_norm"] = optimizer.step()
        learner.policy.version += 1
        figures["actor/update_ratio"] = moved(before, learner.optimizer.sample(), learner.ranks)
        first = next(p for p in learner.policy.model.parameters() if p.requires_grad)
        with torch.no_grad():
            first.copy_(poison("parameter", first))  # nothing happens where it is the same tensor
    faultpoint("step")
    optimizers = learner.field_optimizers
    if optimizers:
        with timed("flow_update", clock):
            figures["flow/lr"] = next(iter(optimizers.values())).current_lr
            if learner.window is not None and learner.field is not None and cfg.flow is not None:
                figures |= follow(cfg.flow, learner.field, optimizers, learner.window, cfg.run_seed, age(cfg, learner), learner.ranks)
            else:
                for name, optimizer in optimizers.items():
                    figures[NORMS[name]] = optimizer.step() if selected[name] else optimizer.skip()
    if learner.flow_optimizer is not None and learner.field_start is not None:
        figures["flow/drift"] = moved(learner.field_start, learner.flow_optimizer.sample(), learner.ranks)
    return figures


def moved(before: Tensor, after: Tensor, ranks: Ranks = ALONE) -> float:
    """||after - before|| / ||before|| over the samples of all ranks."""
    change, size = ranks.total([(after - before).square().sum().item(), before.square().sum().item()], "how far weights moved")
    return math.sqrt(change / size) if size > 0 else 0.0


def _records(samples: Sequence[Sample], scores: Scores, credit: Credit, latents: Latents | None, shaped: bool) -> list[TokenRecord]:
    sizes = [s.length for s in samples]
    zeros = torch.zeros_like(scores.entropy)
    with_flow = scores.straying is not None
    all_columns = (credit.advantages, credit.token_rewards, scores.straying if with_flow else zeros, scores.entropy)
    columns = [column.cpu().split(sizes) for column in all_columns if column is not None]
    sketches = [None] * len(samples) if latents is None else sketch_latents(latents, sizes).tolist()
    return [
        TokenRecord(a.tolist(), r.tolist() if with_flow or shaped else None, d.tolist() if with_flow else None, e.tolist(), sketch)
        for a, r, d, e, sketch in zip(*columns, sketches, strict=True)
    ]
