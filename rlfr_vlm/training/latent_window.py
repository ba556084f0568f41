"""Latents of the last steps' responses: what a field that learns online takes its small steps over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.config import FlowConfig
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.training.credit import Sample
from rlfr_vlm.training.latent_store import StoredLatents, join_latents, small_tiles
from rlfr_vlm.training.optim import PolicyOptimizer
from rlfr_vlm.training.shards import ShardReader, ShardWriter
from rlfr_vlm.types import request_seed

STEM = "window"  # of a checkpoint's files
LOSSES = {"network": "flow/loss", "contrast": "flow/contrast_loss"}  # names of figures
NORMS = {"network": "flow/grad_norm", "contrast": "flow/contrast_grad_norm"}
Key = tuple[int, int, int, int]  # update, position of the group, sample, whether it is right: in the order of all ranks


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

    def add(self, update: int, latents: Latents, samples: Sequence[Sample], num_tokens: int) -> None:
        """Keep tokens of these responses of the update's `num_tokens`: all, or each with the probability that leaves `tokens` of them."""
        share = self.tokens / max(1, num_tokens)
        for sample, own in zip(samples, responses_of(latents, [s.length for s in samples]), strict=True):
            token_ids = torch.tensor(sample.rollout.token_ids)
            chosen = own.scorable.nonzero().flatten()
            if share < 1:
                generator = torch.Generator().manual_seed(request_seed("window", sample.seed))
                chosen = chosen[torch.rand(len(chosen), generator=generator) < share]
            if len(chosen):
                key = (update, sample.position, sample.rollout.sample_index, int(sample.outcome.correct))
                stored = StoredLatents(compact(own, chosen), token_ids[chosen], torch.zeros(len(chosen), dtype=torch.long))
                self.kept.append(Kept(key, stored))
        self.kept = [kept for kept in self.kept if kept.key[0] > update - self.updates]

    def save(self, folder: Path) -> None:
        """Into this rank's folder of a checkpoint."""
        with ShardWriter(folder, STEM) as file:
            for kept in self.kept:
                name = "/".join(map(str, kept.key))
                for part, tensor in _tensors(kept.stored).items():
                    file.add(f"{name}/{part}", tensor)

    def load(self, folder: Path, ranks: Ranks) -> None:
        """This rank's share of a checkpoint's responses, whatever the number of ranks that wrote it."""
        reader = ShardReader(folder, STEM)
        keys = sorted({tuple(map(int, name.split("/")[:4])) for name in reader.names})
        self.kept = []
        for place, key in enumerate(keys):
            if place % ranks.size == ranks.rank:
                name = "/".join(map(str, key))
                parts = {part: reader.find(f"{name}/{part}") for part in ("states", "target", "context", "valid", "prompt", "token_ids")}
                token_ids = parts.pop("token_ids")
                assert token_ids is not None and len(key) == 4
                stored = StoredLatents(Latents(**parts), token_ids, torch.zeros(len(token_ids), dtype=torch.long))  # type: ignore[arg-type]
                self.kept.append(Kept(key, stored))


def _tensors(stored: StoredLatents) -> dict[str, Tensor]:
    latents = stored.latents
    every = {
        "states": latents.states,
        "target": latents.target,
        "context": latents.context,
        "valid": latents.valid,
        "prompt": latents.prompt,
    }
    return {name: tensor for name, tensor in every.items() if tensor is not None} | {"token_ids": stored.token_ids}


def responses_of(latents: Latents, lengths: Sequence[int]) -> Iterable[Latents]:
    """The latents of each response; the states are shared."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, length in zip(starts, lengths, strict=False):
        inside = slice(start, start + length)
        prompt = None if latents.prompt is None else latents.prompt[inside]
        yield Latents(latents.states, latents.target[inside], latents.context[:, inside], latents.valid[:, inside], prompt)


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


def follow(
    cfg: FlowConfig,
    field: FlowField,
    optimizers: dict[str, PolicyOptimizer],
    window: LatentWindow,
    seed: int,
    update: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Small steps of the field, and of its contrast, over the window; each draws its tokens from those of all ranks. Returns figures.

    What a small step computes does not depend on how responses are spread over ranks.
    """
    online = cfg.online
    figures: dict[str, float] = {}
    learns = {
        "network": lambda kept: kept.correct or "correct" not in online.select,
        "contrast": lambda kept: kept.correct is False or cfg.contrast == "own",
    }
    for name, optimizer in optimizers.items():
        own = [kept for kept in window.kept if learns[name](kept)]
        everyone = sorted(ranks.merge([(kept.key, len(kept.stored.token_ids)) for kept in own], "latents that the flow follows"))
        starts = dict(zip((key for key, _ in everyone), torch.tensor([0, *(n for _, n in everyone)]).cumsum(0).tolist(), strict=False))
        total = sum(count for _, count in everyone)
        if not total:
            for _ in range(online.updates):
                optimizer.skip()
            continue
        stored = join_latents([kept.stored for kept in own]) if own else None
        places = [starts[kept.key] + torch.arange(len(kept.stored.token_ids)) for kept in own]
        where = torch.full((total,), -1)
        if places:
            where[torch.cat(places)] = torch.arange(sum(map(len, places)))
        loss, norm = 0.0, 0.0
        for k in range(online.updates):
            key = request_seed("follow", seed, update, k, name)
            drawn = where[torch.randint(total, (online.batch_tokens,), generator=torch.Generator().manual_seed(key))]
            noise = field.draw(online.batch_tokens, key)
            if stored is not None and bool((drawn >= 0).any()):
                here = drawn >= 0
                for tile in small_tiles(field, stored.latents, drawn[here], noise[:, here.to(noise.device)]):
                    part = (field.losses(tile, online.times, field.networks[name]) * tile.share).sum() / online.batch_tokens
                    part.backward()
                    loss += part.item() / online.updates
            elif ranks.size > 1:  # what meets at the step must have gone backwards on every rank
                (0.0 * torch.stack([p.sum() for p in field.networks[name].parameters()]).sum()).backward()
            norm = optimizer.step()
        figures |= ranks.sum({LOSSES[name]: loss}, "loss of the flow")
        figures[NORMS[name]] = norm
    return figures
