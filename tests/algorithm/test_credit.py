"""From graded responses to advantages, method by method, on a real policy."""

import dataclasses
import json
import shutil

import pytest
import torch

from rlfr_vlm.algorithm.advantages import whiten
from rlfr_vlm.algorithm.credit import assign_credit, make_samples, needs_scoring
from rlfr_vlm.algorithm.losses import kl_estimate
from rlfr_vlm.algorithm.objective import _as_means
from rlfr_vlm.batch import UpdateSize, join, split
from rlfr_vlm.errors import UserError
from rlfr_vlm.training.loop import split_evenly, trains_policy
from rlfr_vlm.training.scoring import score_samples
from rlfr_vlm.training.update import update
from rlfr_vlm.types import RolloutGroup
from tests.training.test_update import config, same, setup, weights

OBJECTIVES = [
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "gmpo",
    "cispo",
    "rloo",
    "reinforce_pp",
    "ppo",
    "flowrl",
]


def prepared(model_folder, family="qwen2", **sections):
    cfg = config(model_folder(family), **sections)
    learner, samples = setup(cfg)
    if cfg.algorithm.advantage != "group":
        raw = {id(s.rollout): s for s in samples}
        samples = [
            dataclasses.replace(s, outcome_credit=raw[id(s.rollout)].outcome.reward)
            for s in samples
        ]
    return cfg, learner, samples


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("updates", [1, 2])
def test_every_method_updates_the_policy_and_its_head(model_folder, method, updates):
    cfg, learner, samples = prepared(
        model_folder, algorithm={"method": method, "updates_per_rollout": updates}
    )
    before = weights(learner.policy.model)
    head = weights(learner.head) if learner.head else None
    if needs_scoring(cfg, samples):
        samples = score_samples(cfg, learner, samples)
    for part in split_evenly(samples, updates):
        metrics, _ = update(cfg, learner, part)
        assert all(torch.isfinite(torch.tensor(v)) for v in metrics.values()), metrics
    assert not same(before, weights(learner.policy.model))
    assert (head is not None) is (method in ("ppo", "flowrl"))
    if head is not None:
        assert not same(head, weights(learner.head))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_micro_batches_do_not_change_any_objective(model_folder, method):
    results = []
    for budget in (10_000, 40):
        cfg, learner, samples = prepared(
            model_folder, algorithm={"method": method}, train={"tokens_per_microbatch": budget}
        )
        gradients = {}
        learner.optimizer.torch.register_step_pre_hook(
            lambda *_, kept=gradients, own=learner: kept.update(
                {n: p.grad.clone() for n, p in own.policy.model.named_parameters()}
            )
        )
        metrics, _ = update(cfg, learner, score_samples(cfg, learner, samples))
        results.append((metrics, gradients))
    (whole, a), (parts, b) = results
    assert whole == pytest.approx(parts, rel=2e-3, abs=2e-5)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5), name


def test_reinforce_pp_charges_for_divergence_before_it_whitens(model_folder):
    cfg, learner, samples = prepared(
        model_folder, algorithm={"method": "reinforce_pp", "kl": {"coef": 0.5}}
    )
    with torch.no_grad():
        for parameter in learner.reference.model.parameters():
            parameter.mul_(1.05)
    scored = score_samples(cfg, learner, samples)
    expected = []
    for s in scored:
        rewards = -0.5 * kl_estimate(s.scores.logprobs, s.scores.ref_logprobs, "k1")
        rewards[-1] += s.outcome.reward
        expected.append(rewards.flip(0).cumsum(0).flip(0))
    assert torch.allclose(
        torch.cat([s.credit.advantages for s in scored]), whiten(torch.cat(expected)), atol=1e-5
    )


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_divergence_from_the_reference_holds_the_policy_back(model_folder, place):
    """A reference that equals the policy costs nothing; far from it, the gradient changes."""
    plain, learner, samples = prepared(model_folder)
    update(plain, learner, samples)
    cfg, with_kl, _ = prepared(
        model_folder, algorithm={"kl": {"coef": 0.1, "estimator": "k2", "place": place}}
    )
    metrics, _ = update(cfg, with_kl, samples)
    assert metrics["actor/kl"] == pytest.approx(0, abs=1e-9)
    assert same(weights(learner.policy.model), weights(with_kl.policy.model))
    _, far, _ = prepared(
        model_folder, algorithm={"kl": {"coef": 0.1, "estimator": "k2", "place": place}}
    )
    with torch.no_grad():
        for parameter in far.reference.model.parameters():
            parameter.mul_(1.05)
    frozen = weights(far.reference.model)
    assert update(cfg, far, samples)[0]["actor/kl"] > 0
    assert not same(weights(learner.policy.model), weights(far.policy.model))
    assert same(frozen, weights(far.reference.model))


