"""Small steps over stored latents: what decides how well a field is fitted is the number of steps,
not of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlfr_vlm.config import Config, FlowFitConfig
from rlfr_vlm.fitting.budget import FIT_LOOKS, FIT_STEPS
from rlfr_vlm.fitting.progress import Clock, Work
from rlfr_vlm.flow.field import FlowField, Tile
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.reward import TokenTypes
from rlfr_vlm.flow.stored import StoredLatents, small_tiles, some_of, some_tiles
from rlfr_vlm.flow.yardstick import measure, scale_of
from rlfr_vlm.learner.optim import Optimizer, OptimizerSettings
from rlfr_vlm.types import request_seed

LOOK_TOKENS = 4096

# latents, and the tokens that each network learns from
Stored = tuple[StoredLatents, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Best:
    """The best look at a network so far."""

    loss: float
    weights: dict[str, Tensor]
    since: int = 0  # looks that were no better

    def or_better(self, loss: float, network: VelocityNet) -> Best:
        """After a further look."""
        if not loss < self.loss:
            return replace(self, since=self.since + 1)
        return Best(loss, {k: v.detach().clone() for k, v in network.state_dict().items()})


def fit_tokens(
    cfg: Config,
    field: FlowField,
    settings_of: Callable[[FlowFitConfig, int, int], OptimizerSettings],
    train: Stored,
    heldout: Stored,
    work: Work,
) -> tuple[float, list[dict[str, float | int | str]]]:
    """Fit the field, and its contrast where it has one, each on its own tokens, to the weights of
    the best look at those held out.

    Returns the held-out loss, and what it is measured against. Sets the field's scale and token
    types.
    """
    assert cfg.flow is not None
    steps = cfg.flow.fit.steps or FIT_STEPS
    if field.spec.standardise:
        rows = train[0].latents.target[some_of(train[1]["network"], cfg.seed)]
        field.set_scale(scale_of([train[0].latents.states[:, rows].float()]))
    fitting = SmallStepFit(cfg, cfg.flow.fit, field, settings_of, train, heldout, work, steps)
    fitting.run()
    for name, network in field.networks.items():
        network.load_state_dict(fitting.best[name].weights)
    field.types = token_types(field, train[0], train[1]["network"], cfg.seed)
    measured = some_tiles(field, train[0], train[1]["network"], cfg.seed)
    return fitting.best["network"].loss, measure(field, measured, fitting.looked_at["network"])


class SmallStepFit:
    """A fit under way, begun anew or where a stopped one last looked at what is held out."""

    def __init__(
        self,
        cfg: Config,
        fit: FlowFitConfig,
        field: FlowField,
        settings_of: Callable[[FlowFitConfig, int, int], OptimizerSettings],
        train: Stored,
        heldout: Stored,
        work: Work,
        steps: int,
    ) -> None:
        self.fit, self.field, self.train, self.work = fit, field, train, work
        self.seed, self.steps, self.every = cfg.seed, steps, max(1, steps // FIT_LOOKS)
        networks = field.networks
        self.looked_at = {
            name: some_tiles(field, heldout[0], heldout[1][name], cfg.seed, LOOK_TOKENS)
            for name in networks
        }
        self.optimizers = {
            name: Optimizer(dict(net.named_parameters()), settings_of(fit, steps, net.size))
            for name, net in networks.items()
        }
        self.done = work.restore(self.optimizers, networks)
        self.best = {
            name: Best(loss, work.part(f"best {name}") if self.done else {}, since)
            for name in networks
            for loss, _, since in [work.facts.get(name, (float("inf"), None, 0))]
        }
        self.clock = Clock(self.done, steps)

    @property
    def stalled(self) -> bool:
        """Whether no network got better for as many looks as a fit waits."""
        return all(found.since >= self.fit.patience for found in self.best.values())

    def run(self) -> None:
        """Steps until the last one, or until nothing gets better."""
        with self.work.log.open("a") as log:
            for step in range(self.done + 1, self.steps + 1):
                if self.done and self.stalled:
                    break
                record = self._step(step)
                look = step % self.every == 0 or step == self.steps
                if look:
                    record |= self._look(step, record["loss"])
                log.write(json.dumps(record) + "\n")
                if look:
                    log.flush()
                    self._keep(step)
                    if self.stalled:
                        self.work.say(
                            f"flow fit: no better for {self.fit.patience} looks, so it ends at "
                            f"step {step} of {self.steps}"
                        )
                        break

    def _step(self, step: int) -> dict[str, float]:
        assert self.fit.batch_tokens is not None
        stored, tokens = self.train
        record: dict[str, float] = {"step": step, "lr": self.optimizers["network"].current_lr}
        seed = request_seed(self.seed, "small step", step)
        for name, network in self.field.networks.items():
            loss = small_step(
                self.field, network, stored, tokens[name], self.fit.batch_tokens, seed
            )
            prefix = "" if name == "network" else f"{name}_"
            norm = self.optimizers[name].step()
            record |= {f"{prefix}loss": loss, f"{prefix}grad_norm": norm}
        return record

    def _look(self, step: int, loss: float) -> dict[str, float]:
        """At what is held out."""
        found, said = {}, []
        for name, network in self.field.networks.items():
            now = mean_loss(self.field, network, self.looked_at[name])
            self.best[name] = best = self.best[name].or_better(now, network)
            found["eval_loss" if name == "network" else f"{name}_eval_loss"] = best.loss
            said.append(f"{'held-out' if name == 'network' else name} {best.loss:.4f}")
        self.work.say(
            f"flow fit {step}/{self.steps}  loss {loss:.4f}  {'  '.join(said)}"
            f"{self.clock.left(step)}"
        )
        return found

    def _keep(self, step: int) -> None:
        weights = {name: network.state_dict() for name, network in self.field.networks.items()}
        weights |= {f"best {name}": found.weights for name, found in self.best.items()}
        facts = {name: (found.loss, None, found.since) for name, found in self.best.items()}
        self.work.keep(step, self.optimizers, weights, **facts)


def small_step(
    field: FlowField,
    network: VelocityNet,
    stored: StoredLatents,
    tokens: Tensor,
    count: int,
    seed: int,
) -> float:
    """Add the gradient of the mean loss over `count` of these tokens, drawn at random, at
    logit-normal times. Returns the loss.
    """
    drawn = tokens[
        torch.randint(len(tokens), (count,), generator=torch.Generator().manual_seed(seed))
    ]
    mean = 0.0
    for tile in small_tiles(field, stored.latents, drawn, field.draw(count, seed)):
        loss = (field.losses(tile, "logit_normal", network) * tile.share).sum() / count
        loss.backward()
        mean += loss.item()
    return mean


@torch.no_grad()
def mean_loss(field: FlowField, network: VelocityNet, tiles: list[Tile]) -> float:
    """Mean deviation at logit-normal times, which come with the tiles."""
    losses = [(field.losses(tile, "logit_normal", network) * tile.share).sum() for tile in tiles]
    return (sum(losses) / sum(tile.share.sum() for tile in tiles)).item()  # type: ignore[union-attr]


@torch.no_grad()
def token_types(field: FlowField, stored: StoredLatents, tokens: Tensor, seed: int) -> TokenTypes:
    """What scores are usual on the data of the fit, by token id; with a contrast, of its
    difference.
    """
    values, ids = [], []
    for tile in some_tiles(field, stored, tokens, seed):
        scores = [field.weighted(tile, network) for network in field.networks.values()]
        values.append(scores[0] - scores[1] if len(scores) > 1 else scores[0])
        ids.append(stored.token_ids[tile.tokens])
    return TokenTypes.of(torch.cat(values), torch.cat(ids).to(field.device))
