"""Faults found in the published code of RLFR (1 to 20) and of FlowRL (25 to 27): each has a test
that it is absent here.

Faults 21 to 24 are of launch scripts, loaders and evaluation tools that have no counterpart.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlfr_vlm.algorithm.advantages import rewards_to_go
from rlfr_vlm.algorithm.objective import objective
from rlfr_vlm.algorithm.selection import flow_weights
from rlfr_vlm.batch import Credit, Scores, UpdateSize
from rlfr_vlm.config import FlowOnlineConfig, ModelConfig, parse_config
from rlfr_vlm.config.methods import METHODS
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import WEIGHTS_FILE, FlowField
from rlfr_vlm.flow.latents import LatentRequest, capture_latents
from rlfr_vlm.flow.reward import flow_reward
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.models.heads import LogPartitionHead
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.training.update import update
from rlfr_vlm.types import Outcome, PolicyOutput
from tests.models.test_policy import rollouts_of
from tests.training.test_update import config, setup

MINIMAL = {"output_dir": "unused", "model": {"path": "m"}}
SPEC = FlowSpec(
    (1, 2), 4, ("token_pre",), (1,), (0.8,), 1, {"hidden_size": 64, "rms_norm_eps": 1e-6}
)

ELSEWHERE = [  # (fault, file, test)
    ("1 every time weighed as the last one", "golden/test_method_h.py", "test_h1_the_fields_score_and_loss"),
    ("2 online update without effect", "training/test_update.py", "test_online_update_changes_the_field_and_not_the_policys_gradient"),
    ("4 states doubled by recomputation", "models/test_policy.py", "test_gradient_checkpointing_changes_neither_gradients_nor_latents"),
    ("6 context beyond the response", "flow/test_latents.py", "test_contexts_never_cross_into_a_sibling"),
    ("7 second smallest taken for the minimum, 0 / 0", "golden/test_method_h.py", "test_h3_minmax"),
    ("8 bilateral and mean missing", "flow/test_reward.py", "test_signed_normalisations"),
    ("8 bilateral and mean missing", "test_numpy_references.py", "test_token_rewards"),
    ("9 bilateral top-k on the wrong side", "golden/test_method_h.py", "test_h4_threshold_and_top_k"),
    ("10 power of a negative score", "flow/test_reward.py", "test_gamma_keeps_signs_and_is_never_nan"),
    ("10 crash without top-k", "flow/test_reward.py", "test_filters_switch_off"),
    ("12 noise without a seed", "training/test_update.py", "test_flow_noise_depends_on_the_request_alone"),
    ("12 a single draw of noise", "algorithm/test_credit.py", "test_draws_average_over_noise"),
    ("13 packing drops the flow's reward", "flow/test_reward.py", "test_responses_do_not_see_each_other"),
    ("14 train and reward sides differ", "test_cli.py", "test_a_flow_of_another_backbone_or_config_is_refused"),
    ("17 entropy of the next token", "models/test_policy.py", "test_entropy_of_the_response_distribution"),
    ("17 quantile over padding", "golden/test_method_h.py", "test_h12_entropy_quantile_counts_valid_tokens_only"),
    ("18 advantages out of rounding", "golden/test_method_h.py", "test_h5_equal_float32_rewards_give_exactly_zero"),
    ("19 last token overwritten, EOS added", "rollout/test_hf_engine.py", "test_responses_end_at_eos_and_are_flagged_when_cut"),
    ("19 last token overwritten, EOS added", "rollout/test_vllm_engine.py", "test_a_response_ends_with_its_eos"),
    ("20 unreadable gold answer rewarded", "rewards/test_grader.py", "test_unusable_gold_is_an_error_and_never_a_reward"),
    ("20 gold answer looked up by text", "rewards/test_outcome.py", "test_accuracy_in_group_and_sample_order"),
    ("25 clipped weight not used", "golden/test_method_h.py", "test_h8_flowrl"),
    ("26 micro-batches scaled by a dict's length", "algorithm/test_credit.py", "test_micro_batches_do_not_change_any_objective"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "file", "test"), ELSEWHERE, ids=[f"{fault}-{test}" for fault, _, test in ELSEWHERE]
)
def test_tested_elsewhere(fault, file, test):
    assert f"def {test}(" in (Path(__file__).parent / file).read_text()


# --- reading latents


def read(policy, rollouts, side=("token_pre", 1)):
    return policy.forward(pack(rollouts), request=LatentRequest(SPEC.layers, (side,)))


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "nonreentrant"])
def test_fault_3_neither_loss_reaches_the_other(model_folder, checkpointing):
    """Target or context left in the graph: policy gradients out of the flow's loss, or a second
    backward that fails.
    """
    policy, field = (
        Policy(
            ModelConfig(
                path=model_folder("qwen2"), dtype="float32", gradient_checkpointing=checkpointing
            )
        ),
        FlowField(SPEC),
    )
    rollouts = rollouts_of(policy)
    output = read(policy, rollouts)
    lengths = [len(r.token_ids) for r in rollouts]
    field.accumulate_gradient(output.latents, lengths, [0] * 3, torch.ones(sum(lengths)))
    assert all(p.grad is None for p in policy.model.parameters())
    learned = {name: p.grad.clone() for name, p in field.network.named_parameters()}
    assert any(bool(g.any()) for g in learned.values())
    output.logprobs.sum().backward()
    assert any(p.grad is not None for p in policy.model.parameters())
    assert all(torch.equal(p.grad, learned[name]) for name, p in field.network.named_parameters())


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "nonreentrant"])
def test_fault_4_nothing_is_left_on_the_modules(model_folder, checkpointing):
    """States gathered on the model by hooks: doubled when layers are recomputed, and kept alive."""
    policy = Policy(
        ModelConfig(
            path=model_folder("qwen2"), dtype="float32", gradient_checkpointing=checkpointing
        )
    )
    before = [(set(vars(layer)), dict(layer._forward_hooks)) for layer in policy.layers]
    output = read(policy, rollouts_of(policy))
    output.logprobs.sum().backward()
    assert len(output.latents.states) == len(SPEC.layers)
    assert [(set(vars(layer)), dict(layer._forward_hooks)) for layer in policy.layers] == before


def test_fault_5_layers_may_return_a_tuple_or_a_tensor():
    """`output[0]` of a tensor is its first batch row."""

    class Layer(nn.Module):
        def forward(self, x, as_tuple):
            return (x, None) if as_tuple else x

    layer, states, rows = Layer(), torch.randn(1, 5, 3), torch.tensor([0, 3])
    for as_tuple in (True, False):
        with capture_latents([layer], rows) as captured:
            layer(states, as_tuple)
        assert torch.equal(captured[0], states[0, rows])


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_fault_6_only_responses_are_scored(model_folder, family):
    """The flow run on prompt, padding and image tokens: here a prompt lends its last state as
    context, and there is no padding.
    """
    policy = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
    rollouts = rollouts_of(policy, (1, 1) if "vl" in family else (0, 0))
    batch, latents = pack(rollouts), read(policy, rollouts, ("token_post", 1)).latents
    assert latents.states.shape[1] == len(batch.response_ids) + 2
    assert len(latents.target) == sum(len(r.token_ids) for r in rollouts)
    pictures = torch.eq(batch.token_ids, policy.image_token_id or -1)
    assert pictures.any() == ("vl" in family)
    assert not pictures[batch.response_rows].any()


# --- rewards, logs, fields


def test_fault_11_the_rewards_in_the_log_are_those_of_the_update(model_folder):
    """Logged from a second scoring with new noise."""
    settings = {"coef": 0.1, "threshold": 0.3, "top_k": 4}
    cfg = config(model_folder("qwen2"), flow={"reward": settings})
    learner, samples = setup(cfg)
    metrics, records = update(cfg, learner, samples)
    for sample, record in zip(samples, records, strict=True):
        valid = torch.arange(sample.length) < sample.length - 1
        lengths = torch.tensor([sample.length])
        rewards = flow_reward(
            torch.tensor(record.deviations), valid, lengths, normalise="minmax", **settings
        )
        assert record.flow_rewards == pytest.approx(rewards.tolist(), abs=1e-6)
        assert record.advantages == pytest.approx(
            (sample.outcome_credit + rewards_to_go(rewards, lengths)).tolist(), abs=1e-6
        )
    assert metrics["flow/reward_mean"] == pytest.approx(
        sum(sum(r.flow_rewards) for r in records) / len(records), abs=1e-6
    )


def test_fault_11_no_rewarded_token_is_no_division_by_zero(model_folder):
    cfg = config(
        model_folder("qwen2"), flow={"reward": {"threshold": 1.5, "normalise": "bilateral"}}
    )
    learner, samples = setup(cfg)
    metrics, records = update(cfg, learner, samples)
    assert (
        metrics["flow/num_reward_tokens"]
        == metrics["flow/reward_mean"]
        == metrics["flow/advantage_share"]
        == 0
    )
    assert all(
        record.advantages == pytest.approx([sample.outcome_credit] * sample.length)
        for sample, record in zip(samples, records, strict=True)
    )


def test_fault_13_a_negative_coefficient_is_refused():
    with pytest.raises(UserError, match=r"flow\.reward\.coef.*greater than or equal to 0"):
        parse_config({**MINIMAL, "flow": {"reward": {"coef": -0.01}}})


@pytest.mark.parametrize("damage", ["missing", "torn", "other network"])
def test_fault_14_a_field_that_does_not_load_stops_the_run(tmp_path, damage):
    """A failed load swallowed: the run goes on with a zero field."""
    FlowField(SPEC).save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        FlowField(replace(SPEC, depth=2)).save(tmp_path / "other")
        (tmp_path / "other" / WEIGHTS_FILE).replace(path)
    with pytest.raises(UserError, match=r"flow\.checkpoint"):
        FlowField.load(tmp_path, SPEC)


def test_fault_14_a_field_fitted_on_the_other_side_is_refused(tmp_path):
    """Every published fit has the context after the token, both published RL configs before it."""
    FlowField(SPEC).save(tmp_path)
    with pytest.raises(UserError, match=r"context: checkpoint .*token_pre.*, run .*token_post"):
        FlowField.load(tmp_path, replace(SPEC, context=("token_post",)))


# --- the objective


def loss_and_slope(ratio, advantage, **algorithm):
    """Of one token, through the config and the update's own objective."""
    cfg = parse_config({**MINIMAL, "algorithm": algorithm})
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    output, scores = (
        PolicyOutput(logprobs, None, None, torch.zeros(1, 1)),
        Scores(torch.zeros(1), torch.zeros(1)),
    )
    credit = Credit(torch.tensor([advantage]), torch.zeros(1))
    loss, _ = objective(
        cfg, None, output, scores, credit, [SimpleNamespace(length=1)], UpdateSize(1, 1)
    )
    loss.backward()
    return pytest.approx((loss.item(), logprobs.grad.item()))


