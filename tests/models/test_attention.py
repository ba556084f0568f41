"""Packed attention: layouts against a plain masked softmax, and what it refuses."""

import pytest
import torch

from rlfr_vlm.errors import UserError
from rlfr_vlm.models.attention import (
    PackedLayout,
    Segment,
    _short_attention,
    grouped_sdpa,
    packed_attention,
)

SEGMENTS = [
    Segment(0, 5),
    Segment(5, 12, 0, 5),
    Segment(12, 15, 0, 5),
    Segment(15, 20),
    Segment(20, 21, 15, 20),
]


def states(heads, dtype=torch.float32):
    return torch.randn(1, heads, 21, 8, generator=torch.Generator().manual_seed(heads)).to(dtype)


def visible():
    """[S, S]: which token sees which, spelled out."""
    mask = torch.zeros(21, 21, dtype=torch.bool)
    for segment in SEGMENTS:
        for row in range(segment.start, segment.end):
            mask[row, segment.prefix_start : segment.prefix_end] = True
            mask[row, segment.start : row + 1] = True
    return mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_layout_equals_a_masked_softmax(dtype, tolerance):
    query, key, value = states(4, dtype), states(2, dtype), states(2, dtype)
    found = PackedLayout(SEGMENTS, torch.device("cpu")).attend(0, query, key, value, 0.3)
    keys, values = (x.float().repeat_interleave(2, 1) for x in (key, value))
    scores = (query.float() @ keys.transpose(-1, -2) * 0.3).masked_fill(~visible(), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    assert torch.allclose(found.float(), expected, atol=tolerance)


def test_short_attention_equals_the_fused_kernel_with_gradients():
    torch.manual_seed(0)
    inputs = [
        torch.randn(3, 2, 4, 8, requires_grad=True),
        torch.randn(3, 2, 6, 8, requires_grad=True),
        torch.randn(3, 2, 6, 8, requires_grad=True),
    ]
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    fused = grouped_sdpa(*inputs, mask, 0.3)
    plain = _short_attention(*inputs, mask, 0.3).view(3, 2, 4, 8)
    assert torch.allclose(fused, plain, atol=1e-5)
    factor = torch.randn(3, 2, 4, 8)
    for a, b in zip(
        *(torch.autograd.grad((out * factor).sum(), inputs) for out in (fused, plain)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_attention_that_would_be_wrong_is_refused():
    layout = PackedLayout(SEGMENTS, torch.device("cpu"))
    arguments = (torch.nn.Module(), states(4), states(2), states(2), None, 0.3)
    with pytest.raises(UserError, match="sliding attention window of 8"):
        packed_attention(*arguments, layout=layout, sliding_window=8)
    with pytest.raises(UserError, match="caps its attention"):
        packed_attention(*arguments, layout=layout, softcap=30.0)
    with pytest.raises(ValueError, match="through Policy"):
        packed_attention(*arguments)
