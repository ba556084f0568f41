"""Attention over packed sequences, plugged into transformers as one attention implementation for
every family.

The models call `packed_attention` with the `layout` that was passed to their forward; the layout
knows which tokens see which. Passing it as an argument, not as global state, keeps recomputation
under gradient checkpointing right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlfr_vlm.errors import UserError

IMPLEMENTATION = "rlfr_packed"
SHORT_KEYS = 512  # up to here the scores of a sequence fit the cache
# attention weights, over all heads, that exist at once where someone watches
WATCHED_WEIGHTS = 2**24


class Layout(Protocol):
    """Which tokens see which."""

    max_keys: int  # tokens that the longest sequence holds

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query: [1, H, S, D]; key, value: [1, H_kv, S, D]. Returns [1, S, H, D]."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) that see the prefix [prefix_start, prefix_end) and, causally, one
    another.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(own tokens, prefix tokens)."""
        return self.end - self.start, self.prefix_end - self.prefix_start


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Queries are the last `num_queries` of `num_keys` tokens. Returns [num_queries, num_keys]
    bool, true where visible.
    """
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(
        num_keys - num_queries
    )


def grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled dot-product attention with shared key/value heads, without repeating them.

    The query heads that share a key/value head are laid out as further query rows.
    query: [n, H, R, D]; key, value: [n, H_kv, K, D]; mask: [R, K] or [n, 1, R, K] bool. Returns [n,
        H, R, D].
    """
    n, heads, rows, size = query.shape
    kv_heads = key.shape[1]
    repeats = heads // kv_heads
    folded = query.reshape(n, kv_heads, repeats * rows, size)
    tiled = mask.repeat(*([1] * (mask.dim() - 2)), repeats, 1)
    if (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and mask.dim() == 2
        and mask.shape[1] <= SHORT_KEYS
    ):
        return _short_attention(folded, key, value, tiled, scale).view(n, heads, rows, size)
    return F.scaled_dot_product_attention(folded, key, value, attn_mask=tiled, scale=scale).reshape(
        n, heads, rows, size
    )


def _short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The same with plain products: for short sequences in bfloat16 on CPU, torch's fused kernel
    takes 3 to 8 times longer in the backward.

    query: [n, H, R, D]; key, value: [n, H, K, D]; mask: [R, K] bool. Returns [n * H, R, D].
    """
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    queries, keys, values = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(
        bias.expand(len(queries), -1, -1), queries, keys.transpose(1, 2), alpha=scale
    )
    return torch.bmm(scores.softmax(-1), values)


class PackedLayout:
    """Sequences end to end, where several may share one prefix: the prompt of a group stands once,
    followed by its responses.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = tuple(segments)
        self.max_keys = max(sum(s.shape) for s in segments)
        self.device = device
        if device.type == "cuda":
            self._prepare_varlen(device)

    @cached_property
    def _plan(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Segments of one shape are attended together: (query rows, key rows, mask) per shape, and
        where each output row belongs.
        """
        device = self.device
        by_shape: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        for segment in self.segments:
            by_shape[segment.shape].append(segment)
        blocks = []
        for (own, prefix), members in by_shape.items():
            query_rows = torch.tensor([[*range(s.start, s.end)] for s in members], device=device)
            key_rows = torch.tensor(
                [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in members],
                device=device,
            )
            blocks.append((query_rows, key_rows, causal_mask(own, own + prefix, device)))
        order = torch.cat([rows.flatten() for rows, _, _ in blocks])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=device)
        return blocks, inverse

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See Layout."""
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(query, key, value, scale)
        outputs = []
        blocks, inverse = self._plan
        for query_rows, key_rows, mask in blocks:
            attended = grouped_sdpa(
                _rows(query, query_rows), _rows(key, key_rows), _rows(value, key_rows), mask, scale
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))  # [n * R, H, D]
        return torch.cat(outputs).index_select(0, inverse)[None]

    def _prepare_varlen(self, device: torch.device) -> None:
        keys = [
            torch.tensor([*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)])
            for s in self.segments
        ]
        self._key_rows = torch.cat(keys).to(device)
        lengths = torch.tensor([[s.shape[0], sum(s.shape)] for s in self.segments])
        self._max_query = int(lengths[:, 0].max())
        self._starts = F.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(device=device, dtype=torch.int32)

    def _attend_varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Flash attention over ragged sequences; causal masks are aligned at the last key, as a
        shared prefix needs.
        """
        from torch.nn.attention.varlen import varlen_attn  # CUDA only

        repeats = query.shape[1] // key.shape[1]
        keys, values = (
            x[0].transpose(0, 1).index_select(0, self._key_rows).repeat_interleave(repeats, 1)
            for x in (key, value)
        )
        queries = query[0].transpose(0, 1).contiguous()
        starts = self._starts
        attended: Any = varlen_attn(
            queries,
            keys,
            values,
            starts[:, 0].contiguous(),
            starts[:, 1].contiguous(),
            self._max_query,
            self.max_keys,
            scale=scale,
            window_size=(-1, 0),
        )
        return attended[None]


@dataclass(frozen=True)
class WatchedTokens:
    """Tokens whose attention is wanted: the last `num_queries` of a sequence whose tokens see one
    another causally.
    """

    tokens: Tensor  # [K] rows of the packed batch
    num_queries: int  # R
    columns: Tensor  # [C] attention to which of the K tokens


class WatchedLayout:
    """A layout that also keeps where some tokens look. What it computes for the model is what the
    layout inside it computes.

    It is for forwards without gradients: recomputation would be counted twice.
    """

    def __init__(
        self, inner: Layout, layers: Sequence[int], watches: Sequence[WatchedTokens]
    ) -> None:
        """layers: decoder layers whose attention is averaged."""
        self.inner, self.layers, self.watches = inner, frozenset(layers), watches
        self.max_keys = inner.max_keys
        self._sums: list[Tensor | None] = [None] * len(watches)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See Layout."""
        if layer in self.layers:
            for number, watch in enumerate(self.watches):
                rows = watch.tokens[-watch.num_queries :]
                found = weights_on(
                    query[0].index_select(1, rows),
                    key[0].index_select(1, watch.tokens),
                    watch.columns,
                    scale,
                )
                before = self._sums[number]
                self._sums[number] = found if before is None else before + found
        return self.inner.attend(layer, query, key, value, scale)

    @property
    def weights(self) -> list[Tensor]:
        """Per watch, after a forward: [R, C] float32 attention weights, mean over heads and
        layers.
        """
        return [total / len(self.layers) for total in self._sums if total is not None]


