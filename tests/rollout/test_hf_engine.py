"""The transformers engine: seeds, log-probs, stops and bans."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlfr_vlm.config import ModelConfig, RolloutConfig
from rlfr_vlm.models.policy import Policy
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
    model.generation_config.__dict__.update(temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, do_sample=False)
    for group in engine.sample(prompts_of(policy), replace(SAMPLING, group_size=1, temperature=0.0)):
        ids = torch.tensor([group.prompt.token_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert group.rollouts[0].token_ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_responses_end_at_eos_and_are_flagged_when_cut(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    rollouts = [r for g in engine.sample(prompts_of(policy), replace(SAMPLING, group_size=32, max_new_tokens=60)) for r in g.rollouts]
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
    for rollout in (r for g in engine.sample(prompts_of(policy), replace(SAMPLING, stop=(stop,))) for r in g.rollouts):
        assert stop not in policy.decode(rollout.token_ids[:-1])
        if stop in rollout.text:
            assert rollout.finish_reason == "stop"


def test_temperature_is_the_logprobs_too(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    rollouts = [r for g in engine.sample(prompts_of(policy), replace(SAMPLING, temperature=0.5)) for r in g.rollouts]
    for rollout, scored in zip(rollouts, policy.score(rollouts, 0.5), strict=True):
        assert torch.allclose(torch.tensor(rollout.logprobs), scored, atol=1e-4)


def test_the_nucleus_is_the_smallest_set_that_holds_its_share():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    assert nucleus(probabilities, 0.7).tolist() == [[0, 0.5, 0, 0.25], [0.25, 0.25, 0.25, 0]]
    assert nucleus(probabilities, 0.5).tolist() == [[0, 0.5, 0, 0], [0.25, 0.25, 0, 0]]
    assert nucleus(probabilities, 1.0) is probabilities


def test_later_samples_of_a_problem_can_be_asked_for_alone(model_folder):
    engine, policy = engine_of(model_folder("qwen2"))
    prompts = prompts_of(policy)
    whole = engine.sample(prompts, SAMPLING)
    part = engine.sample(prompts, replace(SAMPLING, group_size=2, first_sample=2))
    assert [[r.sample_index for r in group.rollouts] for group in part] == [[2, 3]] * len(prompts)
    assert [[r.token_ids for r in group.rollouts] for group in part] == [[r.token_ids for r in group.rollouts[2:]] for group in whole]
