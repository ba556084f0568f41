"""Tiled log-probs and entropy against the full softmax."""

import pytest
import torch

from rlfr_vlm.models import logprobs as module


@pytest.fixture(params=[(5, 37), (100, 1000), (3, 100)])
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "TOKEN_TILE", request.param[0])
    monkeypatch.setattr(module, "VOCAB_TILE", request.param[1])


def case(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(13, 16).to(dtype).requires_grad_()
    weight = torch.randn(100, 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 90, (13,)), torch.tensor([95, 99])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_full_softmax(tiles, temperature):
    hidden, weight, tokens, banned = case()
    found, entropy = module.token_logprobs(
        hidden, weight, tokens, banned, temperature, with_entropy=True
    )
    logits = hidden @ weight.t() / temperature
    logits[:, banned] = float("-inf")
    full = logits.log_softmax(-1)
    expected = full.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(entropy, -(full.exp() * full.clamp(min=-1e30)).sum(-1), atol=1e-4)
    factor = torch.randn(13)
    ours = torch.autograd.grad((found * factor).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * factor).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_entropy_carries_no_gradient_and_is_optional():
    hidden, weight, tokens, banned = case()
    assert module.token_logprobs(hidden, weight, tokens, banned)[1] is None
    assert not module.token_logprobs(hidden, weight, tokens, banned, with_entropy=True)[
        1
    ].requires_grad


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, tokens, banned = case()
    frozen = weight.detach()
    module.token_logprobs(hidden, frozen, tokens, banned)[0].sum().backward()
    assert hidden.grad is not None and frozen.grad is None


def test_bfloat16_gradients_have_the_weights_dtype():
    hidden, weight, tokens, banned = case(torch.bfloat16)
    found, _ = module.token_logprobs(hidden, weight, tokens, banned)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