def test_fault_15_clip_higher_reaches_the_loss():
    """A flag passed in its place: DAPO's upper bound could not be set."""
    assert loss_and_slope(1.25, 1.0, method="grpo") == (-1.2, 0)
    assert loss_and_slope(1.25, 1.0, method="dapo") == (-1.25, -1.25)
    assert loss_and_slope(1.5, 1.0, method="dapo") == (-1.28, 0)
    assert loss_and_slope(0.7, -1.0, method="dapo") == (0.8, 0)


def test_fault_16_the_dual_clip_is_an_option():
    """The ratio clamped at 3 out of sight: no gradient from bad tokens that became likely."""
    assert loss_and_slope(4.0, -1.0) == (4, 4)
    assert loss_and_slope(4.0, -1.0, dual_clip=3.0) == (3, 0)
    assert all(
        parse_config({**MINIMAL, "algorithm": {"method": m}}).algorithm.dual_clip is None
        for m in METHODS
    )


def test_fault_20_accuracy_decides_what_is_correct():
    """Total reward of at least 1 taken for correct: half a format point and a bonus would do."""
    outcomes = [Outcome(1.5, "wrong"), Outcome(0.4, "correct"), Outcome(1.0, "wrong")]
    assert flow_weights(FlowOnlineConfig(), [SimpleNamespace(outcome=o) for o in outcomes]) == [
        0,
        1,
        0,
    ]


