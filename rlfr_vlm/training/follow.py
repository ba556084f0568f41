"""The online update of the flow field: it follows the latents of selected responses, by default the
correct ones (arXiv:2510.10201).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlfr_vlm.algorithm.selection import flow_token_weights, flow_weights
from rlfr_vlm.batch import Sample, Scores, UpdateSize
from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.stored import join_latents, small_tiles
from rlfr_vlm.learner.latent_window import Kept
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.learner.optim import PolicyOptimizer
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.training.metrics import UpdateMetrics
from rlfr_vlm.training.not_finite import TOO_FAST
from rlfr_vlm.types import request_seed

LOSSES = {
    "network": "flow/loss",
    "contrast": "flow/contrast_loss",
}  # names of metrics, by the field's networks
NORMS = {"network": "flow/grad_norm", "contrast": "flow/contrast_grad_norm"}


class Following:
    """What the field's networks learn in one update: from its own latents as published, or in small
    steps over those of the last updates.
    """

    def __init__(
        self,
        cfg: Config,
        flow: FlowConfig,
        field: FlowField,
        learner: Learner,
        samples: Sequence[Sample],
        size: UpdateSize,
        metrics: UpdateMetrics,
    ) -> None:
        """All ranks must call it. metrics: of the update, to which losses are added."""
        self.flow, self.field, self.learner = flow, field, learner
        self.size, self.seed, self.metrics = size, cfg.run_seed, metrics
        self.weights = {  # of each response, for each network that learns
            name: flow_weights(
                flow.online,
                samples,
                learner.ranks,
                flow.contrast if name == "contrast" else "none",
            )
            for name in learner.field_optimizers
        }
        # weight of the tokens that each network has learnt from
        self.followed = dict.fromkeys(self.weights, 0.0)
        self.selected = dict.fromkeys(self.weights, True)
        if learner.flow_optimizer is not None:
            count = sum(s.outcome.correct or "correct" not in flow.online.select for s in samples)
            metrics.add({"flow/selected_frac": count / size.num_sequences})

    @classmethod
    def of(
        cls,
        cfg: Config,
        learner: Learner,
        samples: Sequence[Sample],
        size: UpdateSize,
        metrics: UpdateMetrics,
    ) -> Following | None:
        """None where there is no field, or none that learns."""
        if cfg.flow is None or learner.field is None or not learner.field_optimizers:
            return None
        return cls(cfg, cfg.flow, learner.field, learner, samples, size, metrics)

    @property
    def updates(self) -> int:
        """Those that the field has followed in small steps before this one."""
        steps = max(optimizer.steps for optimizer in self.learner.field_optimizers.values())
        return steps // self.flow.online.updates

    def see(
        self, rows: Sequence[int], samples: Sequence[Sample], latents: Latents, scores: Scores
    ) -> NonFiniteError | None:
        """A micro-batch: its latents go into the window; without one, its share of the gradient is
        added. rows: which of the update's samples it has.
        """
        lengths, seeds = [s.length for s in samples], [s.seed for s in samples]
        if self.learner.window is not None:
            self.learner.window.add(self.updates, latents, samples, self.size.num_tokens)
            return None
        problem, online = None, self.flow.online
        for name, weights in self.weights.items():
            own = [weights[i] for i in rows]
            shares = flow_token_weights(online, own, lengths, latents.scorable, scores.entropy)
            network = self.field.networks[name]
            loss = self.field.accumulate_gradient(
                latents, lengths, seeds, shares, online.times, network
            )
            if not math.isfinite(loss):
                problem = problem or NonFiniteError(f"the flow loss is not finite: {TOO_FAST}")
            self.followed[name] += shares.sum().item()
            self.metrics.add({LOSSES[name]: loss})
        return problem

    def drop_absent(self, metrics: dict[str, float]) -> None:
        """Where nothing selected has a context there is no loss, not a loss of 0. All ranks must
        call it.
        """
        if self.learner.window is not None:
            return
        totals = self.learner.ranks.total(
            list(self.followed.values()), "tokens that the flow follows"
        )
        for name, total in zip(self.followed, totals, strict=True):
            self.selected[name] = total > 0
            if total <= 0:
                metrics.pop(LOSSES[name], None)

    def step(self) -> dict[str, float]:
        """The optimisers' steps; a network without anything to learn from only gets older. Returns
        rates and gradient norms.
        """
        optimizers = self.learner.field_optimizers
        metrics = {"flow/lr": next(iter(optimizers.values())).current_lr}
        if self.learner.window is not None:
            update = self.updates
            for name, optimizer in optimizers.items():
                metrics |= small_steps(
                    self.flow, self.field, name, optimizer, self.learner, self.seed, update
                )
            return metrics
        return metrics | {
            NORMS[name]: optimizer.step() if self.selected[name] else optimizer.skip()
            for name, optimizer in optimizers.items()
        }

    def drift(self) -> dict[str, float]:
        """How far the field's network is from where the run began with it."""
        optimizer, start = self.learner.flow_optimizer, self.learner.field_start
        if optimizer is None or start is None:
            return {}
        return {"flow/drift": moved(start, optimizer.sample(), self.learner.ranks)}


