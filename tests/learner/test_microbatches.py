"""Fillers change no number: the update is checked over ranks in test_ranks.py; here, what they are."""

import torch

from rlfr_vlm.config import DataConfig, ModelConfig, RolloutConfig
from rlfr_vlm.data.prompts import parse_row
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.learner.microbatches import blank_prompt, filler, synchronised
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine


class Beside(Ranks):
    """A rank whose neighbour has these micro-batches (whether there are pictures in them)."""

    def __init__(self, other):
        super().__init__()
        self.size, self.other = 2, other

    def gather(self, value, place):
        return [value, self.other]


def rollouts(folder):
    policy = Policy(ModelConfig(path=folder, dtype="float32", freeze_vision=False))
    prompt = Renderer(policy, DataConfig(), "rows.jsonl").encode(
        parse_row({"prompt": "1 + 1?", "answer": "2"}, "r", DataConfig())
    )
    sampling = SamplingConfig(group_size=3, temperature=1.0, max_new_tokens=6, seed_key=(0,))
    return policy, list(HFEngine(RolloutConfig(), policy).sample([prompt], sampling)[0].rollouts)


def test_ranks_agree_on_number_and_pictures(model_folder):
    policy, own = rollouts(model_folder("qwen2_5_vl"))
    parts = list(synchronised(own, 10_000, policy, Beside([True, False, True])))
    assert [part.rows for part in parts] == [[0, 1, 2], [], []]
    assert [bool(part.batch.vision) for part in parts] == [True, False, True]
    assert [bool(part.batch.vision) for part in synchronised(own, 10_000, policy, Beside([]))] == [
        False
    ]
    assert [part.rows for part in synchronised([], 10_000, policy, Beside([False]))] == [[]]


def test_a_blank_picture_beside_responses_changes_neither_log_probs_nor_gradients(model_folder):
    policy, own = rollouts(model_folder("qwen2_5_vl"))
    found = []
    for extra in (None, blank_prompt(policy)):
        policy.model.zero_grad(set_to_none=True)
        output = policy.forward(pack(own, unanswered=extra), with_entropy=True)
        output.logprobs.sum().backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in policy.model.named_parameters()
        }
        found.append((output.logprobs.detach(), gradients))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=1e-5, rtol=1e-4), name
    assert all(not g.any() for name, g in found[1][1].items() if name.startswith("model.visual"))


def test_a_filler_is_two_tokens_of_any_model(model_folder):
    for family in ("llama", "qwen2_5_vl"):
        policy = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
        output = policy.forward(pack([filler(policy)]))
        assert output.logprobs.shape == (1,)
        assert bool(output.logprobs.isfinite().all())
