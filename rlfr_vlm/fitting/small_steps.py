"""Small steps over stored latents: what decides how well a field is fitted is the number of steps,
not of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


@dataclass
class Best:
    """The best look at a network so far."""

    loss: float
    weights: dict[str, Tensor]
    since: int = 0  # looks that were no better

    def see(self, loss: float, network: VelocityNet) -> None:
        """A further look."""
        self.since += 1
        if loss < self.loss:
            self.loss, self.weights, self.since = (
                loss,
                {k: v.detach().clone() for k, v in network.state_dict().items()},
                0,
            )


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
    assert cfg.flow is not None and cfg.flow.fit.batch_tokens is not None
    fit, batch_tokens = cfg.flow.fit, cfg.flow.fit.batch_tokens
    steps = fit.steps or FIT_STEPS
    if field.spec.standardise:
        rows = train[0].latents.target[some_of(train[1]["network"], cfg.seed)]
        field.set_scale(scale_of([train[0].latents.states[:, rows].float()]))
    looked_at = {
        name: some_tiles(field, heldout[0], heldout[1][name], cfg.seed, LOOK_TOKENS)
        for name in field.networks
    }
    optimizers = {
        name: Optimizer(dict(network.named_parameters()), settings_of(fit, steps, network.size))
        for name, network in field.networks.items()
    }
    done = work.restore(optimizers, field.networks)
    best = {name: Best(*work.facts.get(name, (float("inf"), None, 0))) for name in field.networks}
    for name, found in best.items():
        found.weights = work.part(f"best {name}") if done else {}
    clock, every = Clock(done, steps), max(1, steps // FIT_LOOKS)
    with work.log.open("a") as log:
        for step in range(done + 1, steps + 1):
            if done and all(found.since >= fit.patience for found in best.values()):
                break
            record: dict[str, float] = {"step": step, "lr": optimizers["network"].current_lr}
            for name, network in field.networks.items():
                loss = small_step(
                    field,
                    network,
                    train[0],
                    train[1][name],
                    batch_tokens,
                    request_seed(cfg.seed, "small step", step),
                )
                prefix = "" if name == "network" else f"{name}_"
                record |= {f"{prefix}loss": loss, f"{prefix}grad_norm": optimizers[name].step()}
            look = step % every == 0 or step == steps
            if look:
                for name, network in field.networks.items():
                    best[name].see(mean_loss(field, network, looked_at[name]), network)
                    record["eval_loss" if name == "network" else f"{name}_eval_loss"] = best[
                        name
                    ].loss
                said = "  ".join(
                    f"{'held-out' if name == 'network' else name} {found.loss:.4f}"
                    for name, found in best.items()
                )
                work.say(
                    f"flow fit {step}/{steps}  loss {record['loss']:.4f}  {said}{clock.left(step)}"
                )
            log.write(json.dumps(record) + "\n")
            if look:
                log.flush()
                weights = {name: network.state_dict() for name, network in field.networks.items()}
                weights |= {f"best {name}": found.weights for name, found in best.items()}
                work.keep(
                    step,
                    optimizers,
                    weights,
                    **{name: (found.loss, None, found.since) for name, found in best.items()},
                )
                if all(found.since >= fit.patience for found in best.values()):
                    work.say(
                        f"flow fit: no better for {fit.patience} looks, so it ends at step {step} "
                        f"of {steps}"
                    )
                    break
    for name, network in field.networks.items():
        network.load_state_dict(best[name].weights)
    field.types = token_types(field, train[0], train[1]["network"], cfg.seed)
    measured = some_tiles(field, train[0], train[1]["network"], cfg.seed)
    return best["network"].loss, measure(field, measured, looked_at["network"])


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
