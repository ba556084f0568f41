"""Which states are targets and which are contexts; one response alone is in tests/golden."""

import pytest
import torch

from rlfr_vlm.flow.latents import context_rows
from rlfr_vlm.models.pack import pack
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout


def packed(*lengths, prompt_length=2):
    ids = tuple(range(prompt_length))
    prompt = EncodedPrompt(Prompt("p", (), (), "1"), ids, ids, torch.arange(prompt_length)[None])
    return pack(
        [Rollout(prompt, i, tuple(range(n)), (), "", "stop", 0) for i, n in enumerate(lengths)]
    )


def contexts(batch, mode, shift=1):
    rows, valid = context_rows(
        batch.response_rows, batch.lengths, batch.prompt_start, batch.prompt_end, mode, shift
    )
    return [
        (int(t), int(c) if v else None)
        for t, c, v in zip(batch.response_rows, rows, valid, strict=True)
    ]


def test_contexts_never_cross_into_a_sibling():
    batch = packed(3, 2)
    assert contexts(batch, "token_post") == [(2, 1), (3, 2), (4, 3), (5, 1), (6, 5)]
    assert contexts(batch, "token_pre") == [(2, 3), (3, 4), (4, None), (5, 6), (6, None)]


@pytest.mark.parametrize("shift", [2, 3])
def test_larger_shifts(shift):
    post = {2: [(2, 0), (3, 1), (4, 2)], 3: [(2, None), (3, 0), (4, 1)]}
    pre = {2: [(2, 4), (3, None), (4, None)], 3: [(2, None), (3, None), (4, None)]}
    assert contexts(packed(3), "token_post", shift) == post[shift]
    assert contexts(packed(3), "token_pre", shift) == pre[shift]


def test_predicting_rows_are_one_before_and_the_prompts_last_for_the_first():
    batch = packed(3, 2)
    assert batch.predict_rows.tolist() == [1, 2, 3, 1, 5]
    assert batch.starts.tolist() == [2, 5]
