"""The informed profile: fits that finish and resume, a contrast that learns from a window, a charge
at the guilty token.
"""

import json
from dataclasses import replace

import pytest
import torch

from rlfr_vlm import commands
from rlfr_vlm.algorithm.credit import assign_credit, needs_scoring
from rlfr_vlm.batch import Scores
from rlfr_vlm.config import load_config, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.progress import Work
from rlfr_vlm.training.scoring import score_samples
from rlfr_vlm.training.update import update
from tests.runs import make_config, make_data, make_text_data
from tests.training.test_update import config, same, setup, weights

TOKEN = {"coef": 0.3, "normalise": "group_z", "threshold": 0, "top_k": 0, "credit": "token"}
SMALL = {"batch_tokens": 16, "steps": 40, "lr": 1e-3, "probe_prompts": 2, "rollout_prompts": 6}


def informed(folder, model, **flow):
    """A run's config with a fit of a few small steps."""
    make_data(folder) if "vl" in model else make_text_data(folder)
    tree = {"profile": "informed", "network": {"depth": 1}, "online": {}, "fit": SMALL, **flow}
    return make_config(folder, model, flow=None), tree


def fitted(folder, model, name="run", **flow):
    path, tree = informed(folder, model, **flow)
    cfg = load_config(path, (f"output_dir={folder / name}",))
    cfg = parse_config({**cfg.model_dump(mode="json"), "flow": tree})
    return cfg, commands.flow(cfg)


