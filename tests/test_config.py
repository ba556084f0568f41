"""The config tree: what it accepts, and how it refuses."""

import pytest

from rlfr_vlm.config import config_hash, load_config, parse_config, to_yaml
from rlfr_vlm.config.methods import METHODS
from rlfr_vlm.errors import UserError

MINIMAL = {"output_dir": "out", "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rollout": {"group_sise": 4}},
            "unknown key `rollout.group_sise`; did you mean `rollout.group_size`",
        ),
        ({"group_size": 4}, "unknown key `group_size`; did you mean `rollout.group_size`"),
        ({"rollout": {"temperature": 0}}, r"rollout\.temperature.*greater than 0 \(given: 0\)"),
        ({"rollout": {"group_size": 1}}, "group_size=1"),
        (
            {"algorithm": {"updates_per_rollout": 7}},
            "updates_per_rollout=7 does not divide the batch.*1024",
        ),
        ({"flow": {"times": [1.0]}}, "times: 1.0 is not between 0"),
        ({"flow": {"layers": [25]}}, "layers: 25.0 is not a fraction"),
        ({"model": {}}, "`model.path` is required"),
        ({"reward": {"overlong_buffer": 2000}}, "overlong_buffer=2000 must be below"),
        ({"reward": {"wrong": 1}}, r"`reward\.wrong`: Input should be less than 1 \(given: 1\)"),
        ({"reward": {"wrong": float("-inf")}}, r"`reward\.wrong`: Input should be a finite number"),
        (
            {"reward": {"wrong": -1, "function": "f.py:f"}},
            "`reward`: wrong=-1 is not read with a function",
        ),
        ({"flow": {"layers": [0.75, 0.25]}}, "must rise from the first to the last"),
        ({"flow": {"reward": {"normalise": "bilateral", "top_k": 1}}}, "top_k=1 keeps nothing"),
        (
            {"data": {"min_pixels": 9999, "max_pixels": 784}},
            r"min_pixels=9999 must be .* at most data\.max_pixels=784",
        ),
        ({"optim": {"betas": [1.5, 0.9]}}, r"betas=\[1.5, 0.9\] must be in"),
        ({"rollout": {"stop": [""]}}, "an empty string would end every response"),
        ({"seed": 10**30}, "seed"),
        (
            {"algorithm": {"method": "grpo2"}},
            r"`algorithm\.method`: Input should be 'grpo', 'dr_grpo'.*given: 'grpo2'",
        ),
        (
            {"algorithm": {"loss": "gspo"}},
            "algorithm`: loss=gspo is one number per sequence: loss_aggregation must be sequence, "
            "not token",
        ),
        (
            {"algorithm": {"method": "gmpo", "dual_clip": 3}},
            "dual_clip has no meaning with loss=gmpo",
        ),
        (
            {"algorithm": {"method": "flowrl", "advantage": "centred"}},
            "advantage must be group, not centred",
        ),
        ({"algorithm": {"method": "flowrl", "kl": {"coef": 0.1}}}, r"kl\.coef must be 0"),
        ({"algorithm": {"method": "flowrl", "importance_cap": 2}}, "importance_cap must be unset"),
        ({"algorithm": {"method": "flowrl"}, "flow": {}}, "leave `flow` out"),
        (
            {"algorithm": {"method": "flowrl"}, "shaping": {"entropy": {}}},
            r"leave `shaping\.entropy` out",
        ),
        (
            {"algorithm": {"method": "flowrl"}, "shaping": {"likelihood": {}}},
            r"leave `shaping\.likelihood` out",
        ),
        (
            {"algorithm": {"reference": "m"}},
            r"reference is set, but nothing uses it: set kl\.coef above 0",
        ),
        ({"algorithm": {"dual_clip": 1}}, "dual_clip=1.0 must be above 1"),
        (
            {"algorithm": {"method": "ppo"}, "rollout": {"max_rounds": 2}},
            "max_rounds=2 leaves out groups that are all right or all wrong",
        ),
        ({"algorithm": {"gae_lambda": 0.9}}, "gae_lambda=0.9 is read with advantage=gae only"),
        ({"algorithm": {"method": "flowrl", "gamma": 0.9}}, "gamma must be 1"),
        ({"flow": {"times": [0.0]}}, "times: 0.0 is not between 0"),
        ({"flow": {"times": [0.8, 0.8]}}, "one of them twice"),
        ({"flow": {"reward": {"threshold": 1.0}}}, "threshold=1.0 keeps nothing"),
        (
            {"flow": {}, "shaping": {"likelihood": {}}},
            "flow and shaping.likelihood are two scores for one pipeline",
        ),
        ({"shaping": {"entropy": {"kappa": 1}}}, r"shaping\.entropy\.kappa"),
        ({"shaping": {"likelihood": {"sign": 2}}}, r"shaping\.likelihood\.sign"),
        ({"flow": {"context": "token_pre+sideways"}}, r"`flow\.context\.1`.*given: 'sideways'"),
        ({"flow": {"context": "token_pre+token_pre"}}, "names the same context twice"),
        (
            {"flow": {"context": "token_pre+token_post", "shift": "1+2+3"}},
            "3 values for 2 contexts",
        ),
        ({"flow": {"shift": 0}}, r"shift: \[0\] must be 1 or more"),
        ({"flow": {"reward": {"coef": -0.1}}}, r"flow\.reward\.coef"),
        (
            {"flow": {"online": {"enabled": False, "warmup_steps": 3}}},
            "warmup_steps needs online.enabled",
        ),
        (
            {"flow": {"online": {"warmup_steps": 100}}},
            r"warmup_steps=100 leaves the policy none of train\.steps=100",
        ),
    ],
)
def test_refusals_name_the_field_and_the_value(change, message):
    with pytest.raises(UserError, match=message):
        parse_config({**MINIMAL, **change})


