"""The transformers engine: seeds, log-probs, stops and bans."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlfr_vlm.config import ModelConfig, RolloutConfig, parse_config
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine, nucleus
from tests.models.test_policy import rollouts_of

SAMPLING = SamplingConfig(group_size=4, temperature=1.0, max_new_tokens=12, seed_key=(0, 1))


def prompts_of(policy, images=(0, 0, 0)):
    return [r.prompt for r in rollouts_of(policy, images, group_size=1)]


def engine_of(folder, **settings):
    policy = Policy(ModelConfig(path=folder, dtype="float32"))
    return HFEngine(RolloutConfig(**settings), policy), policy


def tokens(groups):
    return [r.token_ids for group in groups for r in group.rollouts]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_recorded_logprobs_are_the_policys(model_folder, family):
    engine, policy = engine_of(model_folder(family))
    groups = engine.sample(prompts_of(policy, (0, 1, 2) if "vl" in family else (0, 0, 0)), SAMPLING)
    rollouts = [r for group in groups for r in group.rollouts]
    for rollout, scored in zip(rollouts, policy.score(rollouts), strict=True):
        assert torch.allclose(torch.tensor(rollout.logprobs), scored, atol=1e-4)
        assert not set(rollout.token_ids) & set(policy.banned_token_ids)


def test_tokens_depend_on_the_request_alone(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    prompts = prompts_of(policy)
    groups = engine.sample(prompts, SAMPLING)
    assert tokens(engine.sample(prompts[::-1], SAMPLING)[::-1]) == tokens(groups)
    assert tokens([engine.sample([p], SAMPLING)[0] for p in prompts]) == tokens(groups)
    small, _ = engine_of(model_folder("qwen2"), hf_batch_size=4)
    assert tokens(small.sample(prompts, SAMPLING)) == tokens(groups)
    assert tokens(engine.sample(prompts, replace(SAMPLING, seed_key=(0, 2)))) != tokens(groups)
    assert len(set(tokens(groups))) > 6


def test_greedy_equals_transformers_generate(model_folder):
    engine, policy = engine_of(model_folder("llama"))
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    model.generation_config.__dict__.update(
        temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, do_sample=False
    )
    for group in engine.sample(
        prompts_of(policy), replace(SAMPLING, group_size=1, temperature=0.0)
    ):
        ids = torch.tensor([group.prompt.token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert group.rollouts[0].token_ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_responses_end_at_eos_and_are_flagged_when_cut(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    rollouts = [
        r
        for g in engine.sample(
            prompts_of(policy), replace(SAMPLING, group_size=32, max_new_tokens=60)
        )
        for r in g.rollouts
    ]
    assert {r.finish_reason for r in rollouts} <= {"stop", "length"}
    for rollout in rollouts:
        ended = rollout.token_ids[-1] in policy.eos_token_ids
        assert ended == (rollout.finish_reason == "stop")
        assert not set(rollout.token_ids[:-1]) & set(policy.eos_token_ids)
        assert ended or len(rollout.token_ids) == 60
    forced = engine.sample(prompts_of(policy), replace(SAMPLING, ignore_eos=True))
    assert {len(t) for t in tokens(forced)} == {12}


def test_stop_strings_end_a_response(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    free = [r for g in engine.sample(prompts_of(policy), SAMPLING) for r in g.rollouts]
    stop = next(r.text[3] for r in free if len(r.text) > 6 and r.text[3].isprintable())
    for rollout in (
        r
        for g in engine.sample(prompts_of(policy), replace(SAMPLING, stop=(stop,)))
        for r in g.rollouts
    ):
        assert stop not in policy.decode(rollout.token_ids[:-1])
        if stop in rollout.text:
            assert rollout.finish_reason == "stop"


def test_temperature_is_the_logprobs_too(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    rollouts = [
        r
        for g in engine.sample(prompts_of(policy), replace(SAMPLING, temperature=0.5))
        for r in g.rollouts
    ]
    for rollout, scored in zip(rollouts, policy.score(rollouts, 0.5), strict=True):
        assert torch.allclose(torch.tensor(rollout.logprobs), scored, atol=1e-4)


def test_the_nucleus_is_the_smallest_set_that_holds_its_share():
    probabilities = torch.tensor(
        [[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64
    )
    assert nucleus(probabilities, 0.7).tolist() == [[0, 0.5, 0, 0.25], [0.25, 0.25, 0.25, 0]]
    assert nucleus(probabilities, 0.5).tolist() == [[0, 0.5, 0, 0], [0.25, 0.25, 0, 0]]
    assert nucleus(probabilities, 1.0) is probabilities


def test_later_samples_of_a_problem_can_be_asked_for_alone(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    prompts = prompts_of(policy)
    whole = engine.sample(prompts, SAMPLING)
    part = engine.sample(prompts, replace(SAMPLING, group_size=2, first_sample=2))
    assert [[r.sample_index for r in group.rollouts] for group in part] == [[2, 3]] * len(prompts)
    assert [[r.token_ids for r in group.rollouts] for group in part] == [
        [r.token_ids for r in group.rollouts[2:]] for group in whole
    ]


def moved(policy, seed):
    """Every weight moved by a tenth of its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(
                0.1
                * torch.randn(parameter.shape, generator=generator)
                * parameter.square().mean().sqrt()
            )
    policy.version += 1
    return policy


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("max_bytes", [1, 2**40])
def test_a_copy_in_a_process_of_its_own_samples_what_the_policy_would(
    model_folder, family, max_bytes
):
    settings = ModelConfig(path=model_folder(family), dtype="float32")
    own, trainer = engine_of(model_folder(family))
    cfg = parse_config(
        {"output_dir": "unused", "model": settings.model_dump(), "rollout": {"engine": "hf"}}
    )
    engine = make_engine(cfg, Policy(settings, weights=False))
    prompts = prompts_of(trainer, (0, 1) if family == "qwen2_5_vl" else (0, 0))
    with pytest.raises(StoppedError, match="none of the policy's weights"):
        engine.sample(prompts, SAMPLING)
    before = tokens(own.sample(prompts, SAMPLING))
    for seed in range(2):
        moved(trainer, seed)
        for bucket in trainer.weight_buckets(max_bytes):
            engine.load_bucket({name: tensor.clone() for name, tensor in bucket.items()})
        engine.finish_load(trainer.version)
        engine.sleep()
        groups = engine.sample(prompts, SAMPLING)
        assert tokens(groups) == tokens(own.sample(prompts, SAMPLING)) != before
        assert {r.policy_version for group in groups for r in group.rollouts} == {trainer.version}
    engine.close()