def test_the_informed_profile_fits_probes_and_trains(model_folder, tmp_path):
    cfg, field = fitted(tmp_path, model_folder("qwen2_5_vl"))
    found = json.loads((field / "flow_yardstick.json").read_text())
    assert {row["at"] for row in found["deviation"]} == {"fit", "reward"} and found["separation"][
        "responses"
    ] == 8
    assert {row["layer"] for row in found["deviation"]} >= {-1}
    assert not (field / ".fit").exists()
    commands.train(
        cfg.model_copy(update={"flow": cfg.flow.model_copy(update={"checkpoint": str(field)})})
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (
        len(lines) == 4 and "flow/loss" not in lines[0]
    )  # frozen: nothing is learnt, so there is no loss, and not one of 0
    assert {"flow/deviation_mean", "flow/charge_place", "flow/charge_by_token"} <= lines[0].keys()


def test_a_stopped_fit_goes_on_to_the_same_field(model_folder, tmp_path, monkeypatch):
    _, whole = fitted(tmp_path, model_folder("qwen2"), "whole")
    keep, kept = Work.keep, []

    def stop_at_the_fifth(self, *arguments, **facts):
        keep(self, *arguments, **facts)
        kept.append(arguments[0])
        if len(kept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "keep", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, model_folder("qwen2"), "stopped")
    _, resumed = fitted(tmp_path, model_folder("qwen2"), "stopped")
    assert kept[4:6] == [10, 12]  # it did not begin again
    for name in ("flow.safetensors", "flow_fit.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "flow", [{"contrast": "own"}, {"context": "token_pre+token_post", "prompt_context": False}]
)
def test_other_fields_fit_too(model_folder, tmp_path, flow):
    cfg, field = fitted(tmp_path, model_folder("qwen2"), **flow)
    lines = [json.loads(line) for line in (field / "flow_fit.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[1]["eval_loss"]
    assert ("contrast_loss" in lines[0]) is (cfg.flow.contrast != "none")


def test_responses_that_are_never_right_are_told(model_folder, tmp_path):
    with pytest.raises(
        UserError, match=r"flow.fit.source: nothing to .*too few of the sampled responses are right"
    ):
        fitted(
            tmp_path, model_folder("qwen2"), fit={**SMALL, "source": "rollouts"}, contrast="none"
        )


def test_too_few_rows_to_sample_from_are_told(model_folder, tmp_path):
    with pytest.raises(
        UserError,
        match=r"8 rows are too few for flow.fit.rollout_prompts=6 and flow.fit.probe_prompts=4",
    ):
        fitted(tmp_path, model_folder("qwen2"), fit={**SMALL, "probe_prompts": 4}, contrast="own")


def test_only_the_guilty_token_is_charged(model_folder):
    """An otherwise right response: its wrong token strays, and nothing before it pays."""
    cfg = config(model_folder("qwen2"), flow={"reward": {**TOKEN, "normalise": "group"}})
    learner, samples = setup(cfg)
    lengths = torch.tensor([s.length for s in samples])
    deviations, valid = (
        torch.ones(int(lengths.sum())),
        torch.ones(int(lengths.sum()), dtype=torch.bool),
    )
    guilty = int(lengths[0]) + 2  # the third token of the first group's second response
    deviations[guilty] = 9.0
    scores = Scores(
        torch.zeros_like(deviations), torch.zeros_like(deviations), deviations, None, valid
    )
    credit = assign_credit(cfg, samples, scores)
    own = (
        credit.advantages
        - assign_credit(
            config(model_folder("qwen2")), samples, Scores(scores.logprobs, scores.entropy)
        ).advantages
    )
    assert own.argmin() == guilty and own[guilty] == pytest.approx(-0.3, abs=0.02)
    others = torch.ones_like(valid)
    others[guilty] = False
    group = sum(s.length for s in samples if s.position == 0)
    assert (
        bool((own[others] >= 0).all())
        and own[:group].sum().abs() < 1e-4
        and not bool(own[group:].any())
    )
    to_go = assign_credit(
        config(
            model_folder("qwen2"),
            flow={"reward": {**TOKEN, "normalise": "group", "credit": "to_go"}},
        ),
        samples,
        scores,
    )
    assert bool((to_go.token_rewards[:group].nonzero().flatten() == guilty).all())
    before = assign_credit(
        config(
            model_folder("qwen2"), flow={"reward": {**TOKEN, "normalise": "group", "at": "context"}}
        ),
        samples,
        scores,
    ).token_rewards
    assert before.argmin() == guilty + 1  # with token_pre the context after the target is to blame
    assert learner.field is not None


def test_split_groups_are_scored_first_and_give_the_same(model_folder):
    flow = {"reward": TOKEN}
    one, samples = setup(config(model_folder("qwen2"), flow=flow))
    whole, small = (
        config(model_folder("qwen2"), flow=flow, train={"tokens_per_microbatch": n})
        for n in (16384, 60)
    )
    assert not needs_scoring(whole, samples) and needs_scoring(small, samples)
    update(whole, one, samples)
    other, samples = setup(small)
    update(small, other, score_samples(small, other, samples))
    for a, b in zip(
        weights(one.policy.model).values(), weights(other.policy.model).values(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_centring_by_type_takes_the_whole_step_however_it_falls_into_micro_batches(model_folder):
    flow = {"reward": {**TOKEN, "centre": "type"}}
    found = []
    for tokens in (16384, 60):
        cfg = config(model_folder("qwen2"), flow=flow, train={"tokens_per_microbatch": tokens})
        learner, samples = setup(cfg)
        assert needs_scoring(cfg, samples)
        scored = score_samples(cfg, learner, samples)
        charged = torch.cat([s.credit.token_rewards for s in scored])
        ids = torch.tensor([t for s in scored for t in s.rollout.token_ids])
        for token in ids.unique():
            assert charged[ids == token].sum().abs() < 1e-4
        assert charged.abs().max() > 0.01
        figures, _ = update(cfg, learner, scored)
        found.append((charged, figures["actor/grad_norm"]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5) and found[0][1] == pytest.approx(
        found[1][1], rel=1e-3
    )


def test_coefficient_zero_is_plain_grpo(model_folder):
    plain, samples = setup(config(model_folder("qwen2")))
    flow, _ = setup(cfg := config(model_folder("qwen2"), flow={"reward": {**TOKEN, "coef": 0.0}}))
    update(config(model_folder("qwen2")), plain, samples)
    update(cfg, flow, samples)
    assert same(weights(plain.policy.model), weights(flow.policy.model))


def test_a_contrast_learns_from_the_window_and_the_field_stays(model_folder):
    online = {"window": 2, "updates": 3, "batch_tokens": 8, "networks": "contrast", "lr": 1e-3}
    cfg = config(
        model_folder("qwen2"),
        flow={"contrast": "own", "fit": {"batch_tokens": 8}, "online": online, "reward": TOKEN},
    )
    learner, samples = setup(cfg)
    field, contrast = weights(learner.field.network), weights(learner.field.contrast)
    for step in range(3):
        figures, _ = update(cfg, learner, [replace(s, seed=s.seed + step) for s in samples])
        assert figures["flow/contrast_loss"] > 0 and "flow/loss" not in figures
    assert same(field, weights(learner.field.network)) and not same(
        contrast, weights(learner.field.contrast)
    )
    assert {kept.key[0] for kept in learner.window.kept} == {1, 2}  # the last two updates
    assert learner.contrast_optimizer.steps == 9


def test_a_run_with_a_window_resumes_to_the_same_weights(model_folder, tmp_path):
    flow = {
        "contrast": "own", "fit": {"batch_tokens": 8}, "network": {"depth": 1}, "reward": TOKEN,
        "online": {"window": 2, "updates": 2, "batch_tokens": 8, "lr": 1e-3},
    }  # fmt: skip
    make_text_data(tmp_path)
    path = make_config(tmp_path, model_folder("qwen2"), flow=flow)
    cfg = load_config(path)
    cfg = parse_config({**cfg.model_dump(mode="json"), "flow": flow})
    commands.train(cfg.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    stopped = cfg.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    commands.train(stopped)
    import shutil

    shutil.rmtree(tmp_path / "stopped/checkpoints/global_step_4")
    (tmp_path / "stopped/checkpoints/latest").write_text("global_step_2")
    commands.train(stopped)
    for name in (
        "rank_0000/policy-0000.safetensors",
        "rank_0000/window-0000.safetensors",
        "flow/flow.safetensors",
    ):
        one, other = (
            tmp_path / run / "checkpoints/global_step_4" / name for run in ("whole", "stopped")
        )
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"flow": {"standardise": True}}, "standardise needs fit.batch_tokens"),
        (
            {"flow": {"context": "token_post", "reward": {"at": "context"}}},
            "needs context token_pre alone",
        ),
        ({"flow": {"online": {"networks": "contrast"}}}, "needs flow.contrast"),
        (
            {"flow": {"reward": {"credit": "token"}}, "algorithm": {"method": "ppo"}},
            "credit=token is centred in the group",
        ),
        ({"flow": {"reward": {"centre": "type"}}}, "centre=type is read with credit=token only"),
        (
            {"shaping": {"likelihood": {"normalise": "token_type"}}},
            "needs the statistics of a flow field",
        ),
        ({"flow": {"online": {"window": 2, "soft_weight": 0.5}}}, "window takes responses whole"),
        ({"flow": {"reward": {"normalise": "group", "threshold": 1.0}}}, "keeps nothing"),
    ],
)
def test_settings_that_do_not_go_together_are_told(sections, message):
    with pytest.raises(UserError, match=message):
        parse_config({"output_dir": "x", "model": {"path": "m"}, **sections})


def test_a_profile_fills_in_only_what_is_silent():
    flow = parse_config(
        {
            "output_dir": "x",
            "model": {"path": "m"},
            "flow": {"profile": "informed", "reward": {"coef": 0.1}},
        }
    ).flow
    assert (flow.reward.coef, flow.reward.normalise, flow.standardise) == (0.1, "group_z", True)
    assert (
        parse_config({"output_dir": "x", "model": {"path": "m"}, "flow": {}}).flow.reward.normalise
        == "minmax"
    )
