"""Figures that monitors and the report read, on cases computed by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.sketch import SKETCH_SIZE, sketch_latents
from rlfr_vlm.learner.optim import SAMPLED, sampled
from rlfr_vlm.run.records import GroupFigures, batch_metrics, length_correlation, ngrams
from rlfr_vlm.training.follow import moved
from rlfr_vlm.training.metrics import ResponseMetrics, flow_health, standard_errors
from rlfr_vlm.types import Outcome


def response(position, correct, deviation, advantage=1.0, rewarded=True, spread=0.5):
    return ResponseMetrics(
        position, correct, advantage, rewarded, float(rewarded), float("nan"), deviation, spread
    )


def test_auc_counts_pairs_of_wrong_and_right_among_all_and_among_siblings():
    found = [
        response(0, True, 1.0),
        response(0, False, 2.0),  # right: 1 < 2
        response(0, False, 1.0),  # a tie
        response(1, True, 5.0),
        response(1, False, 3.0),  # the wrong way round
    ]
    figures = flow_health(found)
    assert figures["flow/auc_in_group"] == pytest.approx((1 + 0.5 + 0) / 3)
    # over all: right {1, 5}, wrong {2, 1, 3}: 1 < 2, 1 = 1, 1 < 3; 5 above all three
    assert figures["flow/auc"] == pytest.approx((1 + 0.5 + 1 + 0) / 6)
    assert figures["flow/deviation_spread"] == pytest.approx(0.5)


def test_auc_of_noise_is_one_half_and_of_order_is_one():
    rng = np.random.default_rng(0)
    noise = [response(i // 8, bool(rng.random() < 0.5), float(rng.normal())) for i in range(4000)]
    assert flow_health(noise)["flow/auc"] == pytest.approx(0.5, abs=0.03)
    ordered = [response(0, i < 5, float(i)) for i in range(10)]
    assert flow_health(ordered)["flow/auc"] == flow_health(ordered)["flow/auc_in_group"] == 1.0


def test_no_auc_where_all_are_right_or_no_token_is_scorable():
    assert (
        not {"flow/auc", "flow/auc_in_group"}
        & flow_health([response(0, True, 1.0), response(0, True, 2.0)]).keys()
    )
    nothing = flow_health(
        [response(0, True, float("nan"), spread=float("nan")), response(0, False, 1.0)]
    )
    assert (
        not {"flow/auc", "flow/auc_in_group"} & nothing.keys()
        and nothing["flow/deviation_spread"] == 0.5
    )


def test_groups_that_only_the_flow_moves():
    flat = [
        response(0, True, 1.0, advantage=0.0, rewarded=False),
        response(0, True, 1.0, advantage=0.0),
    ]
    unrewarded = [response(1, True, 1.0, advantage=0.0, rewarded=False)]
    mixed = [response(2, True, 1.0, advantage=1.0), response(2, False, 1.0, advantage=-1.0)]
    assert flow_health([*flat, *unrewarded, *mixed])["flow/only_groups_frac"] == pytest.approx(
        1 / 3
    )


def test_standard_errors():
    values = np.random.default_rng(1).normal(0.5, 2.0, 400)
    expected = values.mean() / (values.std() / 20)
    assert standard_errors(values.mean(), (values**2).mean(), 400) == pytest.approx(expected)
    assert standard_errors(0.0, 0.0, 10) == 0.0


def test_rare_tokens_that_a_small_sample_lacks_are_no_mismatch():
    """Tokens of one likely and one rare kind, honestly drawn: without a rare one the sample hardly
    varies.
    """
    rng = np.random.default_rng(2)
    rare = 0.002
    entropy = -(rare * np.log(rare) + (1 - rare) * np.log(1 - rare))
    worst = dict.fromkeys((0.0, entropy), 0.0)
    for _ in range(200):
        surprise = np.where(rng.random(256) < rare, -np.log(rare), -np.log(1 - rare)) - entropy
        for least in worst:
            worst[least] = max(
                worst[least],
                abs(standard_errors(surprise.mean(), (surprise**2).mean(), 256, least)),
            )
    assert worst[0.0] > 100 and worst[entropy] < 6


def test_weights_moved_by_a_known_share():
    before = sampled([torch.full((10, 10), 2.0), torch.zeros(5)])
    after = sampled([torch.full((10, 10), 2.2), torch.zeros(5)])
    assert moved(before, after) == pytest.approx(0.1, rel=1e-5)
    assert moved(torch.zeros(3), torch.ones(3)) == 0.0
    many = sampled([torch.arange(3 * SAMPLED, dtype=torch.float32)])
    assert len(many) == SAMPLED and many[1] == 3


def group(
    rewards, lengths, verdicts=None, parts=None, position=0, repetition=None, refrain=((), 0)
):
    verdicts = verdicts or ["correct"] * len(rewards)
    parts = parts or [{}] * len(rewards)
    outcomes = tuple(Outcome(r, v, p) for r, v, p in zip(rewards, verdicts, parts, strict=True))
    size = len(rewards)
    return GroupFigures(
        position,
        True,
        5,
        tuple(lengths),
        (False,) * size,
        outcomes,
        tuple(repetition or [0.0] * size),
        refrain,
    )


def test_a_reward_that_pays_for_length_is_told_from_one_whose_right_answers_are_long():
    paid = [group([n / 10 for n in (3, 5, 9, 12)], (3, 5, 9, 12), position=i) for i in range(4)]
    assert length_correlation(paid) == pytest.approx(1.0)
    # right answers are longer, but among the right ones the reward is the same
    honest = [
        group(
            [1.0, 1.0, 0.0, 0.0],
            (20, 30, 5, 9),
            ["correct", "correct", "wrong", "wrong"],
            position=i,
        )
        for i in range(4)
    ]
    assert length_correlation(honest) == 0.0
    charged = [group([-n / 10 for n in (3, 5, 9, 12)], (3, 5, 9, 12), position=i) for i in range(4)]
    assert length_correlation(charged) == pytest.approx(-1.0)


def test_a_format_that_takes_tokens_is_no_pay_for_length():
    formatted = [
        group(
            [1.5, 1.5, 1.0, 1.0],
            (30, 28, 10, 12),
            parts=[{"format": 1.0}] * 2 + [{"format": 0.0}] * 2,
            position=i,
        )
        for i in range(4)
    ]
    assert length_correlation(formatted) == 0.0
    assert (
        length_correlation([group([1.0, 0.0], (3, 4), ["correct", "wrong"])]) is None
    )  # nobody has a sibling like it
    assert "reward/length_corr" not in batch_metrics(
        [group([1.0, 0.0], (3, 4), ["correct", "wrong"])]
    )


def test_repetition_counts_4_grams_seen_before():
    assert ngrams([1, 2, 3, 4, 5]) == Counter({(1, 2, 3, 4): 1, (2, 3, 4, 5): 1})
    found = ngrams([7] * 10)
    assert found == Counter({(7, 7, 7, 7): 7}) and 1 - len(found) / found.total() == pytest.approx(
        6 / 7
    )
    assert not ngrams([1, 2, 3])


def latents(states, lengths):
    rows = torch.arange(states.shape[1])
    return Latents(states, rows, rows[None], torch.ones(1, len(rows), dtype=torch.bool))


def test_sketches_keep_distances_and_do_not_depend_on_neighbours_or_scale():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(3, 6, 200, generator=generator)  # layers, responses, width
    states = centres.repeat_interleave(4, 1)  # four equal tokens each
    found = sketch_latents(latents(states, [4] * 6), [4] * 6)
    assert found.shape == (6, SKETCH_SIZE)
    unit = (centres / centres.square().mean(-1, keepdim=True).sqrt()).transpose(0, 1).flatten(1)
    ratio = torch.pdist(found) / torch.pdist(unit)
    assert ((ratio > 0.6) & (ratio < 1.4)).all()
    alone = sketch_latents(latents(states[:, 4:8], [4]), [4])
    assert torch.allclose(alone[0], found[1], atol=1e-4)
    assert torch.allclose(sketch_latents(latents(states * 100, [4] * 6), [4] * 6), found, atol=1e-3)
