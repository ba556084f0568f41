"""Where a response stands among the others: its mean latent, small enough to be written down for
every response.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rlfr_vlm.flow.latents import Latents

SKETCH_SIZE = 64


def sketch_latents(latents: Latents, lengths: Sequence[int]) -> Tensor:
    """Mean over each response's tokens of the hooked layers' states, each of unit root mean square,
    under one fixed random projection.

    A Gaussian projection keeps distances up to a factor of 1 +- O(1 / sqrt(64)) (Johnson and
    Lindenstrauss, 1984); it depends on nothing but the number of layers and their width, so that
    sketches of different steps, runs and ranks can be compared.
    lengths: one per response of the packed batch. Returns [B, 64] float32, on the CPU.
    """
    layers, _, width = latents.states.shape
    means = []
    for rows in latents.target.split(list(lengths)):
        states = latents.states.index_select(1, rows).float()
        means.append(
            (states * states.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt())
            .mean(1)
            .flatten()
        )
    return torch.stack(means).cpu() @ _projection(layers * width)


@functools.cache
def _projection(size: int) -> Tensor:
    """[size, 64] standard normal over sqrt(64)."""
    return (
        torch.randn(size, SKETCH_SIZE, generator=torch.Generator().manual_seed(0))
        / SKETCH_SIZE**0.5
    )
