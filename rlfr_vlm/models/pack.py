"""Rollouts end to end, without padding, with each group's prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_vlm.models.attention import Layout, PackedLayout, Segment
from rlfr_vlm.types import EncodedPrompt, Rollout


@dataclass(frozen=True)
class PackedBatch:
    """S tokens of prompts and responses; N of them are response tokens, of B responses."""

    token_ids: Tensor  # [S]
    position_ids: Tensor  # [A, S]
    layout: Layout
    vision: dict[str, Tensor]  # of the prompts in order, concatenated
    response_ids: Tensor  # [N]
    response_rows: Tensor  # [N] where each response token stands
    # [N] whose state predicts it: the token before, for the first one the prompt's last
    predict_rows: Tensor
    lengths: Tensor  # [B] response tokens
    prompt_start: Tensor  # [B] first row of the response's prompt
    prompt_end: Tensor  # [B] one past its last row

    @property
    def starts(self) -> Tensor:
        """[B] row of each response's first token."""
        return self.response_rows[self.lengths.cumsum(0) - self.lengths]


def pack(
    rollouts: Sequence[Rollout],
    device: torch.device | str = "cpu",
    unanswered: EncodedPrompt | None = None,
) -> PackedBatch:
    """Lay rollouts end to end. Neighbours that share one EncodedPrompt object share its tokens;
    their responses start at its next position.

    unanswered: a prompt that stands at the end by itself and changes nothing: its pictures take the
        batch through the vision tower.
    """
    device = torch.device(device)
    tokens: list[int] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    prompts: list[EncodedPrompt] = []
    spans: list[tuple[int, int, int]] = []  # prompt start, prompt end, response start
    for rollout in rollouts:
        prompt = rollout.prompt
        if not prompts or prompts[-1] is not prompt:
            prompts.append(prompt)
            prompt_start = len(tokens)
            tokens += prompt.token_ids
            positions.append(prompt.position_ids)
            segments.append(Segment(prompt_start, len(tokens)))
            prompt_end = len(tokens)
        start = len(tokens)
        tokens += rollout.token_ids
        positions.append(response_positions(prompt, len(rollout.token_ids)))
        segments.append(Segment(start, len(tokens), prompt_start, prompt_end))
        spans.append((prompt_start, prompt_end, start))
    if unanswered is not None:
        prompts.append(unanswered)
        segments.append(Segment(len(tokens), len(tokens) + len(unanswered.token_ids)))
        tokens += unanswered.token_ids
        positions.append(unanswered.position_ids)
    lengths = torch.tensor([len(r.token_ids) for r in rollouts])
    prompt_starts, prompt_ends, starts = torch.tensor(spans).t()
    response_rows = torch.cat(
        [torch.arange(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    )
    predict_rows = response_rows - 1
    predict_rows[lengths.cumsum(0) - lengths] = prompt_ends - 1
    token_ids = torch.tensor(tokens)
    return PackedBatch(
        token_ids=token_ids.to(device),
        position_ids=torch.cat(positions, dim=1).to(device),
        layout=PackedLayout([s for s in segments if s.end > s.start], device),
        vision={k: v.to(device) for k, v in concatenate_vision(prompts).items()},
        response_ids=token_ids[response_rows].to(device),
        response_rows=response_rows.to(device),
        predict_rows=predict_rows.to(device),
        lengths=lengths.to(device),
        prompt_start=prompt_starts.to(device),
        prompt_end=prompt_ends.to(device),
    )


def response_positions(prompt: EncodedPrompt, length: int) -> Tensor:
    """Rotary positions of a response: one step after the largest of its prompt, the same on every
    axis. Returns [A, length].
    """
    first = int(prompt.position_ids.max()) + 1
    return torch.arange(first, first + length).expand(len(prompt.position_ids), length)


def concatenate_vision(prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
    """The vision tensors of the prompts in order; prompts without pictures add nothing."""
    bundles = [p.vision for p in prompts if p.vision]
    return {
        key: torch.cat([bundle[key] for bundle in bundles])
        for key in (bundles[0] if bundles else ())
    }


def micro_batches(rollouts: Sequence[Rollout], token_budget: int) -> list[list[int]]:
    """Split rollouts, in order, into runs of indices of at most `token_budget` packed tokens; a
    longer single rollout goes alone.
    """
    parts: list[list[int]] = []
    used = token_budget + 1
    for index, rollout in enumerate(rollouts):
        shared = bool(parts) and rollouts[parts[-1][-1]].prompt is rollout.prompt
        added = len(rollout.token_ids) + (0 if shared else len(rollout.prompt.token_ids))
        if used + added > token_budget:
            parts.append([])
            used, added = 0, len(rollout.token_ids) + len(rollout.prompt.token_ids)
        parts[-1].append(index)
        used += added
    return parts
