"""Schedule, clipping, and master weights."""

import pytest
import torch
from torch import nn

from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.learner.optim import Optimizer, OptimizerSettings, cosine_schedule


def optimizer(parameter, lr=1e-6, master=False, max_norm=1e9):
    return Optimizer(
        {"w": parameter},
        OptimizerSettings(lr, (0.9, 0.95), 0.0, max_norm, 1000, 0.0, 1.0),
        master_weights=master,
    )


def test_schedule_warms_up_then_falls_to_its_floor():
    factors = [cosine_schedule(step, 100, 0.1, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert cosine_schedule(7, 10, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("master", [True, False])
def test_small_steps_survive_only_with_master_weights(master):
    """At lr 1e-6 a bfloat16 weight of 1 cannot move: its neighbours are 0.004 away."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optim = optimizer(parameter, lr=1e-4, master=master)
    for _ in range(60):
        parameter.grad = torch.ones(4, dtype=torch.bfloat16)
        optim.step()
    assert bool((parameter < 1).all()) is master


def test_low_precision_gradients_add_up_in_float32():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optim = optimizer(parameter, master=True)
    for _ in range(1000):
        parameter.grad = torch.full((1,), 0.001, dtype=torch.bfloat16)
        optim.accumulate()
    assert optim.step() == pytest.approx(
        1000 * float(torch.tensor(0.001, dtype=torch.bfloat16)), rel=1e-4
    )
    assert parameter.grad is None


def test_gradients_are_clipped_to_the_norm():
    parameter = nn.Parameter(torch.zeros(2))
    optim = optimizer(parameter, lr=1.0, max_norm=0.5)
    seen = []
    optim.torch.register_step_pre_hook(lambda *_: seen.append(parameter.grad.norm().item()))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optim.step() == pytest.approx(5.0)
    assert seen == [pytest.approx(0.5, rel=1e-4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("master", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(master, value):
    dtype = torch.bfloat16 if master else torch.float32
    parts = {name: nn.Parameter(torch.ones(3, dtype=dtype)) for name in ("fine", "broken")}
    settings = OptimizerSettings(0.1, (0.9, 0.95), 0.0, 1.0, 1000, 0.0, 1.0)
    optim = Optimizer(parts, settings, master_weights=master)

    def gradients(bad):
        parts["fine"].grad = torch.ones(3, dtype=dtype)
        parts["broken"].grad = torch.tensor([1.0, bad, 1.0], dtype=dtype)

    gradients(1.0)
    optim.step()
    before = [(name, tensor.clone()) for name, tensor in optim.entries()]
    weights = [p.detach().clone() for p in parts.values()]
    gradients(value)
    with pytest.raises(NonFiniteError, match=r"at update 1 \(first: `broken`\); lower optim.lr"):
        optim.step()
    assert optim.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.values(), strict=True))
    for (name, old), (_, new) in zip(before, optim.entries(), strict=True):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("master", [True, False])
def test_state_round_trip_continues_to_the_bit(master):
    dtype = torch.bfloat16 if master else torch.float32
    gradients = [
        torch.randn(8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(6)
    ]

    def run(optim, parameter, steps):
        for gradient in steps:
            parameter.grad = gradient.clone()
            optim.step()

    whole = nn.Parameter(torch.ones(8, dtype=dtype))
    run(optimizer(whole, 1e-2, master), whole, gradients)
    half = nn.Parameter(torch.ones(8, dtype=dtype))
    first = optimizer(half, 1e-2, master)
    run(first, half, gradients[:3])
    again = nn.Parameter(half.detach().clone())
    second = optimizer(again, 1e-2, master)
    second.load_entries({name: tensor.clone() for name, tensor in first.entries()}.get, first.steps)
    run(second, again, gradients[3:])
    assert torch.equal(again, whole)