def test_a_method_fills_in_what_the_config_leaves_open_and_nothing_else():
    dapo = parse_config(
        {**MINIMAL, "algorithm": {"method": "dapo"}, "rollout": {"max_new_tokens": 100}}
    )
    assert (dapo.algorithm.clip_high, dapo.rollout.max_rounds, dapo.reward.overlong_buffer) == (
        0.28,
        10,
        20,
    )
    assert (dapo.reward.wrong, parse_config(MINIMAL).reward.wrong) == (-1, 0)
    own = parse_config(
        {
            **MINIMAL,
            "algorithm": {"method": "dapo", "clip_high": 0.3},
            "reward": {"overlong_buffer": 0, "wrong": -0.5},
        }
    )
    assert (own.algorithm.clip_high, own.reward.overlong_buffer, own.reward.wrong) == (0.3, 0, -0.5)
    scored = parse_config(
        {**MINIMAL, "algorithm": {"method": "dapo"}, "reward": {"function": "f.py:f"}}
    )
    assert (scored.reward.wrong, scored.reward.overlong_buffer) == (0, 204)
    critic = parse_config({**MINIMAL, "algorithm": {"method": "ppo"}, "rollout": {"group_size": 1}})
    assert (critic.algorithm.advantage, critic.algorithm.needs_reference) == ("gae", False)
    assert parse_config(
        {**MINIMAL, "algorithm": {"method": "reinforce_pp"}}
    ).algorithm.needs_reference


