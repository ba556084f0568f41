"""Normalisation, threshold and top-k; their golden numbers are in tests/golden."""

import pytest
import torch

from rlfr_vlm.flow.reward import filter_scores, flow_reward, normalise_scores


def test_signed_normalisations():
    scores, valid = torch.tensor([4.0, 1, 2, 9, 3]), torch.ones(5, dtype=torch.bool)
    assert normalise_scores(scores, valid, "bilateral").tolist() == pytest.approx(
        [-0.25, -1, -0.75, 1, -0.5]
    )
    mean = normalise_scores(scores, valid, "mean")
    assert mean.sum().item() == pytest.approx(0, abs=1e-6)
    assert (mean.max() - mean.min()).item() == pytest.approx(1)


def test_gamma_keeps_signs_and_is_never_nan():
    found = normalise_scores(
        torch.tensor([4.0, 1, 9]), torch.ones(3, dtype=torch.bool), "bilateral", gamma=0.5
    )
    assert found.tolist() == pytest.approx([-0.5, -1, 1])


def test_ties_keep_the_earlier_token():
    assert filter_scores(torch.tensor([0.9, 0.9, 0.9]), "minmax", 0.5, 2).tolist() == pytest.approx(
        [0.9, 0.9, 0]
    )


def test_filters_switch_off():
    scores = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(filter_scores(scores, "minmax", 0, 0), scores)


def test_the_released_configuration_only_charges():
    torch.manual_seed(0)
    reward = flow_reward(
        torch.rand(200),
        torch.ones(200, dtype=torch.bool),
        torch.tensor([120, 80]),
        0.01,
        "minmax",
        0.6,
        15,
    )
    assert (reward <= 0).all()
    assert [int((part != 0).sum()) for part in reward.split([120, 80])] == [15, 15]
    assert all(part.sum() >= -0.15 - 1e-6 for part in reward.split([120, 80]))


def test_responses_do_not_see_each_other():
    torch.manual_seed(0)
    a, b = torch.rand(30), torch.rand(20) * 100
    together = flow_reward(
        torch.cat([a, b]),
        torch.ones(50, dtype=torch.bool),
        torch.tensor([30, 20]),
        0.01,
        "bilateral",
        0.6,
        6,
    )
    alone = flow_reward(
        a, torch.ones(30, dtype=torch.bool), torch.tensor([30]), 0.01, "bilateral", 0.6, 6
    )
    assert torch.equal(together[:30], alone)