def test_fault_26_the_batch_is_a_mean_over_sequences():
    """The same responses twice give the same loss, cut into micro-batches or not."""
    cfg = parse_config({**MINIMAL, "algorithm": {"method": "flowrl"}})
    samples = [SimpleNamespace(length=n, outcome_credit=a) for n, a in ((3, 1.0), (1, -0.5))]

    def loss(times, size):
        torch.manual_seed(0)
        logprobs = -torch.rand(4).repeat(times)
        output = PolicyOutput(
            logprobs, None, None, torch.zeros(4 * times, 1), torch.zeros(2 * times, 1)
        )
        scores = Scores(logprobs - 0.01, torch.zeros(4 * times), ref_logprobs=logprobs - 0.1)
        credit = Credit(torch.zeros(4 * times), torch.zeros(4 * times))
        return objective(
            cfg,
            lambda means: means[:, 0],
            output,
            scores,
            credit,
            samples * times,
            UpdateSize(4 * size, 2 * size),
        )[0].item()

    assert loss(2, 2) == pytest.approx(loss(1, 1))
    assert 2 * loss(1, 2) == pytest.approx(loss(1, 1))
    assert cfg.algorithm.flowrl.beta == 15


def test_fault_27_log_z_reads_the_whole_prompt(model_folder):
    """The last prompt token left out of the mean, dropout while the loss is taken, and a learning
    rate of 1e-6.
    """
    policy = Policy(ModelConfig(path=model_folder("qwen2"), dtype="float32"))
    rollouts = rollouts_of(policy, (0, 0))
    means = policy.forward(pack(rollouts), with_prompt_means=True).prompt_means
    for rollout, found in zip(rollouts, means, strict=True):
        with torch.no_grad():
            alone, _ = policy.states(pack([rollout]))
        assert torch.allclose(found, alone[: len(rollout.prompt.token_ids)].mean(0), atol=1e-5)
    assert means.requires_grad
    head = LogPartitionHead(64).train()
    assert torch.equal(head(means), head(means))
    cfg = parse_config({**MINIMAL, "algorithm": {"method": "flowrl"}})
    assert cfg.algorithm.flowrl.lr == pytest.approx(100 * cfg.optim.lr)
