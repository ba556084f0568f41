"""Latents of many responses on disk, computed once: a fit takes many small steps over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.stored import StoredLatents, join_latents
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import Rollout


def store_latents(
    policy: Policy,
    field: FlowField,
    rollouts: Iterable[Sequence[Rollout]],
    path: Path,
    token_budget: int,
    max_bytes: float,
) -> StoredLatents:
    """Latents of as many rollouts, from the first, as `max_bytes` take; `path` holds their states,
    in the policy's dtype.

    rollouts: a few at a time, so that their pictures need not all be in memory.
    """
    parts: list[StoredLatents] = []
    used, full = 0, False
    with path.open("wb") as file:
        for part in _computed(policy, field, rollouts, token_budget):
            # rows first, so that they can be appended
            states = part.latents.states.transpose(0, 1).contiguous().cpu()
            if full := bool(parts) and used + states.nbytes > max_bytes:
                break
            used += states.nbytes
            file.write(states.view(torch.uint8).numpy().data)
            layers = part.latents.states.shape[0]
            places = [None if x is None else x.cpu() for x in _places(part.latents)]
            parts.append(
                StoredLatents(
                    Latents(torch.empty(layers, len(states), 0), *places),  # type: ignore[arg-type]
                    part.token_ids,
                    part.response,
                )
            )
    if not parts:
        nothing = torch.zeros(0, dtype=torch.long)
        sides = torch.zeros(len(field.spec.sides), 0, dtype=torch.long)
        return StoredLatents(
            Latents(
                torch.zeros(len(field.spec.layers), 0, field.network.size),
                nothing,
                sides,
                sides.bool(),
            ),
            nothing,
            nothing,
        )
    joined = join_latents(parts)
    layers, rows, _ = joined.latents.states.shape
    mapped = torch.from_file(str(path), size=rows * layers * field.network.size, dtype=policy.dtype)
    states = mapped.view(rows, layers, field.network.size).transpose(0, 1)
    return StoredLatents(
        Latents(states, *_places(joined.latents)), joined.token_ids, joined.response, full
    )


def _places(latents: Latents) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return latents.target, latents.context, latents.valid, latents.prompt


def _computed(
    policy: Policy, field: FlowField, rollouts: Iterable[Sequence[Rollout]], token_budget: int
) -> Iterator[StoredLatents]:
    waiting: list[Rollout] = []
    size = 0
    for part in itertools.chain(rollouts, [None]):
        waiting += part or []
        size += sum(len(r.prompt.token_ids) + len(r.token_ids) for r in part or [])
        if part is None or size >= token_budget:
            for chosen in (
                [waiting[i] for i in indices] for indices in micro_batches(waiting, token_budget)
            ):
                batch = pack(chosen, policy.device)
                with torch.no_grad():
                    _, latents = policy.states(batch, field.request)
                assert latents is not None
                yield StoredLatents(
                    latents,
                    batch.response_ids.cpu(),
                    torch.arange(len(chosen)).repeat_interleave(batch.lengths.cpu()),
                )
            waiting, size = [], 0
