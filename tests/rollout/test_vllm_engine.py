"""Sampling by vLLM on a tiny Qwen2.5-VL in float32: what is sampled, what is reported, and what the
process looks like afterwards.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlfr_vlm.config import Config, parse_config
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.rollout.weights import engine_model
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout, RolloutGroup
from tests.tiny_models import tiny_qwen2_5_vl

pytest.importorskip("vllm")

SAMPLING = SamplingConfig(group_size=3, temperature=0.7, max_new_tokens=12, seed_key=(0, 1))


def make_config(path: Path, **rollout) -> Config:
    return parse_config(
        {
            "output_dir": "unused",
            "model": {"path": str(path), "dtype": "float32", "device": "cpu"},
            "data": {"max_prompt_tokens": 96, "min_pixels": 28 * 28, "max_pixels": 112 * 112},
            "rollout": {"engine": "vllm", "max_new_tokens": 32, **rollout},
        }
    )


def process_state() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": {
            key: value for key, value in os.environ.items() if not key.startswith("VLLM_")
        },
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads with barriers crawl on a machine that others use as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(path) -> Policy:
    return Policy(make_config(path).model)


@pytest.fixture(scope="module")
def started(path, policy):
    before = process_state()
    engine = make_engine(make_config(path), policy)
    after = process_state()
    yield engine, before, after
    engine.close()


@pytest.fixture
def engine(started):
    return started[0]


@pytest.fixture(scope="module")
def prompts(path, policy) -> list[EncodedPrompt]:
    """Two of text, two with pictures of different sizes, one with both pictures."""
    renderer = Renderer(policy, make_config(path).data, "")
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8))
        for n, size in enumerate([(56, 112, 3), (60, 90, 3)])
    ]
    rows = [
        ("What is 3 + 4?", []),
        ("Answer with just the number: 12 - 7.", []),
        ("The sum?", pictures[:1]),
        ("What?", pictures[1:]),
        ("Both?", pictures),
    ]
    return [
        renderer.encode(
            Prompt(
                f"row-{n}",
                (
                    {
                        "role": "user",
                        "content": [*[{"type": "image"}] * len(p), {"type": "text", "text": text}],
                    },
                ),
                tuple(p),
                "",
            )
        )
        for n, (text, p) in enumerate(rows)
    ]


def tokens(groups: list[RolloutGroup]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {
        (r.prompt.prompt.id, r.sample_index): r.token_ids
        for group in groups
        for r in group.rollouts
    }


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_the_policys_at_the_sampling_temperature(engine, policy, prompts, temperature):
    groups = engine.sample(prompts, replace(SAMPLING, temperature=temperature))
    rollouts = [r for group in groups for r in group.rollouts]
    scored = policy.score(rollouts, temperature or 1.0)
    for rollout, expected in zip(rollouts, scored, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)
    assert [g.prompt.prompt.id for g in groups] == [p.prompt.id for p in prompts]
    assert [r.sample_index for r in groups[0].rollouts] == [0, 1, 2]
    assert all(
        r.policy_version == policy.version and r.text == policy.decode(r.token_ids)
        for r in rollouts
    )
    if temperature:
        assert len({r.token_ids for r in rollouts}) == len(
            rollouts
        )  # the model's own generation_config is all but greedy
    else:
        assert all(len({r.token_ids for r in group.rollouts}) == 1 for group in groups)


def test_tokens_depend_on_the_request_alone(engine, prompts):
    together = tokens(engine.sample(prompts, SAMPLING))
    assert tokens(engine.sample(prompts[::-1], SAMPLING)) == together
    assert (
        tokens([group for prompt in prompts for group in engine.sample([prompt], SAMPLING)])
        == together
    )
    fewer = tokens(engine.sample(prompts, replace(SAMPLING, group_size=2)))
    assert fewer == {key: value for key, value in together.items() if key[1] < 2}
    other = tokens(engine.sample(prompts, replace(SAMPLING, seed_key=(0, 2))))
    assert all(other[key] != together[key] for key in together)


def test_a_batch_beyond_one_steps_tokens_changes_nothing(engine, prompts):
    many = replace(SAMPLING, group_size=50, max_new_tokens=3)
    assert (
        sum(len(p.token_ids) for p in prompts) * 50
        > engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    )
    alone = [tokens(engine.sample([prompt], many)) for prompt in prompts]
    assert tokens(engine.sample(prompts, many)) == {
        key: value for part in alone for key, value in part.items()
    }


def test_first_tokens_follow_the_policys_distribution(engine, policy, prompts):
    (group,) = engine.sample(prompts[:1], replace(SAMPLING, group_size=600, max_new_tokens=1))
    vocabulary = range(policy.text_config.vocab_size)
    one_each = [
        Rollout(prompts[0], n, (n,), (0.0,), "", "length", 0)
        for n in vocabulary
        if n not in policy.banned_token_ids
    ]
    logprobs = torch.cat(policy.score(one_each, 0.7))
    probs = logprobs.exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    mean = (probs * logprobs).sum()
    std = ((probs * logprobs.square()).sum() - mean**2).sqrt()
    sampled = torch.tensor([r.logprobs[0] for r in group.rollouts])
    assert abs(float(sampled.mean() - mean)) < 4 * float(std) / 600**0.5
    for likely in probs.topk(5).indices.tolist():
        frequency = sum(r.token_ids == one_each[likely].token_ids for r in group.rollouts) / 600
        assert abs(frequency - float(probs[likely])) < 4 * float(
            (probs[likely] * (1 - probs[likely]) / 600).sqrt()
        )


def test_banned_tokens_have_no_probability(engine, policy, prompts):
    hidden = torch.randn(5, policy.hidden_size)
    logits = engine_model(engine.llm).compute_logits(hidden)
    banned = list(policy.banned_token_ids)
    assert len(banned) == 4 and bool((logits[:, banned] == float("-inf")).all())
    assert int(logits.isinf().sum()) == 5 * 4
    hot = replace(SAMPLING, temperature=2.0, group_size=16, max_new_tokens=32, ignore_eos=True)
    sampled = [token for ids in tokens(engine.sample(prompts, hot)).values() for token in ids]
    assert len(sampled) == 5 * 16 * 32 and not set(sampled) & set(
        banned
    )  # unbanned, about 25 would be


def test_a_response_ends_with_its_eos(engine, policy, prompts, monkeypatch):
    eos = set(range(0, 380, 4))
    monkeypatch.setattr(policy, "eos_token_ids", tuple(sorted(eos)))
    rollouts = [
        r
        for group in engine.sample(prompts, replace(SAMPLING, group_size=12, max_new_tokens=6))
        for r in group.rollouts
    ]
    for rollout in rollouts:
        assert not eos & set(rollout.token_ids[:-1])
        assert len(rollout.logprobs) == len(rollout.token_ids)
        if rollout.token_ids[-1] in eos:
            assert rollout.finish_reason == "stop"  # at the last token allowed as well
        else:
            assert (rollout.finish_reason, len(rollout.token_ids)) == ("length", 6)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert any(r.finish_reason == "stop" and len(r.token_ids) == 6 for r in rollouts)
    through = engine.sample(prompts, replace(SAMPLING, max_new_tokens=6, ignore_eos=True))
    assert all(
        len(r.token_ids) == 6 and r.finish_reason == "length"
        for group in through
        for r in group.rollouts
    )
    assert any(eos & set(r.token_ids[:-1]) for group in through for r in group.rollouts)


def test_stop_strings_keep_the_tokens_that_complete_them(engine, policy, prompts):
    rollouts = [
        r
        for g in engine.sample(
            prompts, replace(SAMPLING, group_size=12, max_new_tokens=32, stop=("a", "e"))
        )
        for r in g.rollouts
    ]
    stopped = [r for r in rollouts if "a" in r.text or "e" in r.text]
    assert len(stopped) > 10
    for rollout in stopped:
        before = policy.decode(rollout.token_ids[:-1])
        assert "a" not in before and "e" not in before
        assert rollout.finish_reason == "stop" and len(rollout.logprobs) == len(rollout.token_ids)


def test_a_prompt_that_vllm_reads_otherwise_stops_the_run(engine, prompts):
    picture = prompts[2]
    wider = replace(picture, images=(picture.images[0].resize((140, 56)),))
    with pytest.raises(
        StoppedError,
        match=rf"`row-2`: the trainer reads it as {len(picture.token_ids)} tokens, vLLM as "
        rf"{len(picture.token_ids) + 2}",
    ):
        engine.sample([prompts[0], wider], SAMPLING)
    other = replace(prompts[0], token_ids=(*prompts[0].token_ids[:-1], 7))
    with pytest.raises(StoppedError, match=r"`row-0`.* other ones"):
        engine.sample([other], SAMPLING)
    assert engine.sample(prompts, SAMPLING)  # the engine survives


def test_what_vllm_would_change_silently_is_refused(engine, prompts):
    with pytest.raises(
        UserError, match=r"`row-0`: its \d+ tokens and 120 new ones exceed vLLM's limit of 128"
    ):
        engine.sample(prompts, replace(SAMPLING, max_new_tokens=120))
    for temperature in (0.001, 3.0):
        with pytest.raises(UserError, match=f"temperature {temperature}"):
            engine.sample(prompts, replace(SAMPLING, temperature=temperature))


def test_nothing_to_sample(engine):
    assert engine.sample([], SAMPLING) == []


def test_the_process_is_left_as_it_was(started, prompts):
    engine, before, after = started
    assert after == before
    state = process_state()
    engine.sample(prompts, SAMPLING)
    assert process_state() == state


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux' socket tables")
def test_nothing_listens_beyond_loopback(engine):
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    }
    listening = [
        fields[1].rpartition(":")[0]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:])
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own
    ]
    assert set(listening) <= {"0100007F", "00000000000000000000000001000000"}


def test_engine_choice(path, policy, monkeypatch):
    assert isinstance(make_engine(make_config(path, engine="hf"), policy), HFEngine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(make_engine(make_config(path, engine="auto"), policy), HFEngine)
    with pytest.raises(UserError, match="vLLM is not installed"):
        make_engine(make_config(path), policy)


def test_limits_that_do_not_fit_name_the_field(path, policy):
    with pytest.raises(
        UserError, match=r"rollout\.vllm\.max_model_len=4096: the model reads at most 1024"
    ):
        make_engine(make_config(path, vllm={"max_model_len": 4096}), policy)


def test_tensor_parallelism_on_cpu_is_refused(path, policy):
    tree = make_config(path).model_dump() | {"launcher": "ray", "ray": {"engines": 1}}
    tree["rollout"] |= {"vllm": {"tensor_parallel": 2}}
    with pytest.raises(
        UserError,
        match=r"rollout\.vllm\.tensor_parallel=2: vLLM on CPU runs in one process per engine",
    ):
        make_engine(parse_config(tree), policy)


def test_nothing_is_given_back_on_cpu(engine, prompts):
    before = tokens(engine.sample(prompts, SAMPLING))
    engine.sleep()
    assert tokens(engine.sample(prompts, SAMPLING)) == before
