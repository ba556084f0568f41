"""What only a CUDA device can show: `pytest -m gpu`."""

import pytest
import torch

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.models.attention import PackedLayout, Segment, grouped_sdpa
from rlfr_vlm.models.attribution import attribute
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from tests.models.test_policy import VISION, rollouts_of
from tests.training.test_update import config, setup, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_varlen_attention_equals_the_plain_one():
    segments = [
        Segment(0, 5),
        Segment(5, 12, 0, 5),
        Segment(12, 15, 0, 5),
        Segment(15, 40),
        Segment(40, 41, 15, 40),
    ]
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 41, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    layout = PackedLayout(segments, torch.device("cuda"))
    found = layout.attend(0, query, key, value, 0.125).float()
    expected = layout.attend(0, query.float(), key.float(), value.float(), 0.125)
    assert torch.allclose(found, expected, atol=2e-2)
    mask = torch.ones(5, 5, dtype=torch.bool, device="cuda").tril()
    first = grouped_sdpa(
        query[:, :, :5].float(), key[:, :, :5].float(), value[:, :, :5].float(), mask, 0.125
    )
    assert torch.allclose(expected[0, :5], first[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_logprobs_on_the_device_equal_those_on_the_cpu(model_folder, family):
    folder = model_folder(family)
    cpu = Policy(ModelConfig(path=folder, dtype="float32", device="cpu"))
    images = (0, 1, 3) if family == "qwen2_5_vl" else (0, 0, 0)
    expected = cpu.score(rollouts_of(cpu, images))
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.15)):
        gpu = Policy(ModelConfig(path=folder, dtype=dtype, device="cuda"))
        for ours, theirs in zip(gpu.score(rollouts_of(gpu, images)), expected, strict=True):
            assert (ours - theirs).abs().mean() < tolerance


@pytest.mark.parametrize("family", VISION)
def test_attention_to_pictures_on_the_device_equals_that_on_the_cpu(model_folder, family):
    found = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        policy = Policy(ModelConfig(path=model_folder(family), dtype=dtype, device=device))
        rollouts = rollouts_of(policy, (1, 0, 3))
        found[device, dtype] = attribute(policy, pack(rollouts, policy.device), rollouts, (1, 2, 3))
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        for ours, theirs in zip(found["cuda", dtype], found["cpu", "float32"], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.allclose(ours.cells, theirs.cells, atol=tolerance)
                assert torch.allclose(ours.share, theirs.share, atol=2 * tolerance)


def test_an_update_runs_on_the_device(model_folder):
    from rlfr_vlm.training.update import update

    learner, samples = setup(
        config(model_folder("qwen2"), flow={}, model={"device": "cuda", "dtype": "bfloat16"})
    )
    before = weights(learner.field.network)
    metrics, _ = update(config(model_folder("qwen2"), flow={}), learner, samples)
    assert all(torch.isfinite(torch.tensor(v)) for v in metrics.values())
    assert any(not torch.equal(before[n], p) for n, p in learner.field.network.named_parameters())
