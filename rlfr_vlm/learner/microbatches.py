"""A rank's micro-batches: as many as every other rank has, with pictures where any rank has some.

Sharded weights are gathered by all ranks in step: a rank that went through the vision tower alone,
or backwards once more than the others, would wait for them for ever. What is added for that has no
response, or one that nobody learns from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from rlfr_vlm.models.pack import PackedBatch, micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout

BLANK_TOKENS = 2  # a side: the least that Qwen's processors take


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's rollouts, packed."""

    rows: list[int]  # which; empty in a batch that only keeps step with other ranks
    batch: PackedBatch


def synchronised(
    rollouts: Sequence[Rollout], token_budget: int, policy: Policy, ranks: Ranks
) -> Iterator[MicroBatch]:
    """Micro-batches of at most `token_budget` packed tokens each (a longer single rollout goes
    alone).
    """
    parts = micro_batches(rollouts, token_budget)
    if ranks.size == 1:
        yield from (
            MicroBatch(part, pack([rollouts[i] for i in part], policy.device)) for part in parts
        )
        return
    own = [any(rollouts[i].prompt.vision for i in part) for part in parts]
    everyone = ranks.gather(own, "agreeing on micro-batches")
    for k in range(max(len(found) for found in everyone)):
        part = parts[k] if k < len(parts) else []
        pictures = any(found[k] for found in everyone if k < len(found))
        blank = blank_prompt(policy) if pictures and not (part and own[k]) else None
        yield MicroBatch(
            part, pack([rollouts[i] for i in part] or [filler(policy)], policy.device, blank)
        )


def filler(policy: Policy) -> Rollout:
    """A response of one token to a prompt of one token."""
    token = policy.eos_token_ids[0]
    return Rollout(_encoded((token,), policy, {}), 0, (token,), (0.0,), "", "stop", 0)


def blank_prompt(policy: Policy) -> EncodedPrompt:
    """A small grey picture's tokens and nothing else."""
    processor = policy.processor.image_processor
    side = BLANK_TOKENS * processor.patch_size * processor.merge_size
    features = processor(
        images=[Image.new("RGB", (side, side), (128, 128, 128))],
        return_tensors="pt",
        do_resize=False,
    )
    vision = {
        "pixel_values": features["pixel_values"].to(policy.dtype),
        "image_grid_thw": features["image_grid_thw"],
    }
    count = int(vision["image_grid_thw"].prod()) // processor.merge_size**2
    assert policy.image_token_id is not None
    return _encoded((policy.image_token_id,) * count, policy, vision)


def _encoded(tokens: tuple[int, ...], policy: Policy, vision: dict[str, Any]) -> EncodedPrompt:
    positions: torch.Tensor = policy.position_ids(tokens, vision)
    return EncodedPrompt(Prompt("filler", (), (), ""), tokens, tokens, positions, vision=vision)
