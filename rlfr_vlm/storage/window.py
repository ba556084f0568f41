"""The latents that a field learns from online, in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.stored import StoredLatents
from rlfr_vlm.learner.latent_window import Kept, LatentWindow
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.storage.shards import ShardReader, ShardWriter

STEM = "window"  # of the files


def save_window(window: LatentWindow, folder: Path) -> None:
    """Into this rank's folder of a checkpoint."""
    with ShardWriter(folder, STEM) as file:
        for kept in window.kept:
            name = "/".join(map(str, kept.key))
            for part, tensor in _tensors(kept.stored).items():
                file.add(f"{name}/{part}", tensor)


def load_window(window: LatentWindow, folder: Path, ranks: Ranks) -> None:
    """This rank's share of a checkpoint's responses, whatever the number of ranks that wrote it."""
    reader = ShardReader(folder, STEM)
    keys = sorted({tuple(map(int, name.split("/")[:4])) for name in reader.names})
    window.kept = []
    for place, key in enumerate(keys):
        if place % ranks.size == ranks.rank:
            name = "/".join(map(str, key))
            parts = {
                part: reader.find(f"{name}/{part}")
                for part in ("states", "target", "context", "valid", "prompt", "token_ids")
            }
            token_ids = parts.pop("token_ids")
            assert token_ids is not None and len(key) == 4
            latents = Latents(**parts)  # type: ignore[arg-type]
            nothing = torch.zeros(len(token_ids), dtype=torch.long)
            stored = StoredLatents(latents, token_ids, nothing)
            window.kept.append(Kept(key, stored))


def _tensors(stored: StoredLatents) -> dict[str, Tensor]:
    latents = stored.latents
    every = {
        "states": latents.states,
        "target": latents.target,
        "context": latents.context,
        "valid": latents.valid,
        "prompt": latents.prompt,
    }
    return {name: tensor for name, tensor in every.items() if tensor is not None} | {
        "token_ids": stored.token_ids
    }
