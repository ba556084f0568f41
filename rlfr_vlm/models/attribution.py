"""Where in its pictures the model looked when it chose a token."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlfr_vlm.models.attention import WatchedLayout, WatchedTokens
from rlfr_vlm.models.pack import PackedBatch
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import EncodedPrompt, Rollout

MOST_CELLS = 16  # per side of a picture: larger grids of image tokens are averaged down

Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Attribution:
    """The attention of a response's T tokens to the pictures of its prompt, C cells in all, row by
    row and picture by picture.

    Of a token, it is the attention of the position that predicts it, its predecessor: what the
    model looked at when it chose the token. Softmax weights of the language tower over all visible
    tokens, mean over heads and over the layers asked for.
    """

    grids: tuple[Grid, ...]  # per picture
    cells: Tensor  # [T, C] float32: weight of an image token, the mean of those in the cell
    share: Tensor  # [T] float32: weight of all image tokens together

    def encoded(self) -> dict[str, Any]:
        """As JSON holds it: base64 of zlib of T x C bytes, 255 at the cell where a token looked
        most.
        """
        scaled = self.cells / self.cells.amax(1, keepdim=True).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        raw = (255 * scaled).round().to(torch.uint8).numpy().tobytes()
        return {
            "grids": [list(grid) for grid in self.grids],
            "cells": base64.b64encode(zlib.compress(raw)).decode(),
            "share": [round(value, 4) for value in self.share.tolist()],
        }


@torch.no_grad()
def attribute(
    policy: Policy, batch: PackedBatch, rollouts: Sequence[Rollout], layers: Sequence[int]
) -> list[Attribution | None]:
    """One forward of a packed batch whose responses are these rollouts; None for those without
    pictures.

    A batch without rollouts goes through the model all the same, as ranks that keep step need it.
    """
    token = policy.image_token_id
    if policy.processor is None or token is None:
        return [None] * len(rollouts)
    seen = [torch.tensor(r.prompt.token_ids).eq(token).nonzero()[:, 0] for r in rollouts]
    watched = [i for i, columns in enumerate(seen) if len(columns)]
    layout = WatchedLayout(batch.layout, layers, [_watch(batch, i, seen[i]) for i in watched])
    policy.forward(replace(batch, layout=layout))
    found: list[Attribution | None] = [None] * len(rollouts)
    merge = policy.processor.image_processor.merge_size
    for i, weights in zip(watched, layout.weights, strict=True):
        cells, grids = pooled(weights.cpu(), picture_grids(rollouts[i].prompt, merge))
        found[i] = Attribution(grids, cells, weights.sum(1).cpu())
    return found


def _watch(batch: PackedBatch, response: int, columns: Tensor) -> WatchedTokens:
    """The positions that predict a response, and its prompt's image tokens."""
    device = batch.token_ids.device
    prompt = torch.arange(
        int(batch.prompt_start[response]), int(batch.prompt_end[response]), device=device
    )
    start, length = int(batch.starts[response]), int(batch.lengths[response])
    # nothing is predicted from the last token
    read = torch.arange(start, start + length - 1, device=device)
    return WatchedTokens(torch.cat([prompt, read]), length, columns.to(device))


def picture_grids(prompt: EncodedPrompt, merge_size: int) -> tuple[Grid, ...]:
    """Rows and columns of each picture's image tokens, which stand row by row: patches of the
    processor, `merge_size` squared per token.
    """
    return tuple(
        (height // merge_size, width // merge_size)
        for _, height, width in prompt.vision["image_grid_thw"].tolist()
    )


def pooled(
    weights: Tensor, grids: Sequence[Grid], most: int = MOST_CELLS
) -> tuple[Tensor, tuple[Grid, ...]]:
    """Average grids down to at most `most` cells a side.

    weights: [T, sum of rows x columns]. Returns [T, C] and the grids that are left.
    """
    smaller = tuple((min(rows, most), min(columns, most)) for rows, columns in grids)
    parts = weights.split([rows * columns for rows, columns in grids], dim=1)
    averaged = [
        F.adaptive_avg_pool2d(part.unflatten(1, grid)[:, None], small).flatten(1)
        for part, grid, small in zip(parts, grids, smaller, strict=True)
    ]
    return torch.cat(averaged, dim=1), smaller
