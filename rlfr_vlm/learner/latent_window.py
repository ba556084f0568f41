"""Latents of the last steps' responses: what a field that learns online takes its small steps
over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_vlm.batch import Sample
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.stored import StoredLatents
from rlfr_vlm.types import request_seed

# update, position of the group, sample, whether it is right: in the order of all ranks
Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class Kept:
    """Some tokens of one response."""

    key: Key
    stored: StoredLatents

    @property
    def correct(self) -> bool:
        """The verdict."""
        return bool(self.key[3])


class LatentWindow:
    """The responses of the last updates that this rank has sampled, on the CPU."""

    def __init__(self, updates: int, tokens: int) -> None:
        """updates: how many are kept; tokens: of each of them, over all ranks."""
        self.updates, self.tokens = updates, tokens
        self.kept: list[Kept] = []

    def add(
        self, update: int, latents: Latents, samples: Sequence[Sample], num_tokens: int
    ) -> None:
        """Keep tokens of these responses of the update's `num_tokens`: all, or each with the
        probability that leaves `tokens` of them.
        """
        share = self.tokens / max(1, num_tokens)
        for sample, own in zip(
            samples, responses_of(latents, [s.length for s in samples]), strict=True
        ):
            token_ids = torch.tensor(sample.rollout.token_ids)
            chosen = own.scorable.nonzero().flatten()
            if share < 1:
                generator = torch.Generator().manual_seed(request_seed("window", sample.seed))
                chosen = chosen[torch.rand(len(chosen), generator=generator) < share]
            if len(chosen):
                key = (
                    update,
                    sample.position,
                    sample.rollout.sample_index,
                    int(sample.outcome.correct),
                )
                stored = StoredLatents(
                    compact(own, chosen),
                    token_ids[chosen],
                    torch.zeros(len(chosen), dtype=torch.long),
                )
                self.kept.append(Kept(key, stored))
        self.kept = [kept for kept in self.kept if kept.key[0] > update - self.updates]


def responses_of(latents: Latents, lengths: Sequence[int]) -> Iterable[Latents]:
    """The latents of each response; the states are shared."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, length in zip(starts, lengths, strict=False):
        inside = slice(start, start + length)
        prompt = None if latents.prompt is None else latents.prompt[inside]
        yield Latents(
            latents.states,
            latents.target[inside],
            latents.context[:, inside],
            latents.valid[:, inside],
            prompt,
        )


def compact(latents: Latents, tokens: Tensor) -> Latents:
    """These tokens with no states but theirs, on the CPU."""
    places = [latents.target[tokens][None], latents.context[:, tokens]]
    if latents.prompt is not None:
        places.append(latents.prompt[tokens][None])
    rows, index = torch.unique(torch.cat(places), return_inverse=True)
    sides, index = len(latents.valid), index.cpu()
    prompt = index[1 + sides] if latents.prompt is not None else None
    states = latents.states.index_select(1, rows).cpu()
    return Latents(states, index[0], index[1 : 1 + sides], latents.valid[:, tokens].cpu(), prompt)