def small_steps(
    flow: FlowConfig,
    field: FlowField,
    name: str,
    optimizer: PolicyOptimizer,
    learner: Learner,
    seed: int,
    update: int,
) -> dict[str, float]:
    """Small steps of one of the field's networks over the window; each draws its tokens from those
    of all ranks. Returns metrics.

    What a small step computes does not depend on how responses are spread over ranks.
    """
    assert learner.window is not None
    online, network, ranks = flow.online, field.networks[name], learner.ranks
    own = [kept for kept in learner.window.kept if _learns_from(flow, name, kept)]
    where, total = _places(own, ranks)
    if not total:
        for _ in range(online.updates):
            optimizer.skip()
        return {}
    stored = join_latents([kept.stored for kept in own]) if own else None
    loss, norm = 0.0, 0.0
    for k in range(online.updates):
        key = request_seed("follow", seed, update, k, name)
        generator = torch.Generator().manual_seed(key)
        drawn = where[torch.randint(total, (online.batch_tokens,), generator=generator)]
        noise, here = field.draw(online.batch_tokens, key), drawn >= 0
        if stored is not None and bool(here.any()):
            own_noise = noise[:, here.to(noise.device)]
            for tile in small_tiles(field, stored.latents, drawn[here], own_noise):
                losses = field.losses(tile, online.times, network) * tile.share
                part = losses.sum() / online.batch_tokens
                part.backward()
                loss += part.item() / online.updates
        elif ranks.size > 1:
            # What meets at the step must have gone backwards on every rank.
            (0.0 * torch.stack([p.sum() for p in network.parameters()]).sum()).backward()
        norm = optimizer.step()
    return ranks.sum({LOSSES[name]: loss}, "loss of the flow") | {NORMS[name]: norm}


def _learns_from(flow: FlowConfig, name: str, kept: Kept) -> bool:
    """The network follows right responses (or whatever is selected), its contrast all or wrong."""
    if name == "contrast":
        return not kept.correct or flow.contrast == "own"
    return kept.correct or "correct" not in flow.online.select


def _places(own: Sequence[Kept], ranks: Ranks) -> tuple[Tensor, int]:
    """Of all ranks' tokens in one order: where each lies among this rank's own (-1: elsewhere), and
    how many there are.
    """
    sizes = [(kept.key, len(kept.stored.token_ids)) for kept in own]
    starts, total = {}, 0
    for key, count in sorted(ranks.merge(sizes, "latents that the flow follows")):
        starts[key] = total
        total += count
    where = torch.full((total,), -1)
    if own:
        places = torch.cat([starts[key] + torch.arange(count) for key, count in sizes])
        where[places] = torch.arange(len(places))
    return where, total


def moved(before: Tensor, after: Tensor, ranks: Ranks = ALONE) -> float:
    """||after - before|| / ||before|| over the samples of all ranks."""
    change, size = ranks.total(
        [(after - before).square().sum().item(), before.square().sum().item()],
        "how far weights moved",
    )
    return math.sqrt(change / size) if size > 0 else 0.0
