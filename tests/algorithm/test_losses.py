"""Hand-computed cases of the losses; golden numbers are in tests/golden, numpy references in
test_numpy_references.
"""

import math

import pytest
import torch

from rlfr_vlm.algorithm.losses import policy_loss, token_weights


def per_token(ratio, advantage, **kwargs):
    logprobs = torch.tensor([ratio], dtype=torch.float64).log()
    zero = torch.zeros(1, dtype=torch.float64)
    loss, _ = policy_loss(
        logprobs - zero,
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        **kwargs,
    )
    return loss.item()


def test_clip_high_is_its_own_bound():
    assert per_token(1.5, 1.0, clip_low=0.2, clip_high=0.28) == pytest.approx(-1.28)
    assert per_token(0.5, -1.0, clip_low=0.2, clip_high=0.28) == pytest.approx(0.8)


def test_token_weights_sum_to_one_and_split_over_micro_batches():
    lengths = torch.tensor([3, 1, 6])
    for aggregation in ("token", "sequence"):
        whole = token_weights(lengths, aggregation, 10, 3)
        parts = [token_weights(part, aggregation, 10, 3) for part in (lengths[:1], lengths[1:])]
        assert whole.sum().item() == pytest.approx(1.0)
        assert torch.equal(whole, torch.cat(parts))
    assert token_weights(lengths, "token", 10, 3).tolist() == pytest.approx([0.1] * 10)
    assert token_weights(lengths, "sequence", 10, 3).tolist() == pytest.approx(
        [1 / 9] * 3 + [1 / 3] + [1 / 18] * 6
    )


def test_gradient_is_zero_where_clipped():
    logprobs = torch.tensor([math.log(1.5), 0.0], requires_grad=True)
    loss, metrics = policy_loss(logprobs, torch.ones(2), torch.full((2,), 0.5))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5])
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(0.5)
