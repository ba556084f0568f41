"""What a field is measured against: velocities that need no field. Each is a callable (x_t, t,
layer, context) -> [N, D], for ONE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_vlm.flow.field import FlowField, Tile
from rlfr_vlm.flow.objective import Velocity, logit_normal_times, velocity_deviation
from rlfr_vlm.flow.spec import Scale

RIDGE = 1e-3  # of the mean square of the features
# the one that a fit has to pass: it knows nothing, and its deviation at t is 1 / t^2
# (flow/reference.py)
REFERENCE = "x_t / t"


@dataclass(frozen=True)
class Linear:
    """E[h | context] by ridge regression, and what is left of each dimension; of one layer."""

    weight: Tensor  # [C + 1, D], the last row is the constant
    variance: Tensor  # [D]

    @classmethod
    def fit(cls, target: Tensor, features: Tensor) -> Linear:
        """target: [n, D]; features: [n, C]."""
        design = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).double()
        square = design.T @ design
        penalty = torch.full_like(
            square[0], RIDGE * float(features.double().square().mean()) * len(features)
        )
        penalty[-1] = 0.0
        weight = torch.linalg.solve(square + torch.diag(penalty + 1e-9), design.T @ target.double())
        # what the fit itself takes away is given back: n rows, of which about C + 1 were used up
        left = (target.double() - design @ weight).square().sum(0) / max(
            1, len(target) - min(len(design.T), len(target) // 2)
        )
        return cls(weight.float(), left.float().clamp(min=1e-8))

    def mean(self, features: Tensor) -> Tensor:
        """[n, C] -> [n, D]."""
        return features @ self.weight[:-1] + self.weight[-1]


def velocities(mean: Tensor, linear: Linear) -> dict[str, Velocity]:
    """By name. mean: [D] of the targets; what they take as context are the features that `linear`
    was fitted on.
    """

    def gaussian(x_t: Tensor, t: Tensor, _layer: Tensor, context: Tensor) -> Tensor:
        """h | context is normal about the regression: u = (E[h | x_t, context] - x_t) / (1 - t)."""
        time, expected = t[:, None], linear.mean(context)
        gain = time * linear.variance / (time.square() * linear.variance + (1 - time).square())
        return (expected + gain * (x_t - time * expected) - x_t) / (1 - time)

    return {
        "zero": lambda x_t, _t, _layer, _context: torch.zeros_like(x_t),
        "constant": lambda x_t, _t, _layer, _context: mean.expand_as(x_t),
        REFERENCE: lambda x_t, t, _layer, _context: x_t / t[:, None],
        "E[h | context]": lambda _x_t, _t, _layer, context: linear.mean(context),
        "Gaussian given it": gaussian,
    }


@torch.no_grad()
def measure(
    field: FlowField, train: Sequence[Tile], heldout: Sequence[Tile]
) -> list[dict[str, float | int | str]]:
    """Held-out deviation of the field and of what needs none, by layer (-1: all), at random times
    as in the fit and at the reward times.

    train: tokens that the regression and the constant are taken from. Returns rows {layer, at,
        name: deviation, ...}.
    """
    rows: list[dict[str, float | int | str]] = []
    sums: dict[str, dict[str, float]] = {"fit": {}, "reward": {}}
    for k, layer in enumerate(field.spec.layers):
        target = torch.cat([tile.target[k] for tile in train])
        known = velocities(
            target.mean(0), Linear.fit(target, torch.cat([_features(tile, k) for tile in train]))
        )
        for at in sums:
            found: dict[str, float] = {
                "field": _mean([_own(field, tile, k, at) for tile in heldout])
            }
            for name, velocity in known.items():
                found[name] = _mean([_deviation(velocity, tile, k, at, field) for tile in heldout])
            rows.append({"layer": layer, "at": at, **found})
            for name, value in found.items():
                sums[at][name] = sums[at].get(name, 0.0) + value / len(field.spec.layers)
    for at, found in sums.items():
        rows.append({"layer": -1, "at": at, **found})
    return rows


def _features(tile: Tile, k: int) -> Tensor:
    """The context, and the prompt's latent where the field reads it: [n, D or 2 D]."""
    return (
        tile.context[k]
        if tile.prompt is None
        else torch.cat([tile.context[k], tile.prompt[k]], dim=1)
    )


def _times(field: FlowField, tile: Tile, at: str, k: int) -> list[Tensor]:
    if at == "fit":
        return [logit_normal_times(tile.time_normal[k])]
    return [torch.full_like(tile.layer[k], t) for t in field.spec.times]


def _own(field: FlowField, tile: Tile, k: int, at: str) -> Tensor:
    """[n] of the field at one layer."""
    times = field.spec.times if at == "reward" else (logit_normal_times(tile.time_normal),)
    return torch.stack([field.deviation(tile, t)[k] for t in times]).mean(0)


def _deviation(velocity: Velocity, tile: Tile, k: int, at: str, field: FlowField) -> Tensor:
    arguments = (tile.target[k], _features(tile, k), tile.noise[k])
    return torch.stack(
        [
            velocity_deviation(velocity, *arguments, t, tile.layer[k])
            for t in _times(field, tile, at, k)
        ]
    ).mean(0)


def _mean(parts: list[Tensor]) -> float:
    return torch.cat(parts).double().mean().item()


def scale_of(parts: Sequence[Tensor]) -> Scale:
    """Mean and standard deviation of latents by layer and dimension. parts: [L, n, D] each."""
    count = sum(part.shape[1] for part in parts)
    mean = (
        sum(
            (part.double().sum(1) for part in parts),
            start=torch.zeros_like(parts[0][:, 0], dtype=torch.float64),
        )
        / count
    )
    square = (
        sum(
            ((part.double() - mean[:, None]).square().sum(1) for part in parts),
            start=torch.zeros_like(mean),
        )
        / count
    )
    std = square.sqrt()
    return Scale(mean.float(), std.clamp(min=1e-6 * float(std.max().clamp(min=1e-6))).float())
