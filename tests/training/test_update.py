"""The invariants of METHOD: what the flow may and may not change in the policy's update."""

import dataclasses
from collections import Counter

import pytest
import torch

from rlfr_vlm import faults
from rlfr_vlm.algorithm.credit import make_samples
from rlfr_vlm.config import DataConfig, parse_config
from rlfr_vlm.data.prompts import parse_row
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.learner.learner import make_learner
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.training.scoring import score_samples
from rlfr_vlm.training.update import update
from rlfr_vlm.types import Outcome

VERDICTS = ["correct", "wrong", "wrong", "correct"]


def config(folder, flow=None, **sections):
    tree = {
        "output_dir": "unused",
        "model": {"path": folder, "dtype": "float32", **sections.pop("model", {})},
        "rollout": {"num_prompts": 3, "group_size": 4, "max_new_tokens": 12},
        "optim": {"lr": 1e-3},
        "train": {"steps": 10, **sections.pop("train", {})},
        "flow": flow,
        **sections,
    }
    return parse_config(tree)


def setup(cfg, verdicts=VERDICTS):
    """A policy, its learner and one batch of graded responses; the same for the same folder
    whatever the other settings are.
    """
    policy = Policy(cfg.model)
    learner = make_learner(cfg, policy)
    if learner.field is not None:  # away from zero, so that the field has an opinion
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in learner.field.network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    renderer = Renderer(policy, DataConfig(), "rows.jsonl")
    prompts = [
        renderer.encode(
            parse_row({"id": str(i), "prompt": f"{i} + {i}?", "answer": "1"}, "r", DataConfig())
        )
        for i in range(3)
    ]
    groups = HFEngine(cfg.rollout, policy).sample(
        prompts, SamplingConfig(group_size=4, temperature=1.0, max_new_tokens=12, seed_key=(0, 1))
    )
    outcomes = [Outcome(float(v == "correct"), v) for _ in groups for v in verdicts]
    return learner, make_samples(groups, outcomes, cfg.seed, 1)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def policy_after_update(cfg):
    learner, samples = setup(cfg)
    update(cfg, learner, samples)
    return weights(learner.policy.model)


def test_coefficient_zero_is_plain_grpo_bit_for_bit(model_folder):
    folder = model_folder("qwen2")
    plain = policy_after_update(config(folder))
    assert same(plain, policy_after_update(config(folder, flow={"reward": {"coef": 0}})))
    assert not same(plain, policy_after_update(config(folder, flow={"reward": {"coef": 0.5}})))


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "nonreentrant"])
def test_online_update_changes_the_field_and_not_the_policys_gradient(model_folder, checkpointing):
    folder = model_folder("qwen2")
    after = []
    for enabled in (True, False):
        cfg = config(
            folder,
            flow={"online": {"enabled": enabled}},
            model={"gradient_checkpointing": checkpointing},
        )
        learner, samples = setup(cfg)
        before = weights(learner.field.network)
        update(cfg, learner, samples)
        assert same(before, weights(learner.field.network)) is not enabled
        after.append(weights(learner.policy.model))
    assert same(*after)


def test_the_field_follows_correct_responses_only(model_folder):
    cfg = config(model_folder("qwen2"), flow={})
    learner, samples = setup(cfg, ["wrong"] * 4)
    before = weights(learner.field.network)
    metrics, _ = update(cfg, learner, samples)
    assert metrics["flow/selected_frac"] == 0
    assert "flow/loss" not in metrics
    assert same(before, weights(learner.field.network))


