"""Reading the language tower's latents while the policy's own forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ContextMode = Literal["token_pre", "token_post", "identity"]


def resolve_layers(fractions: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """Decoder layers at these fractions of depth: round(p * L), half to even, the last layer for p
    = 1 (arXiv:2510.10201).
    """
    return tuple(min(round(p * num_layers), num_layers - 1) for p in fractions)


@contextmanager
def capture_latents(layers: Sequence[nn.Module], rows: Tensor | None) -> Iterator[list[Tensor]]:
    """Collect rows of the outputs of decoder layers during the forwards inside the block.

    The states are detached: nothing computed from them reaches the policy. Gradient checkpointing
        recomputes layers during the backward,
    when this block has ended, so no state is captured twice. rows None captures nothing.

    layers: modules whose output is [1, S, D] (or a tuple that starts with it); rows: [R] int
        positions. Yields a list that holds, after
    the forward, one [R, D] tensor per layer in call order.
    """
    captured: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        with torch.no_grad():
            assert rows is not None
            captured.append(states.detach()[0].index_select(0, rows))

    handles = [layer.register_forward_hook(hook) for layer in (layers if rows is not None else ())]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


# where a target's context stands: its mode, and how many tokens away
Side = tuple[ContextMode, int]


@dataclass(frozen=True)
class LatentRequest:
    """Which latents a forward should hand out."""

    layers: tuple[int, ...]  # decoder layers
    sides: tuple[Side, ...]  # M of them
    prompt: bool = False  # also the last prompt token's


@dataclass(frozen=True)
class Latents:
    """States of R rows of a packed batch and where its N response tokens find their target and
    context among them.
    """

    states: Tensor  # [L, R, D], detached
    target: Tensor  # [N] int
    context: Tensor  # [M, N] int; equal to target where there is no context on that side
    valid: Tensor  # [M, N] bool: whether there is a context on that side
    prompt: Tensor | None = None  # [N] int: the last prompt token, where it was asked for

    @property
    def scorable(self) -> Tensor:
        """[N] bool: tokens with a context on at least one side."""
        return self.valid.any(0)


def context_rows(
    response_rows: Tensor,
    lengths: Tensor,
    prompt_start: Tensor,
    prompt_end: Tensor,
    mode: ContextMode,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """Packed row of each response token's context.

    token_pre: the token `shift` after it, within the response (the target precedes its context);
    token_post: the token `shift` before it, reaching into its prompt; identity: the token itself.

    response_rows: [N]; lengths, prompt_start, prompt_end: [B]. Returns rows [N] (the token's own
        where there is no context), valid [N] bool.
    """
    if mode == "identity":
        return response_rows, torch.ones_like(response_rows, dtype=torch.bool)
    first = lengths.cumsum(0) - lengths
    offset = torch.arange(
        len(response_rows), device=response_rows.device
    ) - first.repeat_interleave(lengths)
    if mode == "token_pre":
        valid = offset + shift < lengths.repeat_interleave(lengths)
        return torch.where(valid, response_rows + shift, response_rows), valid
    in_prompt = prompt_end.repeat_interleave(lengths) - (shift - offset)
    rows = torch.where(offset >= shift, response_rows - shift, in_prompt)
    valid = rows >= prompt_start.repeat_interleave(lengths)
    return torch.where(valid, rows, response_rows), valid
