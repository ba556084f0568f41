"""Log-probabilities of given tokens from hidden states, tile by tile, never the full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

TOKEN_TILE = 2048
VOCAB_TILE = 8192


def _tile_logits(
    hidden: Tensor, weight: Tensor, start: int, temperature: float, banned: Tensor
) -> Tensor:
    """Float32 logits of one vocabulary tile, divided by the temperature, banned tokens at -inf.
    Returns [n, V_tile].
    """
    logits = torch.matmul(hidden, weight[start : start + VOCAB_TILE].t()).float()
    if temperature != 1.0:
        logits /= temperature
    inside = banned[(banned >= start) & (banned < start + VOCAB_TILE)]
    if inside.numel():
        logits[:, inside - start] = float("-inf")
    return logits


class _TokenLogprobs(Function):
    """Vocabulary tiles are the outer loop of the backward, so each tile's weight gradient is
    written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        banned: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        num = len(hidden)
        log_sum = torch.empty(num, device=hidden.device)
        chosen = torch.zeros(num, device=hidden.device)
        entropy = torch.zeros(num if with_entropy else 0, device=hidden.device)
        for n in range(0, num, TOKEN_TILE):
            rows = slice(n, n + TOKEN_TILE)
            sums, expected = [], []
            for v in range(0, len(weight), VOCAB_TILE):
                logits = _tile_logits(hidden[rows], weight, v, temperature, banned)
                inside = (tokens[rows] >= v) & (tokens[rows] < v + VOCAB_TILE)
                picked = logits.gather(
                    1, (tokens[rows] - v).clamp(0, logits.shape[1] - 1)[:, None]
                )[:, 0]
                chosen[rows] = torch.where(inside, picked, chosen[rows])
                tile_sum = logits.logsumexp(-1)
                sums.append(tile_sum)
                if with_entropy:
                    finite = torch.where(tile_sum.isfinite(), tile_sum, torch.zeros_like(tile_sum))
                    expected.append(
                        ((logits - finite[:, None]).exp_() * logits.clamp_(min=-1e30)).sum(-1)
                    )
            stacked = torch.stack(sums)
            log_sum[rows] = stacked.logsumexp(0)
            if with_entropy:
                share = (stacked - log_sum[rows]).exp()
                entropy[rows] = log_sum[rows] - (share * torch.stack(expected)).sum(0)
        ctx.save_for_backward(hidden, weight, tokens, banned, log_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sum, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, banned, log_sum = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        scale = grad_logprobs.float() / ctx.temperature
        for v in range(0, len(weight), VOCAB_TILE):
            tile = weight[v : v + VOCAB_TILE]
            total = None
            for n in range(0, len(hidden), TOKEN_TILE):
                rows = slice(n, n + TOKEN_TILE)
                grad_logits = _tile_logits(hidden[rows], weight, v, ctx.temperature, banned)
                grad_logits.sub_(log_sum[rows, None]).exp_().mul_(-scale[rows, None])
                inside = ((tokens[rows] >= v) & (tokens[rows] < v + VOCAB_TILE)).nonzero()[:, 0]
                grad_logits[inside, tokens[rows][inside] - v] += scale[rows][inside]
                grad_logits = grad_logits.to(weight.dtype)
                grad_hidden[rows] += torch.matmul(grad_logits, tile)
                if grad_weight is not None:
                    part = torch.matmul(grad_logits.t(), hidden[rows])
                    total = part if total is None else total + part
            if grad_weight is not None:
                grad_weight[v : v + VOCAB_TILE] = total if total is not None else 0
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    banned: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden W^T / temperature)[token], and optionally the entropy of that
    distribution.

    The extra memory is one tile of at most TOKEN_TILE x VOCAB_TILE float32 values, whatever the
    vocabulary.

    hidden: [N, D]; weight: [V, D]; tokens: [N] int; banned: [M] int, tokens of probability zero.
        Returns logprobs [N] float32, with
    gradient to hidden and weight, and entropy [N] float32 in nats without gradient (None unless
    asked for).
    """
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, weight, tokens, banned, temperature, with_entropy
    )
    return logprobs, entropy if with_entropy else None