def test_the_field_learns_the_latents_it_follows(model_folder):
    cfg = config(model_folder("qwen2"), flow={"online": {"lr": 3e-3}}, optim={"lr": 1e-9})
    learner, samples = setup(cfg)
    losses = [update(cfg, learner, samples)[0]["flow/loss"] for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_do_not_change_the_update(model_folder, aggregation):
    results = []
    for budget in (10_000, 40):
        cfg = config(
            model_folder("qwen2"),
            flow={},
            train={"tokens_per_microbatch": budget},
            algorithm={"loss_aggregation": aggregation},
        )
        learner, samples = setup(cfg)
        metrics, records = update(cfg, learner, samples)
        results.append(
            (metrics, records, weights(learner.policy.model), weights(learner.field.network))
        )
    (metrics_a, records_a, policy_a, field_a), (metrics_b, records_b, policy_b, field_b) = results
    assert metrics_a == pytest.approx(metrics_b, rel=1e-3, abs=1e-5)
    assert all(
        a.flow_rewards == pytest.approx(b.flow_rewards, abs=1e-6)
        for a, b in zip(records_a, records_b, strict=True)
    )
    # AdamW's first step is the sign of the gradient, so compare where that is not rounding noise
    close = [
        torch.isclose(policy_a[n], policy_b[n], atol=1e-4).float().mean().item() for n in policy_a
    ]
    assert min(close) > 0.97
    assert (
        min(torch.isclose(field_a[n], field_b[n], atol=1e-5).float().mean().item() for n in field_a)
        > 0.97
    )


def test_scores_from_the_own_forward_equal_those_of_a_scoring_pass(model_folder):
    cfg = config(model_folder("qwen2"), flow={})
    learner, samples = setup(cfg)
    scored = score_samples(cfg, learner, samples)
    _, own = update(cfg, learner, samples)
    for sample, record in zip(scored, own, strict=True):
        assert sample.scores.deviations.tolist() == pytest.approx(record.deviations, rel=1e-4)
        assert sample.scores.logprobs.tolist() == pytest.approx(
            list(sample.rollout.logprobs), abs=1e-4
        )


def test_later_updates_keep_the_old_logprobs(model_folder):
    cfg = config(model_folder("qwen2"), algorithm={"updates_per_rollout": 2}, optim={"lr": 1e-2})
    learner, samples = setup(cfg)
    scored = score_samples(cfg, learner, samples)
    first, _ = update(cfg, learner, scored)
    second, _ = update(cfg, learner, scored)
    assert first["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert abs(second["actor/ppo_kl"]) > 1e-4
    assert learner.policy.version == 2


def test_ungraded_responses_leave_the_batch(model_folder):
    cfg = config(model_folder("qwen2"))
    _, samples = setup(cfg, ["correct", "error", "wrong", "wrong"])
    assert len(samples) == 9
    assert [round(s.outcome_credit, 4) for s in samples[:3]] == [1.1547, -0.5774, -0.5774]


def test_a_non_finite_gradient_stops_before_the_weights(model_folder, monkeypatch):
    """The loss is finite: nothing but the optimiser's own check stands in its way."""
    learner, samples = setup(cfg := config(model_folder("qwen2")))
    before = weights(learner.policy.model)
    monkeypatch.setattr(faults, "_reached", Counter())
    monkeypatch.setenv("RLFR_FAULT", "gradient:1:nan")
    with pytest.raises(StoppedError, match=r"the gradient is not finite at update 0 \(first: `"):
        update(cfg, learner, samples)
    assert same(before, weights(learner.policy.model))


def test_a_non_finite_advantage_stops_before_the_weights(model_folder):
    cfg = config(model_folder("qwen2"))
    learner, samples = setup(cfg)
    before = weights(learner.policy.model)
    broken = [dataclasses.replace(s, outcome_credit=float("nan")) for s in samples]
    with pytest.raises(StoppedError, match="not finite: the advantages of responses"):
        update(cfg, learner, broken)
    assert same(before, weights(learner.policy.model))


def test_flow_noise_depends_on_the_request_alone(model_folder):
    cfg = config(model_folder("qwen2"), flow={})
    learner, samples = setup(cfg)
    forwards = score_samples(cfg, learner, samples)
    backwards = score_samples(cfg, learner, samples[::-1])[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert torch.allclose(a.scores.deviations, b.scores.deviations, rtol=1e-4)