@torch.no_grad()
def weights_on(query: Tensor, key: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Softmax attention weights on some keys, mean over heads. A few queries at a time: all R x K
    weights of all heads may be too many.

    query: [H, R, D], the last R of K tokens; key: [H_kv, K, D]; columns: [C]. Returns [R, C]
        float32.
    """
    heads, num_queries, size = query.shape
    kv_heads, num_keys, _ = key.shape
    keys = key.float().transpose(1, 2)
    position = torch.arange(num_keys, device=query.device)
    parts = []
    for first in range(0, num_queries, step := max(1, WATCHED_WEIGHTS // (heads * num_keys))):
        rows = query[:, first : first + step].float()
        count = rows.shape[1]
        scores = (rows.reshape(kv_heads, -1, size) @ keys).view(heads, count, num_keys) * scale
        # [count, K]: tokens that come later
        hidden = position > position[num_keys - num_queries + first :][:count, None]
        parts.append(
            scores.masked_fill_(hidden, float("-inf")).softmax(-1).mean(0).index_select(1, columns)
        )
    return torch.cat(parts)


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    """states: [1, H, S, D]; rows: [n, R]. Returns [n, H, R, D]."""
    n, length = rows.shape
    picked = states[0].index_select(1, rows.flatten())
    return picked.unflatten(1, (n, length)).transpose(0, 1)


def packed_attention(
    module: Any,  # the family's attention module
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """The attention implementation that transformers calls. Raises UserError for attention it would
    compute wrongly.
    """
    if layout is None:
        raise ValueError(
            "this model was loaded by rlfr_vlm for packed batches: call it through Policy, or load "
            "it again with transformers"
        )
    if softcap is not None:
        raise UserError("this model caps its attention scores, which packed attention does not do")
    if sliding_window is not None and layout.max_keys > sliding_window:
        raise UserError(
            f"sequences of {layout.max_keys} tokens exceed this model's sliding attention window "
            f"of {sliding_window}"
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


def register() -> str:
    """Make packed attention known to transformers; returns the name to load a model with.
    Registering again changes nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, **_kwargs: None)
    return IMPLEMENTATION
