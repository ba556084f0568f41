"""Group normalisation and rewards-to-go (golden vectors H5, H6)."""

import pytest
import torch

from rlfr_vlm.advantages import group_advantages, rewards_to_go
from rlfr_vlm.flow.reward import flow_reward


def advantages(rewards, graded=None, group=None, dtype=torch.float64):
    reward = torch.tensor(rewards, dtype=dtype)
    graded = torch.ones(len(rewards), dtype=torch.bool) if graded is None else torch.tensor(graded)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    return group_advantages(reward, graded, group).tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        ([1, 1, 0.5, 0, 0, 0.5, 1, 0], [1.080123, 1.080123, 0, -1.080123, -1.080123, 0, 1.080123, -1.080123]),
        ([1, 0.5, 0, 0.5], [1.224745, 0, -1.224745, 0]),
        ([0.5] * 4, [0] * 4),
    ],
)
def test_h5_group_norm(rewards, expected):
    assert advantages(rewards) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("value", "count"), [(0.1, 8), (0.7, 7), (1 / 3, 8)])
def test_h5_equal_float32_rewards_give_exactly_zero(value, count):
    assert advantages([value] * count, dtype=torch.float32) == [0.0] * count


def test_errors_leave_their_group():
    with_error = advantages([1, 0, 0, 0, 99], graded=[True] * 4 + [False])
    assert with_error == pytest.approx([1.5, -0.5, -0.5, -0.5, 0])


def test_a_group_with_fewer_than_two_graded_gives_zero():
    assert advantages([1, 0, 0.5], graded=[True, False, False]) == [0, 0, 0]


def test_groups_do_not_see_each_other():
    mixed = advantages([1, 5, 0, 7, 0, 5, 0, 7], group=[3, 8, 3, 8, 3, 8, 3, 8])
    assert [mixed[i] for i in (0, 2, 4, 6)] == pytest.approx(advantages([1, 0, 0, 0]))
    assert [mixed[i] for i in (1, 3, 5, 7)] == pytest.approx(advantages([5, 7, 5, 7]))


def test_h6_rewards_to_go():
    rewards = torch.tensor([0, -0.008, 0, 1.49], dtype=torch.float64)
    lengths = torch.tensor([4])
    assert rewards_to_go(rewards, lengths).tolist() == pytest.approx([1.482, 1.482, 1.49, 1.49])
    assert rewards_to_go(rewards, lengths, 0.9).tolist() == pytest.approx([1.07901, 1.1989, 1.341, 1.49])


def test_rewards_to_go_stay_within_their_response():
    assert rewards_to_go(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 1])).tolist() == [3, 2, 4]


def test_h6_end_to_end():
    deviations = torch.tensor([4.0, 1, 2, 9, 3], dtype=torch.float64)
    valid, lengths = torch.ones(5, dtype=torch.bool), torch.tensor([5])
    outcome = torch.tensor(advantages([1, 0.5, 0, 0.5]))[:1].double()
    for scale in (1.0, 4.0, 0.37):
        reward = flow_reward(deviations * scale, valid, lengths, 0.01, "minmax", 0.3, 2)
        assert reward.tolist() == pytest.approx([-0.00375, 0, 0, -0.01, 0])
        total = outcome + rewards_to_go(reward, lengths)
        assert total.tolist() == pytest.approx([1.210995, 1.214745, 1.214745, 1.214745, 1.224745], abs=1e-6)
    bilateral = flow_reward(deviations, valid, lengths, 0.01, "bilateral", 0.6, 0)
    assert bilateral.tolist() == pytest.approx([0, 0.01, 0.0075, -0.01, 0])
