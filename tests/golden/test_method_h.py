"""The method's golden numbers, worked out in numpy apart from this code. Float64, but for FlowField
and log-probs, which are float32.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from rlfr_vlm.algorithm.advantages import gae, group_advantages, rewards_to_go, whiten
from rlfr_vlm.algorithm.losses import flowrl_loss, kl_estimate, policy_loss, value_loss
from rlfr_vlm.algorithm.selection import flow_token_weights, flow_weights
from rlfr_vlm.algorithm.shaping import likelihood_scores, shape_by_entropy
from rlfr_vlm.config import FlowOnlineConfig
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents, context_rows, resolve_layers
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import debias_weight, logit_normal_times, velocity_deviation
from rlfr_vlm.flow.reward import filter_scores, flow_reward, normalise_scores
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.models.logprobs import token_logprobs
from rlfr_vlm.models.pack import pack
from rlfr_vlm.types import EncodedPrompt, Outcome, Prompt, Rollout


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def near(values, abs=1e-6):
    return pytest.approx(values, abs=abs)


# --- H1, H2: the velocity network and its deviation

H, Z = f64([[1, 2, -1, 0.5], [0.2, -0.4, 0.6, -0.8]]), f64([[0.5, -1, 1, 0], [1, 0, -1, 0.5]])
C, LAYER = f64([[0.3, -0.1, 0.7, 0.2], [1, 2, -1, 0.5]]), f64([0.25, 0.25])


def golden_network():
    """Parameters in alphabetical order of `model.` names, flat element i of the j-th 0.1 sin(i + 1
    + 0.7 j), norms 1 above.
    """
    network = VelocityNet(4, depth=1, eps=1e-6).double()
    for embedding in (network.time_embed, network.layer_embed):
        embedding.freqs.copy_(
            torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)[None]
        )
    with torch.no_grad():
        for j, (name, parameter) in enumerate(
            sorted(network.named_parameters(), key=lambda item: f"model.{item[0]}")
        ):
            value = 0.1 * torch.sin(
                torch.arange(parameter.numel(), dtype=torch.float64) + 1 + 0.7 * j
            )
            parameter.copy_(
                (value + name.endswith(("in_ln.weight", "norm_final.weight"))).view_as(parameter)
            )
    return network


def deviation(network, t):
    return velocity_deviation(network, H, C, Z, f64([t, t]), LAYER)


@pytest.mark.parametrize(
    ("t", "velocity", "expected"),
    [
        (
            0.5,
            [[0.054116, -0.318699, 0.124642, 0.044814], [0.009701, -0.312537, 0.161002, -0.008880]],
            [3.983468, 1.100243],
        ),
        (
            0.8,
            [[0.040623, -0.257984, 0.058762, 0.070223], [0.028560, -0.335998, 0.172813, -0.000860]],
            [3.812174, 1.103808],
        ),
    ],
)
def test_h1_velocity_and_deviation(t, velocity, expected):
    network = golden_network()
    assert torch.allclose(
        network((1 - t) * Z + t * H, f64([t, t]), LAYER, C), f64(velocity), atol=1e-6
    )
    found = deviation(network, t)
    assert found.dtype == torch.float64
    assert found.tolist() == near(expected)


def test_h1_two_times_are_each_weighted_by_their_own():
    both = torch.stack([deviation(golden_network(), t) for t in (0.5, 0.8)])
    assert both.mean(0).tolist() == near([3.897821, 1.102025])
    assert (both * f64([[debias_weight(0.5)], [debias_weight(0.8)]])).mean(0).tolist() == near(
        [9.616083, 2.757738]
    )


def test_h1_the_fields_score_and_loss(monkeypatch):
    """Layer 1 of 4; two responses of one token each; the noise put in place of the drawn one."""
    spec = FlowSpec(
        (1,), 4, ("token_post",), (1,), (0.5, 0.8), 1, {"hidden_size": 4, "rms_norm_eps": 1e-6}
    )
    field = FlowField(spec, golden_network().float())
    noise = iter([Z[0], Z[1]] * 2)
    monkeypatch.setattr(
        field, "draw", lambda length, seed: torch.cat([next(noise), f64([0.0])]).float()[None, None]
    )
    latents = Latents(
        torch.cat([H, C]).float()[None],
        torch.tensor([0, 1]),
        torch.tensor([[2, 3]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert field.score(latents, [1, 1], [0, 0]).tolist() == near([9.616083, 2.757738], 1e-5)
    loss = field.accumulate_gradient(latents, [1, 1], [0, 0], torch.tensor([0.25, 0.75]))
    assert loss == near(0.25 * 3.897821 + 0.75 * 1.102025, 1e-5)


def test_h2_a_new_network_is_zero_everywhere():
    network = VelocityNet(4, depth=2).double()
    for t in (0.1, 0.5, 0.8):
        assert deviation(network, t).tolist() == near([3.375, 1.2625])
    assert (debias_weight(0.8) * deviation(network, 0.8)).tolist() == near([13.5, 5.05])


# --- H3, H4: normalisation, threshold and top-k


@pytest.mark.parametrize(
    ("scores", "mask", "expected"),
    [
        ([2, 5, 3, 8, 9, 9], [1, 1, 1, 1, 0, 0], [0, 0.5, 0.166667, 1, 0, 0]),
        ([4, 1, 2, 3, 6, 11], [1] * 6, [0.3, 0, 0.1, 0.2, 0.5, 1]),
        ([7, 7, 7, 7, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6),
        ([5, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6),
    ],
)
def test_h3_minmax(scores, mask, expected):
    valid, values = torch.tensor(mask, dtype=torch.bool), f64(scores)
    assert normalise_scores(values, valid, "minmax").tolist() == near(expected)
    values[~valid] = 1e9
    assert normalise_scores(values, valid, "minmax").tolist() == near(expected)


@pytest.mark.parametrize(
    ("normalise", "top_k", "scores", "expected"),
    [
        ("minmax", 3, [0.1, 0.95, 0.7, 0.61, 0.6, 0.99, 0.8], [0, 0.95, 0, 0, 0, 0.99, 0.8]),
        ("minmax", 3, [0.65, 0.2, 0.9, 0, 0, 0, 0], [0.65, 0, 0.9, 0, 0, 0, 0]),
        ("minmax", 3, [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1], [0, 0, 0, 0, 0.9, 0.95, 1]),
        ("minmax", 0, [0.6, 0.61], [0, 0.61]),
        ("bilateral", 4, [-1, -0.9, -0.8, -0.1, 0, 0.8, 0.9, 1], [-1, -0.9, 0, 0, 0, 0, 0.9, 1]),
        ("bilateral", 4, [0.7, 0.8, 0.9, 0.95, 1, -0.7], [0, 0, 0, 0.95, 1, -0.7]),
    ],
)
def test_h4_threshold_and_top_k(normalise, top_k, scores, expected):
    given = f64(scores)
    assert filter_scores(given, normalise, 0.6, top_k).tolist() == near(expected)
    assert given.tolist() == scores


# --- H5, H6, H7: advantages


def group_norm(rewards, dtype=torch.float64):
    count = len(rewards)
    return group_advantages(
        torch.tensor(rewards, dtype=dtype),
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.long),
    )


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        (
            [1, 1, 0.5, 0, 0, 0.5, 1, 0],
            [1.080123, 1.080123, 0, -1.080123, -1.080123, 0, 1.080123, -1.080123],
        ),
        ([1, 0.5, 0, 0.5], [1.224745, 0, -1.224745, 0]),
        ([0.5] * 4, [0] * 4),
    ],
)
def test_h5_group_norm(rewards, expected):
    assert group_norm(rewards).tolist() == near(expected)


@pytest.mark.parametrize(("value", "count"), [(0.1, 8), (0.7, 7), (1 / 3, 8)])
def test_h5_equal_float32_rewards_give_exactly_zero(value, count):
    assert group_norm([value] * count, torch.float32).tolist() == [0.0] * count


def test_h6_rewards_to_go():
    rewards, lengths = f64([0, -0.008, 0, 1.49]), torch.tensor([4])
    assert rewards_to_go(rewards, lengths).tolist() == near([1.482, 1.482, 1.49, 1.49])
    assert rewards_to_go(rewards, lengths, 0.9).tolist() == near([1.07901, 1.1989, 1.341, 1.49])


def test_h6_from_deviations_to_advantages():
    scores, valid, lengths = (
        f64([4, 1, 2, 9, 3]),
        torch.ones(5, dtype=torch.bool),
        torch.tensor([5]),
    )
    assert normalise_scores(scores, valid, "minmax").tolist() == near([0.375, 0, 0.125, 1, 0.25])
    for scale in (1.0, debias_weight(0.8), 0.37):
        rewards = flow_reward(scores * scale, valid, lengths, 0.01, "minmax", 0.3, 2)
        assert rewards.tolist() == near([-0.00375, 0, 0, -0.01, 0], 1e-12)
        advantages = group_norm([1, 0.5, 0, 0.5])[0].double() + rewards_to_go(rewards, lengths)
        assert advantages.tolist() == near([1.210995, 1.214745, 1.214745, 1.214745, 1.224745])
        bilateral = flow_reward(scores * scale, valid, lengths, 0.01, "bilateral", 0.6, 0)
        assert bilateral.tolist() == near([0, 0.01, 0.0075, -0.01, 0], 1e-12)


def test_h7_gae_whitening_and_value_loss():
    advantages, returns = gae(
        f64([0, -0.01, 0, 1]), f64([0.2, 0.3, 0.5, 0.6]), torch.tensor([4]), gamma=1.0, lam=0.95
    )
    assert advantages.tolist() == near([0.7137, 0.646, 0.48, 0.4])
    assert returns.tolist() == near([0.9137, 0.946, 0.98, 1.0])
    assert whiten(advantages).tolist() == near([1.225117, 0.685755, -0.636758, -1.274114])
    values, old, targets = f64([0.5, 0.9]), f64([0.2, 0.8]), f64([1, 0])
    terms = [2 * value_loss(values[i], old[i], targets[i], f64(1.0))[0].item() for i in range(2)]
    assert terms == near([0.36, 0.81])
    assert value_loss(values, old, targets, f64([0.5, 0.5]))[0].item() == near(0.2925)


# --- H8 to H11: losses and shaping


def test_h8_flowrl():
    """Padding of the published numbers dropped: rows of 3 and 4 tokens."""
    lengths = torch.tensor([3, 4])
    logprobs = f64([-1, -0.5, -0.25, -2, -1, -0.6, -0.4]).requires_grad_()
    old, ref = (
        f64([-1.1, -0.45, -0.3, -1.8, -1, -0.5, -0.3]),
        f64([-1.2, -0.6, -0.3, -1.5, -1.1, -0.7, -0.5]),
    )
    log_z = f64([0.3, -0.2]).requires_grad_()
    loss, metrics = flowrl_loss(
        logprobs, old, ref, log_z, f64([1, -1]), lengths, 2, beta=15.0, clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert loss.item() == near(204.545345)
    assert log_z.grad.tolist() == near([-16.117076, 11.8])
    assert logprobs.grad.tolist() == near(
        [-5.372359] * 3 + [2.95] * 4
    )  # 2 w delta / (B |y|): nothing through w
    assert metrics["flowrl/logprob"].item() == near((-0.583333 - 1) / 2)
    assert metrics["flowrl/ref_logprob"].item() == near((-0.7 - 0.95) / 2)
    assert metrics["flowrl/residual"].item() == near((14.583333 + 14.75) / 2)
    assert metrics["flowrl/weight"].item() == near((1.105171 + 0.8) / 2)
    unclipped, _ = flowrl_loss(
        logprobs, old, ref, log_z, f64([1, -1]), lengths, 2, clip_low=1.0, clip_high=9.0
    )
    assert unclipped.item() == near(190.438598)  # what the published code computes


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.4, [1.5, -0.8, 0.15, -0.06, 0]), (0.1, [1.2, -0.95, 0.15, -0.09, 0])]
)  # of GRPO and of PPO
def test_h9_entropy_shaping(alpha, expected):
    advantages = f64([1, -1, 0.1, -0.1, 0]).requires_grad_()
    entropy = f64([2, 0.5, 1, 0.1, 3]).requires_grad_()
    shaped = shape_by_entropy(advantages, entropy, alpha, kappa=2.0)
    assert shaped.tolist() == near(expected)
    assert not shaped.requires_grad


@pytest.mark.parametrize(("logits", "expected"), [([0, 1, 2], 0.832396), ([3, 3, 3, 3], 1.386294)])
def test_h9_entropy_of_logits(logits, expected):
    _, entropy = token_logprobs(
        torch.ones(1, 1),
        torch.tensor(logits).float()[:, None],
        torch.tensor([0]),
        torch.tensor([]),
        1.0,
        True,
    )
    assert entropy.item() == near(expected)


def test_h10_likelihood_shaping():
    logprobs, valid, lengths = (
        f64([-0.05, -2.3, -0.7, -1.6, -0.1]),
        torch.ones(5, dtype=torch.bool),
        torch.tensor([5]),
    )
    entropy = f64([0.1, 0.2, 0.3, 0.4, 0.5])
    scores = likelihood_scores(logprobs, entropy, "surprisal")
    assert normalise_scores(scores, valid, "minmax").tolist() == near(
        [0, 1, 0.288889, 0.688889, 0.022222]
    )
    rewards = flow_reward(scores, valid, lengths, 0.01, "minmax", 0.6, 0)
    assert (-rewards / 0.01).tolist() == near([0, 1, 0, 0.688889, 0])
    assert rewards_to_go(rewards, lengths).tolist() == near(
        [-0.016889, -0.016889, -0.006889, -0.006889, 0]
    )
    assert torch.equal(likelihood_scores(logprobs, entropy, "entropy"), entropy)


@pytest.mark.parametrize(("dual_clip", "last"), [(None, 4), (3.0, 3)])
def test_h11_clipped_loss(dual_clip, last):
    log_ratio, advantages, one = (
        f64([0.7, 0.9, 1.1, 1.5, 4]).log(),
        f64([1, -1, 1, 1, -1]),
        f64([1.0]),
    )
    losses = [
        policy_loss(log_ratio[i : i + 1], advantages[i : i + 1], one, dual_clip=dual_clip)[0].item()
        for i in range(5)
    ]
    assert losses == near([-0.7, 0.9, -1.1, -1.2, last])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [0.5, -1]), ("k2", [0.125, 0.5]), ("k3", [0.106531, 0.718282])],
)
def test_h11_kl_estimates(estimator, expected):
    assert kl_estimate(f64([-1, -2]), f64([-1.5, -1]), estimator).tolist() == near(expected)


# --- H12: what the online update follows

THREE = [
    SimpleNamespace(outcome=Outcome(r, v))
    for r, v in ((1.0, "correct"), (0.5, "wrong"), (1.5, "correct"))
]


@pytest.mark.parametrize(("soft", "expected"), [(0.0, 3.5), (0.2, 3.636364)])
def test_h12_online_weights(soft, expected):
    online = FlowOnlineConfig(soft_weight=soft)
    weights = flow_token_weights(
        online,
        flow_weights(online, THREE),
        [3, 2, 4],
        torch.ones(9, dtype=torch.bool),
        torch.zeros(9),
    )
    assert (weights * torch.tensor([1, 2, 3, 4, 6, 5, 5, 5, 5])).sum().item() == near(expected)


def test_h12_all_wrong_is_zero():
    assert flow_weights(FlowOnlineConfig(), [THREE[1]] * 3) == [0.0] * 3


def test_h12_entropy_quantile_counts_valid_tokens_only():
    """The quantile .5 of .9, .1, .5, .2 is .35, whatever stands on tokens without a context: .9 and
    .5 are selected.
    """
    entropy, valid = (
        torch.tensor([0.0, 0, 0, 0.9, 0.1, 0.5, 0.2]),
        torch.tensor([False] * 3 + [True] * 4),
    )
    hard = FlowOnlineConfig(select=("correct", "entropy"), entropy_quantile=0.5)
    soft = hard.model_copy(update={"soft_weight": 0.5})
    assert flow_token_weights(hard, [1.0], [7], valid, entropy).tolist() == near(
        [0, 0, 0, 0.5, 0, 0.5, 0]
    )
    assert flow_token_weights(soft, [3.0], [7], valid, entropy).tolist() == near(
        [0, 0, 0, 1, 0.5, 1, 0.5]
    )


# --- H13, H14: alignment, layers, times


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_post", [(2, 1), (3, 2), (4, 3)]),
        ("token_pre", [(2, 3), (3, 4), (4, None)]),
        ("identity", [(2, 2), (3, 3), (4, 4)]),
    ],
)
def test_h13_targets_and_contexts(mode, expected):
    """Prompt of 2, response of 3. The actions are the response's own tokens, EOS and a cut
    response's last one among them.
    """
    prompt = EncodedPrompt(Prompt("p", (), (), "1"), (0, 1), (0, 1), torch.arange(2)[None])
    batch = pack([Rollout(prompt, 0, (7, 8, 9), (), "", "length", 0)])
    rows, valid = context_rows(
        batch.response_rows, batch.lengths, batch.prompt_start, batch.prompt_end, mode, 1
    )
    assert [
        (int(t), int(c) if v else None)
        for t, c, v in zip(batch.response_rows, rows, valid, strict=True)
    ] == expected
    assert batch.response_ids.tolist() == [7, 8, 9]
    assert batch.predict_rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("num_layers", "fractions", "layers"),
    [
        (28, (0.25, 0.5, 0.75), (7, 14, 21)),
        (32, (0.25, 0.5, 0.75), (8, 16, 24)),
        (36, (0.25, 0.5, 0.75), (9, 18, 27)),
        (26, (0.25, 0.5, 0.75), (6, 13, 20)),
        (30, (0.25, 0.5, 0.75), (8, 15, 22)),
        (6, (0.25, 0.5, 0.75), (2, 3, 4)),
        (28, (1.0,), (27,)),
    ],
)
def test_h14_layers(num_layers, fractions, layers):
    assert resolve_layers(fractions, num_layers) == layers


def test_h14_logit_normal_times():
    assert logit_normal_times(f64([-1, 0, 1])).tolist() == near([0.268941, 0.5, 0.731059])
