"""Checkpoints of several ranks: resumed by as many and by one, in full; exported for everybody."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlfr_vlm.cli import main
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.learner.learner import make_learner
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.rollout.probe import probe_prompts
from rlfr_vlm.storage.export import export_checkpoint, find_checkpoint
from rlfr_vlm.storage.shards import ShardReader
from tests.runs import cli, make_config, make_data, python, torchrun

STEMS = ("policy", "optimizer", "flow_optimizer")


def contents(checkpoint):
    """Every tensor of policy and optimisers, whoever wrote it."""
    found = {}
    for stem in STEMS:
        file = ShardReader(checkpoint, stem)
        found |= {f"{stem}/{name}": file.read(name) for name in file.names}
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(config, out, ranks, *overrides, fault=None, fails=False):
    arguments = ("rlfr_vlm.cli", "train", "--config", config, f"output_dir={out}", *overrides)
    environment = {"RLFR_FAULT": fault} if fault else {}
    try:
        python(*arguments, **environment) if ranks == 1 else torchrun(
            ranks, *arguments, **environment
        )
    except AssertionError:
        if not fails:
            raise
        return
    assert not fails


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Four steps on two ranks at stage 3, undisturbed and killed in step 4, after the checkpoint of
    step 2.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    make_data(folder)
    config = make_config(folder, model_folder("qwen2_5_vl"))
    train(config, folder / "whole", 2, "deepspeed.zero_stage=3")
    train(config, folder / "killed", 2, "deepspeed.zero_stage=3", fault="reward:4:kill", fails=True)
    assert [p.name for p in (folder / "killed/checkpoints").glob("global_step_*")] == [
        "global_step_2"
    ]
    return folder, config


def killed(runs, name):
    """A copy of the killed run, to go on with."""
    folder, _ = runs
    return shutil.copytree(folder / "killed", folder / name)


def test_two_ranks_resume_to_the_bit(runs):
    folder, config = runs
    out = killed(runs, "by_two")
    train(config, out, 2, "deepspeed.zero_stage=3")
    assert equal(
        contents(out / "checkpoints/global_step_4"),
        contents(folder / "whole/checkpoints/global_step_4"),
    )


def test_one_process_resumes_what_two_ranks_wrote(runs):
    """What it loads it would write again to the bit; and it ends where they end, but for rounding."""
    folder, config = runs
    cfg = load_config(config)
    learner = make_learner(cfg, Policy(cfg.model))
    written = contents(folder / "killed/checkpoints/global_step_2")
    state = json.loads((folder / "killed/checkpoints/global_step_2/state.json").read_text())
    with torch.no_grad():
        for name, parameter in learner.policy.trained().items():
            parameter.copy_(written[f"policy/{name}"])
    for stem, optimizer in (
        ("optimizer", learner.optimizer),
        ("flow_optimizer", learner.flow_optimizer),
    ):
        optimizer.load_entries(
            ShardReader(folder / "killed/checkpoints/global_step_2", stem).find,
            state["updates"][stem],
        )
        again = dict(optimizer.entries())
        assert equal(
            again,
            {
                name.partition("/")[2]: t
                for name, t in written.items()
                if name.startswith(f"{stem}/")
            },
        )
    out = killed(runs, "by_one")
    train(config, out, 1)
    ours, theirs = (
        contents(out / "checkpoints/global_step_4"),
        contents(folder / "whole/checkpoints/global_step_4"),
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("policy/"):
            assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-4), name
    resumed = cli("train", "--config", str(config), f"output_dir={out}")
    assert "resumed from global_step_4" in resumed.stderr


@pytest.mark.slow
def test_two_ranks_resume_what_one_process_and_another_stage_wrote(runs):
    folder, config = runs
    train(config, folder / "single", 1, fault="reward:4:kill", fails=True)
    train(config, folder / "single", 2, "deepspeed.zero_stage=2")
    state = json.loads((folder / "single/checkpoints/global_step_4/state.json").read_text())
    assert (state["ranks"], state["updates"]) == (2, {"optimizer": 4, "flow_optimizer": 4})
    ours, theirs = (
        contents(folder / "single/checkpoints/global_step_4"),
        contents(folder / "whole/checkpoints/global_step_4"),
    )
    assert ours.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_with_master_weights_resumes_to_the_bit(runs, model_folder, stage):
    folder, config = runs
    settings = ["model.dtype=bfloat16", f"deepspeed.zero_stage={stage}"]
    train(config, folder / f"bf16_{stage}", 2, *settings)
    train(config, folder / f"bf16_{stage}_killed", 2, *settings, fault="reward:4:kill", fails=True)
    train(config, folder / f"bf16_{stage}_killed", 2, *settings)
    ours, theirs = (
        contents(folder / name / "checkpoints/global_step_4")
        for name in (f"bf16_{stage}", f"bf16_{stage}_killed")
    )
    assert equal(ours, theirs)
    assert any(name.startswith("optimizer/master/") for name in ours)


def greedy(policy, prompts, cfg):
    sampling = SamplingConfig(
        group_size=1, temperature=0.0, max_new_tokens=16, seed_key=("greedy",), ignore_eos=True
    )
    return [
        g.rollouts[0].token_ids for g in HFEngine(cfg.rollout, policy).sample(prompts, sampling)
    ]


def test_an_export_is_the_trained_model(runs, tmp_path):
    folder, _ = runs
    checkpoint = export_checkpoint(folder / "whole", tmp_path / "model")
    assert checkpoint == folder / "whole/checkpoints/global_step_4"
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    names = dict(plain.named_parameters())
    for name, tensor in contents(checkpoint).items():
        if name.startswith("policy/"):
            assert torch.equal(names[name.removeprefix("policy/")], tensor), name
    by_run = AutoModelForImageTextToText.from_pretrained(
        folder / "whole/hf/global_step_4", dtype=torch.float32
    )
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), by_run.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(folder / "whole", tmp_path / "model")


@pytest.mark.slow
def test_an_export_gives_the_same_greedy_tokens_everywhere(runs, tmp_path):
    """The trained policy, transformers' generate and vLLM."""
    folder, config = runs
    main_code = 0
    try:
        main(["export", str(folder / "whole"), "--out", str(tmp_path / "model")])
    except SystemExit as done:
        main_code = done.code
    assert main_code == 0
    cfg = load_config(config, (f"model.path={tmp_path / 'model'}", "rollout.engine=vllm"))
    policy = Policy(cfg.model)
    prompts = probe_prompts(cfg, policy)
    expected = greedy(policy, prompts, cfg)
    from rlfr_vlm.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(cfg, policy)
    sampling = SamplingConfig(
        group_size=1, temperature=0.0, max_new_tokens=16, seed_key=("greedy",), ignore_eos=True
    )
    assert [g.rollouts[0].token_ids for g in engine.sample(prompts, sampling)] == expected
    engine.close()
    plain = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    for prompt, tokens in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt.token_ids])
        extra = (
            {"mm_token_type_ids": torch.eq(ids, policy.image_token_id).int()}
            if prompt.vision
            else {}
        )
        banned = [[token] for token in policy.banned_token_ids]
        output = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False, num_beams=1,
            repetition_penalty=1.0, eos_token_id=None, bad_words_ids=banned, **prompt.vision, **extra,
        )  # fmt: skip
        assert tuple(output[0, len(prompt.token_ids) :].tolist()) == tokens


def test_what_cannot_be_exported_is_named(runs, tmp_path):
    folder, _ = runs
    with pytest.raises(UserError, match="neither a checkpoint nor a run that holds one"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"best.json names no checkpoint"):
        find_checkpoint(folder / "whole", best=True)
    with pytest.raises(UserError, match="--model"):
        export_checkpoint(folder / "whole", tmp_path / "out", model=str(tmp_path / "nowhere"))
    broken = shutil.copytree(folder / "whole/checkpoints/global_step_4", tmp_path / "global_step_4")
    weights = next(broken.glob("rank_0001/policy-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{weights.name} has sha256"):
        export_checkpoint(broken, tmp_path / "out")
