"""Which responses and tokens the flow follows, by hand."""

from types import SimpleNamespace

import pytest
import torch

from rlfr_vlm.algorithm.selection import flow_token_weights, flow_weights
from rlfr_vlm.config import FlowOnlineConfig
from rlfr_vlm.types import Outcome

RIGHT, WRONG = (
    SimpleNamespace(outcome=Outcome(reward, verdict))
    for reward, verdict in ((1.0, "correct"), (0.0, "wrong"))
)


def test_a_contrast_follows_all_responses_or_the_wrong_ones():
    samples = [RIGHT, WRONG, WRONG]
    found = {
        how: flow_weights(FlowOnlineConfig(), samples, contrast=how) for how in ("own", "wrong")
    }
    assert found["own"] == pytest.approx([1 / 3] * 3)
    assert found["wrong"] == [0.0, 0.5, 0.5]


def test_a_token_at_the_quantile_is_followed():
    cfg = FlowOnlineConfig(select=("correct", "entropy"), entropy_quantile=0.5)
    entropy, valid = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool)
    assert flow_token_weights(cfg, [1.0], [3], valid, entropy).tolist() == [0.0, 0.5, 0.5]
