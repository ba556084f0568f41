"""The policy's log-probs and latents against plain transformers, for every family."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlfr_vlm.config import DataConfig, ModelConfig
from rlfr_vlm.data.prompts import parse_row
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.latents import LatentRequest
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import Rollout

TEXT = ["qwen2", "llama", "qwen3", "mistral"]
VISION = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 200 * 28 * 28}


def picture(seed, size=(84, 56)):
    pixels = torch.randint(
        0,
        256,
        (size[1], size[0], 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    return Image.fromarray(pixels.numpy())


def rollouts_of(policy, num_images=(0,), group_size=3, seed=0):
    renderer = Renderer(policy, DataConfig(**PIXELS), "rows.jsonl")
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for number, count in enumerate(num_images):
        images = [picture(10 * number + i, (84 + 28 * i, 56)) for i in range(count)]
        row = {
            "id": str(number),
            "prompt": "<image>" * count + f"What is {number} + 4?" * (number + 1),
            "images": images,
            "answer": "4",
        }
        prompt = renderer.encode(parse_row(row, f"rows:{number}", DataConfig()))
        for sample in range(group_size):
            ids = tuple(
                torch.randint(5, 90, (3 + 4 * sample + number,), generator=generator).tolist()
            )
            rollouts.append(Rollout(prompt, sample, ids, (0.0,) * len(ids), "", "stop", 0))
    return rollouts


def reference_logprobs(model, rollouts, padding):
    """Log-probs by transformers alone, each sequence in full, left-padded by `padding` tokens."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([[0] * padding + [*rollout.prompt.token_ids, *rollout.token_ids]])
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        extra = dict(rollout.prompt.vision)
        if extra:
            extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, **extra).logits[0].float()
        for token in [
            getattr(model.config, f"{n}_token_id", None)
            for n in ("image", "video", "vision_start", "vision_end")
        ]:
            if token is not None:
                logits[:, token] = float("-inf")
        start = padding + len(rollout.prompt.token_ids)
        found.append(logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0])
    return found


@pytest.mark.parametrize("family", TEXT + VISION)
def test_packed_equals_padded_equals_one_by_one(model_folder, family):
    folder = model_folder(family)
    policy = Policy(ModelConfig(path=folder, dtype="float32"))
    rollouts = rollouts_of(policy, (0, 1, 3) if family in VISION else (0, 0, 0))
    packed = policy.score(rollouts)
    split = policy.score(rollouts, token_budget=60)
    alone = [policy.score([r])[0] for r in rollouts]
    loader = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    for padding in (0, 5):
        for ours, ours_split, ours_alone, theirs in zip(
            packed, split, alone, reference_logprobs(model, rollouts, padding), strict=True
        ):
            assert torch.allclose(ours, theirs, atol=1e-4)
            assert torch.allclose(ours, ours_split, atol=1e-4)
            assert torch.allclose(ours, ours_alone, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_neighbours_in_the_batch_change_nothing(model_folder, family):
    policy = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
    rollouts = rollouts_of(policy, (0, 1) if family in VISION else (0, 0))
    reversed_order = policy.score(rollouts[::-1])[::-1]
    for a, b in zip(policy.score(rollouts), reversed_order, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def gradients(policy, rollouts, request):
    batch = pack(rollouts)
    output = policy.forward(batch, request=request)
    policy.model.zero_grad()
    (output.logprobs * torch.linspace(-1, 1, len(output.logprobs))).sum().backward()
    return output, {
        n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "nonreentrant"])
def test_a_frozen_vision_tower_stays_out_of_the_backward(model_folder, checkpointing):
    policy = Policy(
        ModelConfig(
            path=model_folder("qwen2_5_vl"), dtype="float32", gradient_checkpointing=checkpointing
        )
    )
    seen = []
    tower = policy.model.get_submodule(policy.family.vision)
    tower.register_forward_hook(lambda _m, _a, output: seen.append(output))
    policy.forward(pack(rollouts_of(policy, (0, 1, 3)), policy.device)).logprobs.sum().backward()
    found = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert not found.requires_grad
    assert all(p.grad is None for p in tower.parameters())
    assert policy.model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "nonreentrant"])
