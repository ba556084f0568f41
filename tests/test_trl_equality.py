"""Loss and gradients against TRL's own GRPOTrainer, on the same batch and model, padded there and
packed here.

Two of TRL's defaults differ: within a group it divides by std + 1e-4, here the std stands alone and
equal rewards give zero; and it weighs the divergence by the importance ratio
(`use_bias_correction_kl`, switched off below), which GRPO as published does not.
"""

import importlib
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_vlm.algorithm.advantages import group_advantages
from rlfr_vlm.algorithm.losses import (
    cispo_loss,
    kl_estimate,
    policy_loss,
    sequence_log_ratio,
    token_weights,
)
from rlfr_vlm.config import ModelConfig
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout

trl_utils = pytest.importorskip("trl.import_utils")

PROMPT_LENGTHS, LENGTHS = (5, 9), (3, 10, 1, 7, 12, 2, 4, 9)  # two groups of four
MAX_TOKENS = 12
AGGREGATION = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token"}
BETA = 0.04


@pytest.fixture(scope="module")
def trl():
    """TRL as on a machine without vLLM: importing that takes half a minute, and nothing here
    samples with it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_utils, "is_vllm_available", lambda *args, **kwargs: False)
        yield importlib.import_module("trl.trainer.grpo_trainer")


@pytest.fixture(scope="module")
def batch(model_folder):
    """Rollouts and, end to end, what the sampling policy and the reference said of their tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for i, length in enumerate(PROMPT_LENGTHS):
        ids = tuple(torch.randint(5, 300, (length,), generator=generator).tolist())
        prompts.append(
            EncodedPrompt(Prompt(str(i), (), (), "1"), ids, ids, torch.arange(length)[None])
        )
    rollouts = []
    for i, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(5, 300, (length,), generator=generator).tolist())
        rollouts.append(Rollout(prompts[i // 4], i, ids, (0.0,) * length, "", "stop", 0))
    scored = torch.cat(
        Policy(ModelConfig(path=model_folder("qwen2"), dtype="float32", device="cpu")).score(
            rollouts
        )
    )
    noise = torch.randn(2, len(scored), generator=generator)
    rewards = torch.tensor([1.0, 0, 0, 0.5, 1, 1, 0, 1])
    advantages = group_advantages(rewards, torch.ones(8, dtype=torch.bool), torch.arange(8) // 4)
    return rollouts, scored + 0.4 * noise[0], scored + 0.3 * noise[1], advantages


def trainer_of(
    trl, folder, tmp_path, reward=lambda completions, **_: [0.0] * len(completions), **settings
):
    from datasets import Dataset

    args = importlib.import_module("trl.trainer.grpo_config").GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, num_generations=4,
        max_completion_length=MAX_TOKENS, use_bias_correction_kl=False, **{"per_device_train_batch_size": 8, **settings},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_dict({"prompt": ["What is 2 + 3?", "Seven apples"]})
    trainer = trl.GRPOTrainer(
        model, reward, args, data, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return trainer


def padded(values, lengths, left=False):
    """[sum of lengths] -> [B, T] and its mask, with other numbers than zero in the padding."""
    parts = torch.as_tensor(values).split(list(lengths))
    rows, mask = (
        torch.full((len(parts), max(lengths)), 7, dtype=parts[0].dtype),
        torch.zeros(len(parts), max(lengths), dtype=torch.long),
    )
    for row, valid, part in zip(rows, mask, parts, strict=True):
        place = slice(len(row) - len(part), None) if left else slice(0, len(part))
        row[place], valid[place] = part, 1
    return rows, mask


def theirs(trainer, batch, cuts=(0, 8)):
    """TRL's loss and gradients, its micro-batches between the cuts."""
    rollouts, old, ref, advantages = batch
    prompt_ids, prompt_mask = padded(
        [t for r in rollouts for t in r.prompt.token_ids],
        [len(r.prompt.token_ids) for r in rollouts],
        left=True,
    )
    completion_ids, completion_mask = padded([t for r in rollouts for t in r.token_ids], LENGTHS)
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids, "completion_mask": completion_mask,
        "old_per_token_logps": padded(old, LENGTHS)[0], "ref_per_token_logps": padded(ref, LENGTHS)[0], "advantages": advantages,
    }  # fmt: skip
    total = 0.0
    for start, end in pairwise(cuts):
        part = {name: tensor[start:end] for name, tensor in inputs.items()} | {
            "num_items_in_batch": completion_mask.sum()
        }
        loss = trainer.compute_loss(trainer.model, part)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in trainer.model.named_parameters()}


def ours(
    folder,
    batch,
    aggregation,
    temperature,
    beta,
    gspo=False,
    cuts=(0, 8),
    cispo: float | None = None,
):
    """The same from this package."""
    rollouts, *columns, advantages = batch
    policy, total = Policy(ModelConfig(path=folder, dtype="float32", device="cpu")), 0.0
    parts = [column.split(list(LENGTHS)) for column in columns]
    for start, end in pairwise(cuts):
        packed = pack(rollouts[start:end])
        logprobs = policy.forward(packed, temperature).logprobs
        old, ref = (torch.cat(part[start:end]) for part in parts)
        weights = token_weights(packed.lengths, aggregation, sum(LENGTHS), len(LENGTHS), MAX_TOKENS)
        log_ratio = sequence_log_ratio(logprobs - old, packed.lengths) if gspo else logprobs - old
        given = advantages[start:end].repeat_interleave(packed.lengths)
        if cispo is None:
            loss, _ = policy_loss(log_ratio, given, weights, 0.2, 0.28)
        else:
            loss, _ = cispo_loss(logprobs, log_ratio, given, weights, cispo)
        loss = loss + beta * (weights * kl_estimate(logprobs, ref, "k3")).sum()
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in policy.model.named_parameters()}


def assert_equal(found, expected):
    """Losses to 1e-5; gradients to 1e-5 of each parameter's largest, or of a thousandth of the
    model's largest.
    """
    (loss, gradients), (their_loss, their_gradients) = found, expected
    assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-7)
    assert gradients.keys() == their_gradients.keys()
    floor = 1e-3 * max(g.abs().max() for g in their_gradients.values())
    for name, gradient in gradients.items():
        scale = max(their_gradients[name].abs().max(), floor)
        assert (gradient - their_gradients[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_grpo(trl, model_folder, tmp_path, batch, loss_type, beta, temperature):
    folder = model_folder("qwen2")
    settings = {
        "loss_type": loss_type,
        "beta": beta,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "temperature": temperature,
    }
    expected = theirs(trainer_of(trl, folder, tmp_path, **settings), batch)
    assert_equal(ours(folder, batch, AGGREGATION[loss_type], temperature, beta), expected)


@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_gradient_accumulation(trl, model_folder, tmp_path, batch, loss_type):
    """Two micro-batches of one update there (of equal size, as TRL has them), two of another cut
    here.
    """
    folder = model_folder("qwen2")
    settings = {
        "loss_type": loss_type,
        "beta": BETA,
        "epsilon_high": 0.28,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    expected = theirs(trainer_of(trl, folder, tmp_path, **settings), batch, cuts=(0, 4, 8))
    assert_equal(ours(folder, batch, AGGREGATION[loss_type], 1.0, BETA, cuts=(0, 3, 8)), expected)


def test_gspo(trl, model_folder, tmp_path, batch):
    folder = model_folder("qwen2")
    settings = {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": BETA,
        "epsilon_high": 0.28,
    }
    expected = theirs(trainer_of(trl, folder, tmp_path, **settings), batch)
    assert_equal(ours(folder, batch, "sequence", 1.0, BETA, gspo=True), expected)


@pytest.mark.parametrize("bound", [5.0, 1.2])
def test_cispo(trl, model_folder, tmp_path, batch, bound):
    """TRL's epsilon_high is the bound of the ratio itself."""
    folder = model_folder("qwen2")
    settings = {"loss_type": "cispo", "beta": BETA, "epsilon_high": bound}
    expected = theirs(trainer_of(trl, folder, tmp_path, **settings), batch)
    assert_equal(ours(folder, batch, "token", 1.0, BETA, cispo=bound - 1), expected)


def test_advantages(trl, model_folder, tmp_path):
    """From TRL's own rollouts: rewards less the group's mean, over std + 1e-4 (`group`) or not
    (`none`).
    """
    rewards = [1.0, 0, 0, 0.5, 1, 1, 1, 1]
    inputs = [{"prompt": p} for p in ("What is 2 + 3?", "Seven apples") for _ in range(4)]
    arguments = (torch.tensor(rewards), torch.ones(8, dtype=torch.bool), torch.arange(8) // 4)
    std = torch.tensor(rewards[:4]).std()
    for scale_rewards in ("group", "none"):
        trainer = trainer_of(
            trl,
            model_folder("qwen2"),
            tmp_path,
            lambda completions, **_: rewards,
            scale_rewards=scale_rewards,
        )
        found = group_advantages(*arguments, scale=scale_rewards == "group")
        expected = trainer._generate_and_score_completions(inputs)["advantages"]
        factor = std / (std + 1e-4) if scale_rewards == "group" else 1.0
        assert expected.tolist() == pytest.approx((found * factor).tolist(), abs=1e-6)