def test_a_copy_beside_sharded_weights_keeps_its_own(model_folder):
    policy = Policy(ModelConfig(path=model_folder("llama"), dtype="float32"))
    policy.access = dataclasses.replace(policy.access, sharded=True)
    cfg = parse_config(
        {
            "output_dir": "unused",
            "model": {"path": policy.path, "dtype": "float32"},
            "rollout": {"engine": "hf"},
        }
    )
    engine = make_engine(cfg, policy)
    engine.load_weights(policy)
    before = tokens(engine.sample(prompts_of(policy), SAMPLING))
    moved(policy, 0)
    assert tokens(engine.sample(prompts_of(policy), SAMPLING)) == before
    engine.load_weights(policy)
    groups = engine.sample(prompts_of(policy), SAMPLING)
    assert tokens(groups) != before and groups[0].rollouts[0].policy_version == policy.version == 1


def test_what_a_copy_lacks_is_named(model_folder):
    settings = ModelConfig(path=model_folder("llama"), dtype="float32")
    trainer = Policy(settings)
    engine = HFEngine(RolloutConfig(), Policy(settings, weights=False), settings)
    with pytest.raises(StoppedError, match=r"sends `value_head\.weight`, which is none"):
        engine.load_bucket({"value_head.weight": torch.ones(1, 64)})
    with pytest.raises(
        StoppedError, match=r"`model\.norm\.weight` comes as torch\.float32 of shape \(63,\)"
    ):
        engine.load_bucket({"model.norm.weight": torch.ones(63)})
    with pytest.raises(StoppedError, match=r"`model\.norm\.weight` differs"):
        engine.load_bucket({"model.norm.weight": torch.full((64,), float("nan"))})
    for bucket in trainer.weight_buckets(1):
        if "model.norm.weight" not in bucket:
            engine.load_bucket(bucket)
    with pytest.raises(StoppedError, match="only some of the policy's weights"):
        engine.sample(prompts_of(trainer), SAMPLING)
    with pytest.raises(
        StoppedError, match=r"1 of \d+ tensors did not come, the first is `model\.norm\.weight`"
    ):
        engine.finish_load(1)


def test_an_engine_without_a_copy_has_nothing_to_load(model_folder):
    engine, policy = engine_of(model_folder("llama"))
    engine.load_weights(policy)
    with pytest.raises(ValueError, match="no copy to load"):
        engine.load_bucket({})
    with pytest.raises(ValueError, match="the policy that it was made with"):
        engine.load_weights(Policy(ModelConfig(path=policy.path, dtype="float32")))
