"""Group normalisation and rewards-to-go; their golden numbers are in tests/golden."""

import pytest
import torch

from rlfr_vlm.algorithm.advantages import group_advantages, rewards_to_go


def advantages(rewards, graded=None, group=None):
    reward = torch.tensor(rewards, dtype=torch.float64)
    graded = torch.ones(len(rewards), dtype=torch.bool) if graded is None else torch.tensor(graded)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    return group_advantages(reward, graded, group).tolist()


def test_errors_leave_their_group():
    with_error = advantages([1, 0, 0, 0, 99], graded=[True] * 4 + [False])
    assert with_error == pytest.approx([1.5, -0.5, -0.5, -0.5, 0])


def test_a_group_with_fewer_than_two_graded_gives_zero():
    assert advantages([1, 0, 0.5], graded=[True, False, False]) == [0, 0, 0]


def test_groups_do_not_see_each_other():
    mixed = advantages([1, 5, 0, 7, 0, 5, 0, 7], group=[3, 8, 3, 8, 3, 8, 3, 8])
    assert [mixed[i] for i in (0, 2, 4, 6)] == pytest.approx(advantages([1, 0, 0, 0]))
    assert [mixed[i] for i in (1, 3, 5, 7)] == pytest.approx(advantages([5, 7, 5, 7]))


def test_rewards_to_go_stay_within_their_response():
    assert rewards_to_go(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 1])).tolist() == [3, 2, 4]


def test_rounding_of_equal_rewards_is_no_advantage():
    reward = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert reward[0] != reward[1]
    graded, group = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    for scale in (True, False):
        assert group_advantages(reward, graded, group, scale).tolist() == [0.0, 0.0, 0.0]
