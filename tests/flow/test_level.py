"""Rewards that keep a response's level, and where the charge stands."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.official import export_field
from rlfr_vlm.flow.reference import unfit_loss
from rlfr_vlm.flow.reward import (
    Siblings,
    TokenTypes,
    book_later,
    centre_by_type,
    centre_in_group,
    flow_reward,
    normalise_group,
)
from rlfr_vlm.flow.separation import separation, wins
from rlfr_vlm.flow.spec import FlowSpec, Scale, check_spec
from rlfr_vlm.flow.yardstick import Linear, scale_of, velocities

SPEC = FlowSpec(
    (1, 2), 4, ("token_post",), (1,), (0.8,), 1, {"hidden_size": 8, "rms_norm_eps": 1e-6}
)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1])
YES = torch.ones(6, dtype=torch.bool)


def test_min_max_over_siblings_keeps_who_strays_more():
    scores = torch.tensor(
        [1.0, 2.0, 4.0, 5.0, 7.0, 7.0]
    )  # the first response strays less than the second everywhere
    assert normalise_group(scores, YES, GROUP, "group").tolist() == [0.0, 0.25, 0.75, 1.0, 0.0, 0.0]
    inside = normalise_group(
        scores, torch.tensor([True, True, False, True, True, True]), GROUP, "group"
    )
    assert inside.tolist() == [0.0, 0.25, 0.0, 1.0, 0.0, 0.0]
    z = normalise_group(scores, YES, GROUP, "group_z")
    assert z[:4].mean().item() == pytest.approx(0, abs=1e-6) and z[
        :4
    ].std().item() == pytest.approx(1)
    each = flow_reward(scores[:4], YES[:4], torch.tensor([2, 2]), 1.0, "minmax", 0, 0)
    assert each.tolist() == [
        0.0,
        -1.0,
        0.0,
        -1.0,
    ]  # what is published cannot tell the two responses apart


def test_token_types_know_what_is_usual_for_a_token():
    ids = torch.tensor([5] * 10 + [9] * 10 + [7])
    scores = torch.cat([torch.linspace(1, 2, 10), torch.linspace(11, 13, 10), torch.tensor([50.0])])
    types = TokenTypes.of(scores, ids)
    assert types.ids.tolist() == [5, 9] and len(types.mean) == 3
    z = types.z(torch.tensor([1.5, 12.0, 12.0]), torch.tensor([5, 9, 5]))
    assert z[:2].tolist() == pytest.approx([0, 0], abs=1e-5) and z[2] > 10
    assert (
        types.z(torch.tensor([1.0]), torch.tensor([999])).isfinite().all()
    )  # a token that the fit never saw
    siblings = Siblings(torch.zeros(1, dtype=torch.long), torch.tensor([5]), types)
    assert (
        flow_reward(
            torch.tensor([1.5]),
            YES[:1],
            torch.tensor([1]),
            0.3,
            "token_type",
            0,
            0,
            siblings=siblings,
        ).abs()
        < 1e-5
    )


def test_a_charge_moves_to_the_context_within_its_response():
    assert book_later(
        torch.tensor([1.0, 2.0, 0.0, 3.0, 0.0]), torch.tensor([3, 2]), 1
    ).tolist() == [0, 1, 2, 0, 3]
    assert book_later(torch.tensor([1.0]), torch.tensor([1]), 2).tolist() == [0]


def test_centring_is_over_the_valid_tokens_of_a_group():
    found = centre_in_group(
        torch.tensor([1.0, 3.0, 9.0, 2.0, 5.0, 5.0]),
        torch.tensor([True, True, False, True, True, True]),
        GROUP,
    )
    assert found.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_centring_by_type_leaves_no_liking_for_a_token_and_knows_other_parts_of_the_step():
    ids, valid = torch.tensor([5, 5, 7, 7, 9]), torch.tensor([True, True, True, False, True])
    values = torch.tensor([1.0, 3.0, 4.0, 100.0, 2.0])
    assert centre_by_type(values, valid, ids).tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]
    elsewhere = {"sum 5": 8.0, "count 5": 1.0, "sum 11": 1.0, "count 11": 1.0}

    def total(own):
        return {name: own.get(name, 0.0) + elsewhere.get(name, 0.0) for name in own | elsewhere}

    assert centre_by_type(values, valid, ids, total).tolist() == [-3.0, -1.0, 0.0, 0.0, 0.0]


def test_pairs_of_siblings_are_counted_by_hand():
    assert wins([3.0, 1.0, 2.0, 2.0], [False, True, False, True]) == (3.0 + 0.5, 4)
    found = separation(
        [3.0, 1.0, 2.0, 2.0, 0.0, 9.0], [False, True, False, True, True, True], [0, 0, 0, 0, 1, 1]
    )
    assert (
        found.auc == pytest.approx(3.5 / 4)
        and found.pairs == 4
        and found.low <= found.auc <= found.high
    )
    assert separation([1.0, 2.0], [True, True], [0, 0]) is None
    assert separation([], [], []) is None
    assert wins([float("nan"), 1.0, 0.0], [False, False, True]) == (1.0, 1)


def test_pairs_are_the_statistic_of_mann_and_whitney():
    random = np.random.default_rng(0)
    for _ in range(20):
        values, correct = random.integers(0, 6, 30).astype(float), random.random(30) < 0.4
        expected = mannwhitneyu(values[~correct], values[correct]).statistic
        assert wins(values, correct) == (expected, correct.sum() * (~correct).sum())


def test_the_yardsticks_deviate_by_what_theory_says():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(20000, 3, generator=generator)
    target = (
        context @ torch.randn(3, 5, generator=generator)
        + 0.5 * torch.randn(20000, 5, generator=generator)
        + 2.0
    )
    noise, t = torch.randn(20000, 5, generator=generator), torch.full((20000,), 0.8)
    x_t = 0.2 * noise + 0.8 * target
    linear = Linear.fit(target, context)
    found = {
        name: (velocity(x_t, t, t, context) - (target - noise)).square().mean().item()
        for name, velocity in velocities(target.mean(0), linear).items()
    }
    assert found["zero"] == pytest.approx(target.square().mean().item() + 1, rel=0.02)
    assert found["constant"] == pytest.approx(target.var(0).mean().item() + 1, rel=0.02)
    assert found["x_t / t"] == pytest.approx(unfit_loss((0.8,)), rel=0.02)
    assert found["E[h | context]"] == pytest.approx(0.25 + 1, rel=0.02)
    assert found["Gaussian given it"] == pytest.approx(
        0.25 / (0.64 * 0.25 + 0.04), rel=0.02
    )  # the best that can be done


def test_a_scale_standardises_and_its_digest_is_compared(tmp_path):
    states = torch.randn(2, 500, 8) * torch.linspace(0.1, 100, 8) + 7
    scale = scale_of([states[:, :200], states[:, 200:]])
    found = scale.apply(states)
    assert found.mean(1).abs().max() < 1e-3 and (found.std(1) - 1).abs().max() < 0.01
    spec = FlowSpec(
        **{**vars(SPEC), "standardise": True, "contrast": "own", "prompt_context": True}
    )
    field = FlowField(spec, scale=scale)
    field.types = TokenTypes.of(torch.randn(50), torch.arange(50) % 3)
    field.save(tmp_path)
    again = FlowField.load(tmp_path, spec)
    assert again.tensors().keys() == field.tensors().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.tensors().values(), field.tensors().values(), strict=True)
    )
    other = FlowField(spec, scale=Scale(scale.mean + 1, scale.std))
    with pytest.raises(UserError, match="statistics"):
        FlowField.load(tmp_path, other.spec)
    (tmp_path / "flow_config.json").write_text(
        (tmp_path / "flow_config.json").read_text().replace(field.spec.statistics, "0" * 16)
    )
    with pytest.raises(UserError, match="not of one fit"):
        FlowField.load(tmp_path, spec)


def test_a_published_field_has_none_of_it():
    plain = FlowField(SPEC)
    assert plain.tensors().keys() == VelocityNet(8, 1).state_dict().keys()
    with pytest.raises(UserError, match="standardise: checkpoint False, run True"):
        check_spec(SPEC, FlowSpec(**{**vars(SPEC), "standardise": True}), "a field")


def test_a_new_contrast_charges_nothing():
    field = FlowField(FlowSpec(**{**vars(SPEC), "contrast": "wrong"}))
    assert all(
        torch.equal(a, b)
        for a, b in zip(field.network.parameters(), field.contrast.parameters(), strict=True)
    )
    assert field.contrast is not field.network


def test_an_informed_field_is_not_exported_for_the_published_code(tmp_path):
    field = FlowField(
        FlowSpec(**{**vars(SPEC), "standardise": True}),
        scale=Scale(torch.zeros(2, 8), torch.ones(2, 8)),
    )
    field.save(tmp_path)
    with pytest.raises(UserError, match="has no standardise"):
        export_field(tmp_path, tmp_path / "out")
