"""Flow matching on the straight path from noise to a latent. Pure functions; `velocity` is any
callable (x_t, t, layer, context) -> [N, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def velocity_deviation(
    velocity: Velocity, target: Tensor, context: Tensor, noise: Tensor, t: Tensor, layer: Tensor
) -> Tensor:
    """Squared error of the predicted velocity on the straight path noise -> target.

    x_t = (1 - t) * noise + t * target,  u = target - noise   (CondOT path, arXiv:2210.02747)
    deviation = mean_D (v(x_t, t, layer | context) - u)^2     (arXiv:2510.10201)

    target, context, noise: [N, D]; t in [0, 1): [N]; layer depth in [0, 1]: [N]. Returns [N]
        float32 (float64 for float64 latents).
    Its mean over random t trains the flow; at fixed t, weighted by t / (1 - t), it scores tokens.
    """
    time = t[:, None].to(target.dtype)
    x_t = (1 - time) * noise + time * target
    predicted = velocity(x_t, t, layer, context)
    precise = torch.promote_types(target.dtype, torch.float32)
    return (predicted.to(precise) - (target - noise).to(precise)).square().mean(dim=-1)


def debias_weight(t: float) -> float:
    """t / (1 - t): turns a velocity error into the likelihood-weighted score error
    (arXiv:2510.10201; 0.8 -> 4, 0.5 -> 1).
    """
    return t / (1 - t)


def logit_normal_times(normal: Tensor) -> Tensor:
    """Flow times in (0, 1) from standard normal draws: their sigmoid (arXiv:2403.03206). Any
    shape.
    """
    return torch.sigmoid(normal)