def test_the_importance_cap_weighs_tokens_by_the_engines_mismatch(model_folder):
    cfg, learner, samples = prepared(model_folder, algorithm={"importance_cap": 2.0})
    skewed = [
        dataclasses.replace(
            s,
            rollout=dataclasses.replace(
                s.rollout, logprobs=tuple(p - 1.0 for p in s.rollout.logprobs)
            ),
        )
        for s in samples
    ]
    metrics, _ = update(cfg, learner, skewed)
    assert metrics["rollout/importance_mean"] == pytest.approx(2.0)  # e capped
    assert metrics["rollout/importance_capped"] == 1
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(1.0, abs=1e-3)
    _, exact, _ = prepared(model_folder, algorithm={"importance_cap": 2.0})
    assert update(cfg, exact, samples)[0]["rollout/importance_mean"] == pytest.approx(1.0, abs=1e-4)


def test_ppo_bootstraps_from_its_own_values(model_folder):
    cfg, learner, samples = prepared(model_folder, algorithm={"method": "ppo", "gae_lambda": 0.9})
    scored = score_samples(cfg, learner, samples)
    raw = torch.cat([s.credit.returns - s.scores.values for s in scored])
    assert torch.allclose(torch.cat([s.credit.advantages for s in scored]), whiten(raw), atol=1e-5)
    last = scored[0]
    assert last.credit.returns[-1].item() == pytest.approx(last.outcome.reward, abs=1e-5)


def test_flowrl_moves_log_z_against_the_residual(model_folder):
    cfg, learner, samples = prepared(
        model_folder, algorithm={"method": "flowrl", "flowrl": {"lr": 1e-2}}, optim={"lr": 1e-9}
    )
    residuals = [update(cfg, learner, samples)[0]["flowrl/residual"] for _ in range(6)]
    assert residuals[0] == pytest.approx(
        15 * 0.866, rel=0.2
    )  # beta times the mean size of two right and two wrong answers
    first = [
        update(cfg, learner, [s for s in samples if s.outcome.correct])[0]["flowrl/log_z"]
        for _ in range(6)
    ]
    assert first[-1] > first[0]


def test_entropy_shaping_adds_to_the_loss_alone(model_folder):
    plain, learner, samples = prepared(model_folder)
    _, records = update(plain, learner, samples)
    cfg, shaped, _ = prepared(model_folder, shaping={"entropy": {}})
    _, shaped_records = update(cfg, shaped, samples)
    assert not same(weights(learner.policy.model), weights(shaped.policy.model))
    assert [r.advantages for r in records] == [r.advantages for r in shaped_records]


@pytest.mark.parametrize("sign", [-1, 1])
def test_likelihood_shaping_charges_or_pays_for_surprise(model_folder, sign):
    cfg, learner, samples = prepared(
        model_folder,
        shaping={"likelihood": {"sign": sign, "coef": 0.1, "threshold": 0.0, "top_k": 0}},
    )
    scored = score_samples(cfg, learner, samples)
    for s in scored:
        if s.length < 2:
            continue
        surprise = -s.scores.logprobs
        expected = sign * 0.1 * (surprise - surprise.min()) / (surprise.max() - surprise.min())
        assert torch.allclose(s.credit.token_rewards, expected, atol=1e-5)


def test_the_field_alone_learns_in_its_warm_up(model_folder):
    cfg, learner, samples = prepared(model_folder, flow={"online": {"warmup_steps": 2}})
    assert [trains_policy(cfg, step) for step in (1, 2, 3)] == [False, False, True]
    policy, field = weights(learner.policy.model), weights(learner.field.network)
    metrics, _ = update(cfg, learner, samples, train_policy=False)
    assert same(policy, weights(learner.policy.model))
    assert not same(field, weights(learner.field.network))
    assert learner.policy.version == 0
    assert metrics["flow/loss"] > 0


@pytest.mark.parametrize(
    "flow",
    [
        {"context": "token_pre+token_post", "shift": "1+2"},
        {"context": "identity"},
        {"times": [0.5, 0.8]},
        {"reward": {"draws": 3}},
        {"reward": {"normalise": "bilateral"}},
        {"reward": {"normalise": "mean", "gamma": 2.0}},
        {"online": {"times": "logit_normal"}},
        {"online": {"select": []}},
        {"online": {"select": ["entropy"], "entropy_quantile": 0.5}},
        {"layers": [0.5]},
    ],
    ids=str,
)
def test_every_flow_option_runs_and_moves_the_field(model_folder, flow):
    cfg, learner, samples = prepared(
        model_folder, flow={**flow, "reward": {"threshold": 0.0, **flow.get("reward", {})}}
    )
    before = weights(learner.field.network)
    metrics, records = update(cfg, learner, samples)
    assert not same(before, weights(learner.field.network))
    assert metrics["flow/num_reward_tokens"] > 0
    assert any(any(r.flow_rewards) for r in records)


