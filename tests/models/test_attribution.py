"""Where tokens look: against transformers' own attention weights, in every vision family, packed
with a shared prompt.
"""

import base64
import math
import zlib
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.learner.microbatches import blank_prompt
from rlfr_vlm.models import attention
from rlfr_vlm.models.attention import (
    PackedLayout,
    Segment,
    WatchedLayout,
    WatchedTokens,
    weights_on,
)
from rlfr_vlm.models.attribution import Attribution, attribute, picture_grids, pooled
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy, WeightAccess
from tests.models.test_policy import VISION, rollouts_of

LAYERS = (1, 2, 3)


def eager(policy, rollout, layers):
    """[T, K]: transformers' own weights of the positions that predict a response, mean over heads
    and layers, its sequence by itself.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        policy.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    extra = dict(rollout.prompt.vision)
    if extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        found = model(input_ids=ids, output_attentions=True, **extra).attentions
    start = len(rollout.prompt.token_ids)
    return torch.stack([found[k][0] for k in layers]).mean((0, 1))[start - 1 : -1]


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("checkpointing", ["off", "nonreentrant"])
def test_attention_equals_that_of_transformers_with_a_shared_prompt(
    model_folder, family, checkpointing
):
    policy = Policy(
        ModelConfig(
            path=model_folder(family), dtype="float32", gradient_checkpointing=checkpointing
        )
    )
    rollouts = rollouts_of(policy, (1, 0, 3), group_size=2)
    found = attribute(policy, pack(rollouts, unanswered=blank_prompt(policy)), rollouts, LAYERS)
    assert [one is None for one in found] == [False, False, True, True, False, False]
    for rollout, ours in zip(rollouts, found, strict=True):
        if ours is not None:
            seen = torch.tensor(rollout.prompt.token_ids) == policy.image_token_id
            expected = eager(policy, rollout, LAYERS)[:, : len(seen)][:, seen]
            assert ours.cells.shape == (
                len(rollout.token_ids),
                sum(rows * columns for rows, columns in ours.grids),
            )
            assert torch.allclose(ours.cells, expected, atol=1e-5)
            assert torch.allclose(ours.share, expected.sum(1), atol=1e-5)
            assert 0.01 < float(ours.share.min()) < float(ours.share.max()) < 1


def test_text_models_have_nothing_to_show_and_do_no_work(model_folder):
    policy = Policy(ModelConfig(path=model_folder("qwen2"), dtype="float32"))
    rollouts = rollouts_of(policy, (0,))
    policy.access = WeightAccess(None)  # a forward would fail
    assert attribute(policy, pack(rollouts), rollouts, LAYERS) == [None] * 3


def test_a_watched_forward_computes_what_an_unwatched_one_does_to_the_bit(model_folder):
    policy = Policy(ModelConfig(path=model_folder("qwen2_5_vl"), dtype="bfloat16"))
    rollouts = rollouts_of(policy, (1, 2))
    batch = pack(rollouts)
    plain = policy.forward(batch).logprobs
    state = torch.get_rng_state()
    attribute(policy, batch, rollouts, LAYERS)
    assert torch.equal(torch.get_rng_state(), state)
    watch = WatchedTokens(torch.arange(4), 2, torch.arange(3))
    watched = replace(batch, layout=WatchedLayout(batch.layout, LAYERS, [watch]))
    assert torch.equal(policy.forward(watched).logprobs, plain)
    assert torch.equal(policy.forward(batch).logprobs, plain)


def test_weights_are_a_softmax_over_everything_visible_and_nothing_else(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(4, 5, 8, generator=generator),
        torch.randn(2, 9, 8, generator=generator),
    )
    whole = weights_on(query, key, torch.arange(9), 0.3)
    assert torch.allclose(whole.sum(1), torch.ones(5))
    assert torch.equal(
        whole.triu(5), torch.zeros(5, 9)
    )  # query r is token 4 + r, and sees no later one
    monkeypatch.setattr(attention, "WATCHED_WEIGHTS", 80)  # two queries at a time
    assert torch.allclose(
        weights_on(query, key, torch.tensor([7, 2]), 0.3), whole[:, [7, 2]], atol=1e-6
    )


def test_weights_of_two_keys_by_hand_and_of_a_key_that_is_masked():
    query, key = (
        torch.tensor([[[1.0]]]),
        torch.tensor([[[0.0], [2.0]]]),
    )  # scores 0 and 0.5 * 2: softmax of (0, 1)
    assert weights_on(query, key, torch.arange(2), 0.5)[0].tolist() == pytest.approx(
        [1 / (1 + math.e), math.e / (1 + math.e)]
    )
    masked = torch.tensor([[[float("-inf")], [2.0]]])
    assert weights_on(query, masked, torch.arange(2), 0.5).tolist() == [[0.0, 1.0]]


def test_other_sequences_of_the_batch_are_not_looked_at():
    layout = PackedLayout([Segment(0, 4), Segment(4, 7, 0, 4), Segment(7, 9)], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    found = []
    for noise in (0.0, 1.0):
        key[:, :, 7:] += noise
        watched = WatchedLayout(
            layout, (3, 5), [WatchedTokens(torch.tensor([0, 1, 2, 3, 4, 5]), 3, torch.arange(6))]
        )
        for layer in range(6):
            watched.attend(layer, query, key, value, 0.3)
        found.append(watched.weights[0])
    assert torch.allclose(found[0].sum(1), torch.ones(3))
    assert torch.equal(*found)
    key[:, :, 0] += 1.0
    watched.attend(3, query, key, value, 0.3)
    assert not torch.equal(watched.weights[0], found[0])


@pytest.mark.parametrize("family", VISION)
def test_grids_follow_the_rotary_positions_of_the_image_tokens(model_folder, family):
    policy = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
    prompt = rollouts_of(policy, (3,), group_size=1)[0].prompt
    rows = (torch.tensor(prompt.token_ids) == policy.image_token_id).nonzero()[:, 0]
    _, height, width = prompt.position_ids[:, rows]
    grids = picture_grids(prompt, policy.processor.image_processor.merge_size)
    assert len(grids) == 3
    first = 0
    for num_rows, num_columns in grids:
        part = slice(first, first := first + num_rows * num_columns)
        assert (height[part] - height[part][0]).tolist() == [
            r for r in range(num_rows) for _ in range(num_columns)
        ]
        assert (width[part] - width[part][0]).tolist() == [*range(num_columns)] * num_rows
    assert first == len(rows)


def test_large_grids_are_averaged_down_and_small_ones_stay():
    weights = torch.arange(2 * (4 * 6 + 2 * 3), dtype=torch.float32).view(2, -1)
    cells, grids = pooled(weights, [(4, 6), (2, 3)], most=3)
    assert grids == ((3, 3), (2, 3))
    assert torch.equal(cells[:, 9:], weights[:, 24:])
    assert (
        cells[0, 0] == weights[0, [0, 1, 6, 7]].mean()
    )  # adaptive bins of 4 rows in 3: 0-1, 1-2, 2-3
    even, grids = pooled(torch.ones(1, 32 * 64), [(32, 64)])
    assert grids == ((16, 16),)
    assert torch.equal(even, torch.ones(1, 256))


def test_what_is_written_can_be_read_back():
    cells = torch.tensor([[0.1, 0.2, 0.0, 0.05], [0.0, 0.0, 0.0, 0.0]])
    line = Attribution(((2, 2),), cells, cells.sum(1)).encoded()
    assert line["grids"] == [[2, 2]]
    assert line["share"] == [0.35, 0.0]
    assert list(zlib.decompress(base64.b64decode(line["cells"]))) == [128, 255, 0, 64, 0, 0, 0, 0]
