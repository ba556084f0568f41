"""The online update of the flow field: it follows the latents of selected responses, by default the
correct ones (arXiv:2510.10201).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlfr_vlm.algorithm.selection import flow_token_weights, flow_weights
from rlfr_vlm.batch import Sample, Scores, UpdateSize
from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.stored import join_latents, small_tiles
from rlfr_vlm.learner.latent_window import LatentWindow
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
    ) -> None:
        """All ranks must call it."""
        self.flow, self.field, self.learner, self.size, self.seed = (
            flow,
            field,
            learner,
            size,
            cfg.run_seed,
        )
        self.weights = {  # of each response, for each network that learns
            name: flow_weights(
                flow.online, samples, learner.ranks, flow.contrast if name == "contrast" else "none"
            )
            for name in learner.field_optimizers
        }
        # weight of the tokens that each network has learnt from
        self.followed = dict.fromkeys(self.weights, 0.0)

    @property
    def updates(self) -> int:
        """Those that the field has followed in small steps before this one."""
        return (
            max(optimizer.steps for optimizer in self.learner.field_optimizers.values())
            // self.flow.online.updates
        )

    def see(
        self,
        rows: Sequence[int],
        samples: Sequence[Sample],
        latents: Latents,
        scores: Scores,
        metrics: UpdateMetrics,
    ) -> NonFiniteError | None:
        """A micro-batch: its latents go into the window; without one, its share of the gradient is
        added. rows: which of the update it is.
        """
        lengths, seeds = [s.length for s in samples], [s.seed for s in samples]
        if self.learner.window is not None:
            self.learner.window.add(self.updates, latents, samples, self.size.num_tokens)
            return None
        problem = None
        for name, weights in self.weights.items():
            shares = flow_token_weights(
                self.flow.online,
                [weights[i] for i in rows],
                lengths,
                latents.scorable,
                scores.entropy,
            )
            loss = self.field.accumulate_gradient(
                latents, lengths, seeds, shares, self.flow.online.times, self.field.networks[name]
            )
            if not math.isfinite(loss):
                problem = problem or NonFiniteError(f"the flow loss is not finite: {TOO_FAST}")
            self.followed[name] += shares.sum().item()
            metrics.add({LOSSES[name]: loss})
        return problem

    def selected(self) -> dict[str, bool]:
        """Whether any rank had a token for each network to learn from. All ranks must call it."""
        totals = self.learner.ranks.total(
            list(self.followed.values()), "tokens that the flow follows"
        )
        return {name: total > 0 for name, total in zip(self.followed, totals, strict=True)}

    def step(self, selected: dict[str, bool]) -> dict[str, float]:
        """The optimisers' steps; a network without anything to learn from only gets older. Returns
        rates and gradient norms.
        """
        optimizers = self.learner.field_optimizers
        metrics = {"flow/lr": next(iter(optimizers.values())).current_lr}
        if self.learner.window is not None:
            return metrics | small_steps(
                self.flow,
                self.field,
                optimizers,
                self.learner.window,
                self.seed,
                self.updates,
                self.learner.ranks,
            )
        return metrics | {
            NORMS[name]: optimizer.step() if selected[name] else optimizer.skip()
            for name, optimizer in optimizers.items()
        }


def small_steps(
    cfg: FlowConfig,
    field: FlowField,
    optimizers: dict[str, PolicyOptimizer],
    window: LatentWindow,
    seed: int,
    update: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Small steps of the field, and of its contrast, over the window; each draws its tokens from
    those of all ranks. Returns metrics.

    What a small step computes does not depend on how responses are spread over ranks.
    """
    online = cfg.online
    metrics: dict[str, float] = {}
    learns = {
        "network": lambda kept: kept.correct or "correct" not in online.select,
        "contrast": lambda kept: kept.correct is False or cfg.contrast == "own",
    }
    for name, optimizer in optimizers.items():
        own = [kept for kept in window.kept if learns[name](kept)]
        everyone = sorted(
            ranks.merge(
                [(kept.key, len(kept.stored.token_ids)) for kept in own],
                "latents that the flow follows",
            )
        )
        starts = dict(
            zip(
                (key for key, _ in everyone),
                torch.tensor([0, *(n for _, n in everyone)]).cumsum(0).tolist(),
                strict=False,
            )
        )
        total = sum(count for _, count in everyone)
        if not total:
            for _ in range(online.updates):
                optimizer.skip()
            continue
        stored = join_latents([kept.stored for kept in own]) if own else None
        places = [starts[kept.key] + torch.arange(len(kept.stored.token_ids)) for kept in own]
        where = torch.full((total,), -1)
        if places:
            where[torch.cat(places)] = torch.arange(sum(map(len, places)))
        loss, norm = 0.0, 0.0
        for k in range(online.updates):
            key = request_seed("follow", seed, update, k, name)
            drawn = where[
                torch.randint(
                    total, (online.batch_tokens,), generator=torch.Generator().manual_seed(key)
                )
            ]
            noise = field.draw(online.batch_tokens, key)
            if stored is not None and bool((drawn >= 0).any()):
                here = drawn >= 0
                for tile in small_tiles(
                    field, stored.latents, drawn[here], noise[:, here.to(noise.device)]
                ):
                    part = (
                        field.losses(tile, online.times, field.networks[name]) * tile.share
                    ).sum() / online.batch_tokens
                    part.backward()
                    loss += part.item() / online.updates
            elif ranks.size > 1:  # what meets at the step must have gone backwards on every rank
                (
                    0.0 * torch.stack([p.sum() for p in field.networks[name].parameters()]).sum()
                ).backward()
            norm = optimizer.step()
        metrics |= ranks.sum({LOSSES[name]: loss}, "loss of the flow")
        metrics[NORMS[name]] = norm
    return metrics