def test_a_mixture_scores_the_mean_of_its_sides(model_folder):
    scores = {}
    for context in ("token_pre", "token_post", "token_pre+token_post"):
        cfg, learner, samples = prepared(model_folder, flow={"context": context})
        scores[context] = score_samples(cfg, learner, samples)
    for pre, post, both in zip(*scores.values(), strict=True):
        mean = (pre.scores.deviations + post.scores.deviations) / 2
        last = (
            torch.arange(pre.length) == pre.length - 1
        )  # has no token after it: its other side counts alone
        expected = torch.where(last, post.scores.deviations, mean)
        assert torch.allclose(both.scores.deviations, expected, rtol=1e-4)
        assert bool(both.scores.valid.all())


def test_draws_average_over_noise(model_folder):
    cfg, learner, samples = prepared(model_folder, flow={})
    one = score_samples(cfg, learner, samples)
    many_cfg, _, _ = prepared(model_folder, flow={"reward": {"draws": 64}})
    many, again = (score_samples(many_cfg, learner, samples) for _ in range(2))
    assert all(
        torch.equal(a.scores.deviations, b.scores.deviations)
        for a, b in zip(many, again, strict=True)
    )
    assert not torch.allclose(one[0].scores.deviations, many[0].scores.deviations)


def test_columns_split_and_join(model_folder):
    cfg, learner, samples = prepared(model_folder, flow={}, algorithm={"updates_per_rollout": 2})
    scored = score_samples(cfg, learner, samples)
    whole = join([s.scores for s in scored])
    assert all(
        torch.equal(a.deviations, b.scores.deviations)
        for a, b in zip(split(whole, [s.length for s in scored]), scored, strict=True)
    )
    assert whole.values is None
    again = assign_credit(cfg, samples, whole)
    assert torch.equal(again.advantages, join([s.credit for s in scored]).advantages)


def test_a_reference_with_other_tokens_is_refused(model_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder("qwen2"), other)
    tree = json.loads((other / "tokenizer.json").read_text())
    tree["added_tokens"].append(
        {
            **tree["added_tokens"][-1],
            "id": tree["added_tokens"][-1]["id"] + 1,
            "content": "<|more|>",
        }
    )
    (other / "tokenizer.json").write_text(json.dumps(tree))
    cfg = config(model_folder("qwen2"), algorithm={"method": "flowrl", "reference": str(other)})
    with pytest.raises(UserError, match=r"algorithm\.reference.*another vocabulary"):
        setup(cfg)


def test_make_samples_follows_the_method(model_folder):
    cfg = config(model_folder("qwen2"))
    _, samples = setup(cfg)
    groups = []
    for sample in samples[::4]:
        own = tuple(s.rollout for s in samples if s.rollout.prompt is sample.rollout.prompt)
        groups.append(RolloutGroup(sample.rollout.prompt, own))
    outcomes = [s.outcome for s in samples]
    found = {}
    for method in ("grpo", "dr_grpo", "rloo", "ppo"):
        algorithm = config(model_folder("qwen2"), algorithm={"method": method}).algorithm
        found[method] = [
            round(s.outcome_credit, 4) for s in make_samples(groups, outcomes, 0, 1, algorithm)
        ][:4]
    assert found["grpo"] == [0.866, -0.866, -0.866, 0.866]
    assert found["dr_grpo"] == [0.5, -0.5, -0.5, 0.5]
    assert found["rloo"] == [0.6667, -0.6667, -0.6667, 0.6667]
    assert found["ppo"] == [1.0, 0.0, 0.0, 1.0]


def test_the_critics_coefficient_scales_its_gradient(model_folder):
    norms = []
    for coef in (0.1, 0.4):
        method = {"method": "ppo", "value": {"coef": coef}}
        cfg, learner, samples = prepared(model_folder, algorithm=method)
        metrics, _ = update(cfg, learner, score_samples(cfg, learner, samples))
        norms.append(metrics["critic/grad_norm"])
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-4)


def test_under_constant_weights_metrics_are_means_and_losses_stay():
    """Two responses of 3 tokens, a budget of 12: the weights add up to a quarter."""
    cfg = config("unused", algorithm={"loss_aggregation": "constant"})
    one = torch.tensor(1.0)
    found = _as_means(cfg, {"actor/pg_loss": one, "actor/pg_clipfrac": one / 4}, UpdateSize(6, 2))
    assert found == {"actor/pg_loss": 1.0, "actor/pg_clipfrac": 1.0}
    tokens = cfg.model_copy(
        update={"algorithm": cfg.algorithm.model_copy(update={"loss_aggregation": "token"})}
    )
    assert _as_means(tokens, {"actor/pg_clipfrac": one}, UpdateSize(6, 2)) == {
        "actor/pg_clipfrac": 1.0
    }