def test_another_method_brings_its_own_settings_over_a_config_that_spells_one_out(tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(
        to_yaml(
            parse_config(
                {
                    **MINIMAL,
                    "algorithm": {"dual_clip": 3, "loss_aggregation": "sequence"},
                    "optim": {"lr": 1e-5},
                }
            )
        )
    )
    gspo = load_config(path, ("algorithm.method=gspo",))
    assert (
        gspo.algorithm.loss,
        gspo.algorithm.clip_low,
        gspo.algorithm.dual_clip,
        gspo.optim.lr,
    ) == ("gspo", 3e-4, None, 1e-5)
    ppo = load_config(path, ("algorithm.method=ppo", "algorithm.clip_high=0.3"))
    assert (ppo.algorithm.advantage, ppo.algorithm.clip_high) == ("gae", 0.3)
    assert load_config(path, ("algorithm.method=grpo",)).algorithm.dual_clip == 3
    assert load_config(path, ("algorithm.method=dapo",)).reward.wrong == -1
    path.write_text(to_yaml(load_config(path, ("algorithm.method=dapo",))))
    assert load_config(path, ("algorithm.method=grpo",)).reward.wrong == 0


def test_entropy_shaping_is_weaker_with_ppo():
    for method, alpha in (("ppo", 0.1), ("grpo", 0.4)):
        assert (
            parse_config(
                {**MINIMAL, "algorithm": {"method": method}, "shaping": {"entropy": {}}}
            ).shaping.entropy.alpha
            == alpha
        )


def test_the_hash_leaves_out_what_a_run_is_given_to_run_on():
    base = config_hash(parse_config(MINIMAL))
    same = {
        "train": {"tokens_per_microbatch": 99},
        "eval": {"every": 5},
        "rollout": {"hf_batch_size": 3},
        "model": {"path": "m", "device": "cpu"},
    }
    assert config_hash(parse_config({**MINIMAL, **same})) == base
    assert config_hash(parse_config({**MINIMAL, "train": {"steps": 7}})) != base


def test_contexts_are_read_as_published():
    flow = parse_config(
        {**MINIMAL, "flow": {"context": "token_pre+token_post+identity", "shift": "1+2+1"}}
    ).flow
    assert flow.sides == (("token_pre", 1), ("token_post", 2), ("identity", 0))
    assert parse_config(
        {**MINIMAL, "flow": {"context": ["token_pre", "token_post"]}}
    ).flow.sides == (("token_pre", 1), ("token_post", 1))


def test_overrides_and_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: out\nmodel: {path: m}\noptim: {lr: 1e-5}\n")
    cfg = load_config(
        path, ("optim.weight_decay=1e-2", "flow.reward.top_k=3", "rollout.stop=[</answer>]")
    )
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.flow.reward.top_k, cfg.rollout.stop) == (
        1e-5,
        0.01,
        3,
        ("</answer>",),
    )


@pytest.mark.parametrize("override", ["optim.lr", "=3", "model.path.deep=1"])
def test_a_malformed_override_is_named(tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: out\nmodel: {path: m}\n")
    with pytest.raises(UserError, match="override"):
        load_config(path, (override,))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: No such file"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not YAML"):
        load_config(tmp_path / "bad.yaml")


def test_yaml_round_trip(tmp_path):
    for sections in ({"flow": {}}, *({"algorithm": {"method": method}} for method in METHODS)):
        cfg = parse_config({**MINIMAL, **sections})
        (tmp_path / "c.yaml").write_text(to_yaml(cfg))
        assert load_config(tmp_path / "c.yaml") == cfg


def test_the_hash_ignores_where_a_run_is_written_and_nothing_else():
    base = config_hash(parse_config(MINIMAL))
    assert config_hash(parse_config({**MINIMAL, "output_dir": "elsewhere"})) == base
    assert config_hash(parse_config({**MINIMAL, "seed": 1})) != base


def test_every_field_says_what_it_is():
    from pydantic import BaseModel

    from rlfr_vlm import config

    for model in vars(config).values():
        if isinstance(model, type) and issubclass(model, BaseModel):
            for name, field in model.model_fields.items():
                nested = isinstance(field.default, BaseModel) or name in ("model", "flow")
                assert nested or field.description, f"{model.__name__}.{name}"


def test_off_is_off_however_yaml_reads_it(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output_dir: x\nmodel: {path: m, gradient_checkpointing: off}\n"
    )
    assert load_config(tmp_path / "c.yaml").model.gradient_checkpointing == "off"
    assert (
        load_config(
            tmp_path / "c.yaml", ("model.gradient_checkpointing=off",)
        ).model.gradient_checkpointing
        == "off"
    )


def test_a_bare_off_switches_a_monitor_off(tmp_path):
    """YAML reads it as false."""
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: o\nmodel: {path: m}\nmonitors: {length: off}\n")
    cfg = load_config(path, ("monitors.entropy=off",))
    assert (cfg.monitors.length, cfg.monitors.entropy) == ("off", "off")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("output_dir: o\nmodel: {path: m}\nseed: 1\nseed: 2\n", "seed"),
        (
            "output_dir: o\nmodel: {path: m}\nrollout:\n  group_size: 4\n  group_size: 8\n",
            "group_size",
        ),
    ],
)
def test_a_setting_that_stands_twice_is_refused(tmp_path, text, key):
    """YAML itself takes the last one in silence."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"`{key}` stands there twice"):
        load_config(path)
