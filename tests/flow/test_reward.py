"""Normalisation, threshold and top-k (golden vectors H3, H4)."""

import pytest
import torch

from rlfr_vlm.flow.reward import filter_scores, flow_reward, normalise_scores


@pytest.mark.parametrize(
    ("scores", "mask", "expected"),
    [
        ([2, 5, 3, 8, 9, 9], [1, 1, 1, 1, 0, 0], [0, 0.5, 0.166667, 1, 0, 0]),
        ([4, 1, 2, 3, 6, 11], [1] * 6, [0.3, 0, 0.1, 0.2, 0.5, 1]),
        ([7, 7, 7, 7, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6),
        ([5, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6),
    ],
)
def test_h3_minmax(scores, mask, expected):
    valid = torch.tensor(mask, dtype=torch.bool)
    values = torch.tensor(scores, dtype=torch.float64)
    assert normalise_scores(values, valid, "minmax").tolist() == pytest.approx(expected, abs=1e-6)
    values[~valid] = 1e9
    assert normalise_scores(values, valid, "minmax").tolist() == pytest.approx(expected, abs=1e-6)


def test_signed_normalisations():
    scores, valid = torch.tensor([4.0, 1, 2, 9, 3]), torch.ones(5, dtype=torch.bool)
    assert normalise_scores(scores, valid, "bilateral").tolist() == pytest.approx([-0.25, -1, -0.75, 1, -0.5])
    mean = normalise_scores(scores, valid, "mean")
    assert mean.sum().item() == pytest.approx(0, abs=1e-6)
    assert (mean.max() - mean.min()).item() == pytest.approx(1)


def test_gamma_keeps_signs_and_is_never_nan():
    found = normalise_scores(torch.tensor([4.0, 1, 9]), torch.ones(3, dtype=torch.bool), "bilateral", gamma=0.5)
    assert found.tolist() == pytest.approx([-0.5, -1, 1])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.95, 0.7, 0.61, 0.6, 0.99, 0.8], [0, 0.95, 0, 0, 0, 0.99, 0.8]),
        ([0.65, 0.2, 0.9, 0, 0, 0, 0], [0.65, 0, 0.9, 0, 0, 0, 0]),
        ([0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1], [0, 0, 0, 0, 0.9, 0.95, 1]),
    ],
)
def test_h4_threshold_and_top_k(scores, expected):
    given = torch.tensor(scores, dtype=torch.float64)
    assert filter_scores(given, "minmax", 0.6, 3).tolist() == pytest.approx(expected)
    assert given.tolist() == scores


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([-1, -0.9, -0.8, -0.1, 0, 0.8, 0.9, 1], [-1, -0.9, 0, 0, 0, 0, 0.9, 1]),
        ([0.7, 0.8, 0.9, 0.95, 1, -0.7], [0, 0, 0, 0.95, 1, -0.7]),
    ],
)
def test_h4_bilateral_top_k_is_per_sign(scores, expected):
    assert filter_scores(torch.tensor(scores, dtype=torch.float64), "bilateral", 0.6, 4).tolist() == pytest.approx(expected)


def test_exactly_the_threshold_is_dropped():
    assert filter_scores(torch.tensor([0.6, 0.61], dtype=torch.float64), "minmax", 0.6, 0).tolist() == pytest.approx([0, 0.61])


def test_ties_keep_the_earlier_token():
    assert filter_scores(torch.tensor([0.9, 0.9, 0.9]), "minmax", 0.5, 2).tolist() == pytest.approx([0.9, 0.9, 0])


def test_filters_switch_off():
    scores = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(filter_scores(scores, "minmax", 0, 0), scores)


def test_the_released_configuration_only_charges():
    torch.manual_seed(0)
    reward = flow_reward(torch.rand(200), torch.ones(200, dtype=torch.bool), torch.tensor([120, 80]), 0.01, "minmax", 0.6, 15)
    assert (reward <= 0).all()
    assert [int((part != 0).sum()) for part in reward.split([120, 80])] == [15, 15]
    assert all(part.sum() >= -0.15 - 1e-6 for part in reward.split([120, 80]))


def test_responses_do_not_see_each_other():
    torch.manual_seed(0)
    a, b = torch.rand(30), torch.rand(20) * 100
    together = flow_reward(torch.cat([a, b]), torch.ones(50, dtype=torch.bool), torch.tensor([30, 20]), 0.01, "bilateral", 0.6, 6)
    alone = flow_reward(a, torch.ones(30, dtype=torch.bool), torch.tensor([30]), 0.01, "bilateral", 0.6, 6)
    assert torch.equal(together[:30], alone)
