"""The velocity network and the deviation (golden vectors H1, H2, H14)."""

import math

import pytest
import torch

from rlfr_vlm.flow.latents import resolve_layers
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import debias_weight, velocity_deviation

H = torch.tensor([[1, 2, -1, 0.5], [0.2, -0.4, 0.6, -0.8]], dtype=torch.float64)
Z = torch.tensor([[0.5, -1, 1, 0], [1, 0, -1, 0.5]], dtype=torch.float64)
C = torch.tensor([[0.3, -0.1, 0.7, 0.2], [1, 2, -1, 0.5]], dtype=torch.float64)
LAYER = torch.full((2,), 0.25, dtype=torch.float64)


def golden_network() -> VelocityNet:
    network = VelocityNet(4, depth=1, eps=1e-6).double()
    half = 128
    exact = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)[None]
    for embedding in (network.time_embed, network.layer_embed):
        embedding.freqs.copy_(exact)
    names = sorted(f"model.{name}" for name, _ in network.named_parameters())
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for j, name in enumerate(names):
            parameter = parameters[name.removeprefix("model.")]
            i = torch.arange(parameter.numel(), dtype=torch.float64)
            value = 0.1 * torch.sin(i + 1 + 0.7 * j)
            if name.endswith(("in_ln.weight", "norm_final.weight")):
                value += 1
            parameter.copy_(value.view_as(parameter))
    return network


@pytest.mark.parametrize(
    ("t", "velocity", "deviation"),
    [
        (0.5, [[0.054116, -0.318699, 0.124642, 0.044814], [0.009701, -0.312537, 0.161002, -0.008880]], [3.983468, 1.100243]),
        (0.8, [[0.040623, -0.257984, 0.058762, 0.070223], [0.028560, -0.335998, 0.172813, -0.000860]], [3.812174, 1.103808]),
    ],
)
def test_h1_full_network(t, velocity, deviation):
    network = golden_network()
    time = torch.full((2,), t, dtype=torch.float64)
    x_t = (1 - t) * Z + t * H
    predicted = network(x_t, time, LAYER, C)
    assert torch.allclose(predicted, torch.tensor(velocity, dtype=torch.float64), atol=1e-6)
    found = velocity_deviation(network, H, C, Z, time, LAYER)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(deviation, abs=1e-6)


def test_h1_two_times_are_each_weighted_by_their_own():
    network = golden_network()
    deviations = {t: velocity_deviation(network, H, C, Z, torch.full((2,), t, dtype=torch.float64), LAYER) for t in (0.5, 0.8)}
    score = sum(debias_weight(t) * d for t, d in deviations.items()) / 2
    assert (sum(deviations.values()) / 2).tolist() == pytest.approx([3.897821, 1.102025], abs=1e-6)
    assert score.tolist() == pytest.approx([9.616083, 2.757738], abs=1e-6)


def test_h2_a_new_network_is_zero_everywhere():
    network = VelocityNet(4, depth=2).double()
    for t in (0.1, 0.8):
        found = velocity_deviation(network, H, C, Z, torch.full((2,), t, dtype=torch.float64), LAYER)
        assert found.tolist() == pytest.approx([3.375, 1.2625])
    assert (debias_weight(0.8) * found).tolist() == pytest.approx([13.5, 5.05])


def test_the_exact_velocity_has_no_deviation():
    found = velocity_deviation(lambda x, t, layer, context: H - Z, H, C, Z, torch.rand(2, dtype=torch.float64), LAYER)
    assert found.tolist() == [0, 0]


def test_parameter_count_is_the_published_one():
    for hidden, depth in ((8, 1), (12, 3)):
        count = sum(p.numel() for p in VelocityNet(hidden, depth).parameters())
        assert count == hidden**2 * (7 + 5 * depth) + hidden * (522 + 6 * depth)


@pytest.mark.parametrize(
    ("num_layers", "fractions", "layers"),
    [
        (28, (0.25, 0.5, 0.75), (7, 14, 21)),
        (32, (0.25, 0.5, 0.75), (8, 16, 24)),
        (36, (0.25, 0.5, 0.75), (9, 18, 27)),
        (26, (0.25, 0.5, 0.75), (6, 13, 20)),
        (30, (0.25, 0.5, 0.75), (8, 15, 22)),
        (6, (0.25, 0.5, 0.75), (2, 3, 4)),
        (28, (1.0,), (27,)),
    ],
)
def test_h14_layers(num_layers, fractions, layers):
    assert resolve_layers(fractions, num_layers) == layers


def test_h14_logit_normal():
    assert torch.sigmoid(torch.tensor([-1.0, 0, 1])).tolist() == pytest.approx([0.268941, 0.5, 0.731059], abs=1e-6)
