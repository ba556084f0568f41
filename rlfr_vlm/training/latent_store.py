"""Latents of many responses on disk, computed once: a fit takes many small steps over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.flow.field import FlowField, Tile
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import Rollout, request_seed

STATISTICS_TOKENS = 16384  # that means, regressions and held-out deviations are taken over, at most
TILE_TOKENS = 1024


@dataclass(frozen=True)
class StoredLatents:
    """Latents of responses end to end, and which token belongs to which. The states may lie in a file that is mapped into memory."""

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
    prompts = [part.latents.prompt + row for part, row in zip(parts, rows, strict=False) if part.latents.prompt is not None]
    return StoredLatents(
        Latents(
            torch.cat([part.latents.states for part in parts], dim=1),
            torch.cat([part.latents.target + row for part, row in zip(parts, rows, strict=False)]),
            torch.cat([part.latents.context + row for part, row in zip(parts, rows, strict=False)], dim=1),
            torch.cat([part.latents.valid for part in parts], dim=1),
            torch.cat(prompts) if prompts else None,
        ),
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.response + before for part, before in zip(parts, responses, strict=False)]),
    )


def store_latents(
    policy: Policy, field: FlowField, rollouts: Iterable[Sequence[Rollout]], path: Path, token_budget: int, max_bytes: float
) -> StoredLatents:
    """Latents of as many rollouts, from the first, as `max_bytes` take; `path` holds their states, in the policy's dtype.

    rollouts: a few at a time, so that their pictures need not all be in memory.
    """
    parts: list[StoredLatents] = []
    used, full = 0, False
    with path.open("wb") as file:
        for part in _computed(policy, field, rollouts, token_budget):
            states = part.latents.states.transpose(0, 1).contiguous().cpu()  # rows first, so that they can be appended
            if full := bool(parts) and used + states.nbytes > max_bytes:
                break
            used += states.nbytes
            file.write(states.view(torch.uint8).numpy().data)
            layers = part.latents.states.shape[0]
            places = [None if x is None else x.cpu() for x in _places(part.latents)]
            parts.append(StoredLatents(Latents(torch.empty(layers, len(states), 0), *places), part.token_ids, part.response))  # type: ignore[arg-type]
    if not parts:
        nothing = torch.zeros(0, dtype=torch.long)
        sides = torch.zeros(len(field.spec.sides), 0, dtype=torch.long)
        return StoredLatents(
            Latents(torch.zeros(len(field.spec.layers), 0, field.network.size), nothing, sides, sides.bool()), nothing, nothing
        )
    joined = join_latents(parts)
    layers, rows, _ = joined.latents.states.shape
    mapped = torch.from_file(str(path), size=rows * layers * field.network.size, dtype=policy.dtype)
    states = mapped.view(rows, layers, field.network.size).transpose(0, 1)
    return StoredLatents(Latents(states, *_places(joined.latents)), joined.token_ids, joined.response, full)


def _places(latents: Latents) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return latents.target, latents.context, latents.valid, latents.prompt


def _computed(policy: Policy, field: FlowField, rollouts: Iterable[Sequence[Rollout]], token_budget: int) -> Iterator[StoredLatents]:
    waiting: list[Rollout] = []
    size = 0
    for part in itertools.chain(rollouts, [None]):
        waiting += part or []
        size += sum(len(r.prompt.token_ids) + len(r.token_ids) for r in part or [])
        if part is None or size >= token_budget:
            for chosen in ([waiting[i] for i in indices] for indices in micro_batches(waiting, token_budget)):
                batch = pack(chosen, policy.device)
                with torch.no_grad():
                    _, latents = policy.states(batch, field.request)
                assert latents is not None
                yield StoredLatents(latents, batch.response_ids.cpu(), torch.arange(len(chosen)).repeat_interleave(batch.lengths.cpu()))
            waiting, size = [], 0


def small_tiles(field: FlowField, latents: Latents, tokens: Tensor, draw: Tensor) -> Iterator[Tile]:
    """A batch of tokens, side by side, one draw of noise for all sides. tokens: [n] int; draw: [L, n, D + 1], as `FlowField.draw` gives."""
    for side, valid in enumerate(latents.valid[:, tokens]):
        if bool(valid.any()):
            yield field.tile(latents, side, tokens[valid], draw[:, valid.to(draw.device)])


def some_tiles(field: FlowField, stored: StoredLatents, tokens: Tensor, seed: int, most: int = STATISTICS_TOKENS) -> list[Tile]:
    """At most so many of these tokens, drawn at random, a bounded number at a time."""
    parts = some_of(tokens, seed, most).split(TILE_TOKENS)
    draws = (field.draw(len(part), request_seed("some tokens", seed, k)) for k, part in enumerate(parts))
    return [tile for part, draw in zip(parts, draws, strict=True) for tile in small_tiles(field, stored.latents, part, draw)]


def some_of(tokens: Tensor, seed: int, most: int = STATISTICS_TOKENS) -> Tensor:
    """At most so many of these, drawn at random, in order."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:most].sort().values]