def test_gradient_checkpointing_changes_neither_gradients_nor_latents(
    model_folder, family, checkpointing
):
    request = LatentRequest((1, 2), (("token_pre", 1),))
    plain = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
    other = Policy(
        ModelConfig(
            path=model_folder(family), dtype="float32", gradient_checkpointing=checkpointing
        )
    )
    images = (1, 0) if family in VISION else (0, 0)
    expected, expected_gradients = gradients(plain, rollouts_of(plain, images), request)
    output, found = gradients(other, rollouts_of(other, images), request)
    assert output.latents.states.shape == expected.latents.states.shape
    assert torch.allclose(output.latents.states, expected.latents.states, atol=1e-5)
    assert found.keys() == expected_gradients.keys()
    assert all(torch.allclose(found[n], expected_gradients[n], atol=1e-5) for n in found)
    assert not any("visual" in n for n in found)


@pytest.mark.parametrize("family", TEXT + VISION)
def test_latents_are_the_hooked_layers_outputs(model_folder, family):
    policy = Policy(ModelConfig(path=model_folder(family), dtype="float32"))
    rollout = rollouts_of(policy, (1,) if family in VISION else (0,), group_size=1)[0]
    batch = pack([rollout])
    latents = policy.forward(batch, request=LatentRequest((0, 1), (("token_post", 1),))).latents
    loader = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    model = loader.from_pretrained(policy.path, dtype=torch.float32).eval()
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    extra = dict(rollout.prompt.vision)
    if extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    states = []
    layers = model.get_submodule(policy.family.language).layers
    handles = [
        layer.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids, **extra)
    [handle.remove() for handle in handles]
    start = len(rollout.prompt.token_ids)
    for k in range(2):
        assert torch.allclose(latents.states[k, latents.target], states[k][0, start:], atol=1e-4)
        assert torch.allclose(
            latents.states[k, latents.context[0]], states[k][0, start - 1 : -1], atol=1e-4
        )
    assert not latents.states.requires_grad


def test_micro_batches_keep_groups_together_and_within_the_budget(model_folder):
    policy = Policy(ModelConfig(path=model_folder("qwen2"), dtype="float32"))
    rollouts = rollouts_of(policy, (0, 0, 0))
    parts = micro_batches(rollouts, 80)
    assert [i for part in parts for i in part] == list(range(len(rollouts)))
    for part in parts:
        assert len(pack([rollouts[i] for i in part]).token_ids) <= 80
    assert len(micro_batches(rollouts, 1)) == len(rollouts)


def test_entropy_of_the_response_distribution(model_folder):
    policy = Policy(ModelConfig(path=model_folder("llama"), dtype="float32"))
    rollout = rollouts_of(policy, group_size=1)[0]
    batch = pack([rollout])
    with torch.no_grad():
        entropy = policy.forward(batch, 0.7, with_entropy=True).entropy
        states, _ = policy.states(batch)
        logits = states[batch.predict_rows] @ policy.model.get_output_embeddings().weight.t() / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropy, expected, atol=1e-4)


def test_unknown_family_and_missing_folder_are_named(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    with pytest.raises(UserError, match=r"gpt2.*known: .*qwen2_5_vl"):
        Policy(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.path"):
        Policy(ModelConfig(path=str(tmp_path / "nothing")))


def test_the_fingerprint_tells_weights_apart_and_ignores_dtype(model_folder):
    one = Policy(ModelConfig(path=model_folder("llama"), dtype="float32")).identity
    same = Policy(ModelConfig(path=model_folder("llama"), dtype="bfloat16")).identity
    other = Policy(ModelConfig(path=model_folder("llama", seed=1), dtype="float32")).identity
    assert one == same
    assert one["fingerprint"] != other["fingerprint"]


def test_saved_folder_loads_in_plain_transformers(model_folder, tmp_path):
    policy = Policy(ModelConfig(path=model_folder("qwen2_5_vl"), dtype="float32"))
    policy.save(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    ours = dict(policy.model.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_a_policy_without_weights_reads_writes_and_ends_as_the_whole_one(model_folder, family):
    settings = ModelConfig(path=model_folder(family), dtype="float32")
    whole, empty = Policy(settings), Policy(settings, weights=False)
    assert empty.weight_specs() == whole.weight_specs()
    assert len(whole.eos_token_ids) == 2
    for name in (
        "eos_token_ids",
        "banned_token_ids",
        "max_length",
        "image_token_id",
        "hidden_size",
        "dtype",
        "device",
    ):
        assert getattr(empty, name) == getattr(whole, name)
    images = (0, 1) if family in VISION else (0, 0)
    for one, other in zip(rollouts_of(empty, images), rollouts_of(whole, images), strict=True):
        assert one.prompt.token_ids == other.prompt.token_ids
        assert torch.equal(one.prompt.position_ids, other.prompt.position_ids)
    assert all(parameter.is_meta for parameter in empty.model.parameters())
