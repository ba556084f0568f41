"""vLLM on CUDA devices: memory that it gives back, and engines over several of them. Written by
vLLM 0.32's code; not run so far.
"""

from __future__ import annotations

import pytest
import torch

from rlfr_vlm.config import parse_config
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.probe import PROBE, logprob_gap, probe_prompts
from tests.rollout.test_weights import disturb

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_engine(path: str, weights: bool = True, tensor_parallel: int = 1, sleep: bool = True):
    from rlfr_vlm.rollout.vllm_engine import VllmEngine

    more = {"launcher": "ray", "ray": {"engines": 1}} if tensor_parallel > 1 else {}
    cfg = parse_config(
        {
            "output_dir": "unused",
            "model": {"path": path, "dtype": "bfloat16", "device": "cuda"},
            "data": {"max_prompt_tokens": 96},
            "rollout": {
                "engine": "vllm",
                "max_new_tokens": 32,
                "vllm": {"tensor_parallel": tensor_parallel, "sleep": sleep},
            },
            **more,
        }
    )
    return VllmEngine(cfg, Policy(cfg.model, weights=weights))


def free_gib() -> float:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / 2**30


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_an_engine_at_rest_gives_its_memory_back_and_wakes_with_new_weights(model_folder, family):
    engine = make_engine(model_folder(family, dtype="bfloat16"))
    try:
        for seed in range(2):
            before = free_gib()
            engine.sleep()
            assert free_gib() > before + 1  # the KV cache alone is more
            disturb(engine.policy, seed)
            engine.load_weights(engine.policy)
            assert engine.probe() <= 0.1
            assert free_gib() < before + 1
    finally:
        engine.close()


def test_an_engine_that_may_not_sleep_keeps_sampling(model_folder):
    engine = make_engine(model_folder("llama", dtype="bfloat16"), sleep=False)
    try:
        engine.sleep()
        assert engine.probe() <= 0.1
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_an_engine_over_two_devices_follows_the_policy(model_folder, family):
    folder = model_folder(family, dtype="bfloat16", hidden=256)
    engine = make_engine(folder, weights=False, tensor_parallel=2)
    trainer = Policy(engine.cfg.model)
    try:
        for seed in range(2):
            disturb(trainer, seed)
            for bucket in trainer.weight_buckets(2**20):
                engine.load_bucket(bucket)
            engine.finish_load(trainer.version)
            rollouts = [
                r
                for group in engine.sample(probe_prompts(engine.cfg, trainer), PROBE)
                for r in group.rollouts
            ]
            assert logprob_gap(rollouts, trainer, PROBE.temperature) <= 0.1
    finally:
        engine.close()
