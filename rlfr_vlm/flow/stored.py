"""Latents of many responses, end to end, and the tiles of tokens that small steps are taken
over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_vlm.flow.field import FlowField, Tile
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.types import request_seed

STATISTICS_TOKENS = 16384  # that means, regressions and held-out deviations are taken over, at most
TILE_TOKENS = 1024


@dataclass(frozen=True)
class StoredLatents:
    """Latents of responses end to end, and which token belongs to which. The states may lie in a
    file that is mapped into memory.
    """

    latents: Latents
    token_ids: Tensor  # [N]
    response: Tensor  # [N] int, of each token
    full: bool = False  # there was no room for more

    @property
    def num_responses(self) -> int:
        """How many there are."""
        return int(self.response[-1]) + 1 if len(self.response) else 0

    def tokens(self, responses: Sequence[int]) -> Tensor:
        """Tokens of these responses that have a context: [n] int."""
        chosen = torch.zeros(self.num_responses, dtype=torch.bool)
        chosen[list(responses)] = True
        return (chosen[self.response] & self.latents.scorable).nonzero().flatten()


def join_latents(parts: Sequence[StoredLatents]) -> StoredLatents:
    """One after the other, in memory."""
    rows = torch.tensor([0, *(part.latents.states.shape[1] for part in parts)]).cumsum(0).tolist()
    responses = torch.tensor([0, *(part.num_responses for part in parts)]).cumsum(0).tolist()
    prompts = [
        part.latents.prompt + row
        for part, row in zip(parts, rows, strict=False)
        if part.latents.prompt is not None
    ]
    return StoredLatents(
        Latents(
            torch.cat([part.latents.states for part in parts], dim=1),
            torch.cat([part.latents.target + row for part, row in zip(parts, rows, strict=False)]),
            torch.cat(
                [part.latents.context + row for part, row in zip(parts, rows, strict=False)], dim=1
            ),
            torch.cat([part.latents.valid for part in parts], dim=1),
            torch.cat(prompts) if prompts else None,
        ),
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.response + before for part, before in zip(parts, responses, strict=False)]),
    )


def small_tiles(field: FlowField, latents: Latents, tokens: Tensor, draw: Tensor) -> Iterator[Tile]:
    """A batch of tokens, side by side, one draw of noise for all sides. tokens: [n] int; draw: [L,
    n, D + 1], as `FlowField.draw` gives.
    """
    for side, valid in enumerate(latents.valid[:, tokens]):
        if bool(valid.any()):
            yield field.tile(latents, side, tokens[valid], draw[:, valid.to(draw.device)])


def some_tiles(
    field: FlowField,
    stored: StoredLatents,
    tokens: Tensor,
    seed: int,
    most: int = STATISTICS_TOKENS,
) -> list[Tile]:
    """At most so many of these tokens, drawn at random, a bounded number at a time."""
    parts = some_of(tokens, seed, most).split(TILE_TOKENS)
    draws = (
        field.draw(len(part), request_seed("some tokens", seed, k)) for k, part in enumerate(parts)
    )
    return [
        tile
        for part, draw in zip(parts, draws, strict=True)
        for tile in small_tiles(field, stored.latents, part, draw)
    ]


def some_of(tokens: Tensor, seed: int, most: int = STATISTICS_TOKENS) -> Tensor:
    """At most so many of these, drawn at random, in order."""
    return tokens[
        torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:most]
        .sort()
        .values
    ]
