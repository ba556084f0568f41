"""The velocity network and the deviation; its golden numbers are in tests/golden."""

import torch

from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import velocity_deviation


def test_the_exact_velocity_has_no_deviation():
    target, context, noise = torch.randn(3, 2, 4, dtype=torch.float64)
    t, layer = torch.rand(2, 2, dtype=torch.float64)
    found = velocity_deviation(
        lambda x, t, layer, context: target - noise, target, context, noise, t, layer
    )
    assert found.tolist() == [0, 0]


def test_parameter_count_is_the_published_one():
    for hidden, depth in ((8, 1), (12, 3)):
        count = sum(p.numel() for p in VelocityNet(hidden, depth).parameters())
        assert count == hidden**2 * (7 + 5 * depth) + hidden * (522 + 6 * depth)
