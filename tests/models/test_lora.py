"""Low-rank adapters: what learns, what engines and exports see of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlfr_vlm.config import LoraConfig, ModelConfig, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.latents import LatentRequest
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from tests.models.test_policy import gradients, reference_logprobs, rollouts_of

pytest.importorskip("peft")

LORA = LoraConfig(rank=4, alpha=6)  # scaled by 1.5
SAMPLING = SamplingConfig(group_size=4, temperature=1.0, max_new_tokens=12, seed_key=(0, 1))
VISION = ("qwen2_5_vl", "qwen3_vl")


def policy_of(folder: str, seed: int | None = 0, dtype: str = "float32", **settings) -> Policy:
    """With B moved off its initial zero, unless `seed` is None."""
    policy = Policy(ModelConfig(path=folder, dtype=dtype, lora=LORA, **settings))
    if seed is not None:
        move_factors(policy, seed)
    return policy


@torch.no_grad()
def move_factors(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.trained().items():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.version += 1


def whole_weights(policy: Policy, max_bytes: int = 1) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for bucket in policy.weight_buckets(max_bytes)
        for name, tensor in bucket.items()
    }


def plain(folder: str, family: str):
    loader = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_only_adapters_of_the_decoder_learn(model_folder, family):
    policy = policy_of(model_folder(family))
    layers = len(policy.layers)
    trained = policy.trained()
    assert len(trained) == 7 * 2 * layers and all(".lora_" in name for name in trained)
    assert all(name.startswith(f"{policy.family.language}.layers.") for name in trained)
    policy.forward(
        pack(rollouts_of(policy, (0, 1) if family in VISION else (0, 0)), policy.device)
    ).logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for name, p in policy.model.named_parameters() if name not in trained)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_new_adapters_change_nothing_and_are_the_same_every_time(model_folder, family):
    folder = model_folder(family)
    base, one, two = (
        Policy(ModelConfig(path=folder, dtype="float32")),
        policy_of(folder, seed=None),
        policy_of(folder, seed=None),
    )
    rollouts = rollouts_of(base, (0, 1) if family in VISION else (0, 0))
    for expected, found in zip(base.score(rollouts), one.score(rollouts), strict=True):
        assert torch.equal(expected, found)
    assert all(torch.equal(p, two.trained()[name]) for name, p in one.trained().items())
    assert base.identity == one.identity  # a flow field that fits the one fits the other


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_whole_weights_have_the_adapters_merged_under_plain_names(model_folder, family):
    folder = model_folder(family)
    policy, base = policy_of(folder), Policy(ModelConfig(path=folder, dtype="float32"))
    merged, before = whole_weights(policy), whole_weights(base)
    assert merged.keys() == before.keys() and policy.weight_specs() == base.weight_specs()
    trained = policy.trained()
    changed = set()
    for name, weight in before.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in trained:
            a, b = (trained[f"{stem}.lora_{side}.default.weight"].detach() for side in "AB")
            assert torch.allclose(merged[name], weight + 1.5 * b @ a, atol=1e-6)
            assert not torch.equal(merged[name], weight)
            changed.add(name)
        else:
            assert torch.equal(merged[name], weight)
    assert len(changed) == 7 * len(policy.layers) and not any("visual" in name for name in changed)
    all_at_once = whole_weights(policy, 2**40)
    assert all(torch.equal(merged[name], tensor) for name, tensor in all_at_once.items())


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_a_saved_folder_computes_what_the_adapted_model_does(model_folder, tmp_path, family):
    policy = policy_of(model_folder(family))
    policy.save(tmp_path)
    rollouts = rollouts_of(policy, (0, 1, 3) if family in VISION else (0, 0, 0))
    for ours, theirs in zip(
        policy.score(rollouts),
        reference_logprobs(plain(str(tmp_path), family), rollouts, 0),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)
    again = Policy(ModelConfig(path=str(tmp_path), dtype="float32"))
    merged = whole_weights(policy)
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole_weights(again).items())
    unchanged = reference_logprobs(plain(model_folder(family), family), rollouts, 0)
    assert not torch.allclose(torch.cat(unchanged), torch.cat(policy.score(rollouts)), atol=1e-2)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "nonreentrant"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(
    model_folder, family, checkpointing
):
    request = LatentRequest((1, 2), (("token_pre", 1),))
    plain, other = (
        policy_of(model_folder(family)),
        policy_of(model_folder(family), gradient_checkpointing=checkpointing),
    )
    images = (1, 0) if family in VISION else (0, 0)
    expected, expected_gradients = gradients(plain, rollouts_of(plain, images), request)
    output, found = gradients(other, rollouts_of(other, images), request)
    assert torch.allclose(output.latents.states, expected.latents.states, atol=1e-5)
    assert found.keys() == expected_gradients.keys() == plain.trained().keys()
    assert all(torch.allclose(found[n], expected_gradients[n], atol=1e-5) for n in found)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_the_hf_engine_samples_through_the_adapters(model_folder):
    folder = model_folder("qwen2_5_vl")
    policy = policy_of(folder)
    prompts = [r.prompt for r in rollouts_of(policy, (0, 1), group_size=1)]
    in_place = HFEngine(
        parse_config({"output_dir": "unused", "model": {"path": folder}}).rollout, policy
    )
    rollouts = [r for group in in_place.sample(prompts, SAMPLING) for r in group.rollouts]
    for rollout, scored in zip(rollouts, policy.score(rollouts), strict=True):
        assert torch.allclose(torch.tensor(rollout.logprobs), scored, atol=1e-4)
    settings = ModelConfig(
        path=folder, dtype="float32", lora=LORA, gradient_checkpointing="reentrant"
    )
    copy = HFEngine(
        parse_config({"output_dir": "unused", "model": {"path": folder}}).rollout, policy, settings
    )
    assert copy.sampler.weights_as_stored and not copy.sampler.model.training
    copy.load_weights(policy)
    found = [r for group in copy.sample(prompts, SAMPLING) for r in group.rollouts]
    assert [r.token_ids for r in found] == [r.token_ids for r in rollouts]
    assert {r.policy_version for r in found} == {policy.version}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen2_5_vl", "bfloat16")])
def test_vllm_samples_from_the_merged_weights(model_folder, family, dtype):
    pytest.importorskip("vllm")
    from rlfr_vlm.rollout.probe import PROBE, logprob_gap, probe_prompts
    from rlfr_vlm.rollout.vllm_engine import VllmEngine

    model = {
        "path": model_folder(family, dtype=dtype),
        "dtype": dtype,
        "device": "cpu",
        "lora": LORA.model_dump(),
    }
    cfg = parse_config(
        {
            "output_dir": "unused",
            "model": model,
            "data": {"max_prompt_tokens": 96},
            "rollout": {"engine": "vllm", "max_new_tokens": 32},
        }
    )
    policy = policy_of(model["path"], seed=None, dtype=dtype)
    engine = VllmEngine(cfg, policy)
    try:
        prompts = probe_prompts(cfg, policy)
        for seed in range(2):
            move_factors(policy, seed)
            rollouts = [r for group in engine.sample(prompts, PROBE) for r in group.rollouts]
            stale = logprob_gap(rollouts, policy, 1.0)
            engine.load_weights(policy)
            assert engine.probe() < 0.7 * stale
    finally:
        engine.close()


def test_targets_that_the_model_does_not_have_are_named(model_folder):
    with pytest.raises(UserError, match=r"model\.lora\.targets: \['query'\]"):
        Policy(
            ModelConfig(
                path=model_folder("llama"), dtype="float32", lora=LoraConfig(targets=("query",))
            )
        )
