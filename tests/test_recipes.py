"""The recipes under scripts/: each loads, says what it would do, fits its models, and runs on a
tiny model of the same architecture.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from rlfr_vlm.cli import main
from rlfr_vlm.config import config_hash, load_config, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting import budget
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.spec import SPEC_FILE
from rlfr_vlm.planning import rows, shapes
from tests.runs import ROOT

RECIPES = sorted((ROOT / "scripts").glob("*/*.yaml"))
RLFR = sorted(path.parent for path in RECIPES if path.name == "rlfr.yaml")
FAMILY = {
    "qwen2.5-math-1.5b": "qwen2",
    "qwen2.5-math-7b": "qwen2",
    "qwen2.5-7b": "qwen2",
    "llama-3.1-8b": "llama",
    "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl",
}
RUNS_SLOWLY = (
    "qwen2.5-math-7b",
    "qwen2.5-vl-3b",
)  # the siblings of recipes that the fast lane runs

# The released scripts' values, by hand: what differs between models, and what they share.
PUBLISHED = {
    "qwen2.5-math-1.5b": {
        "path": "Qwen/Qwen2.5-Math-1.5B",
        "flow": {"flow.network.depth": 4, "flow.fit.batch_mul": 4, "flow.fit.max_tokens": 8192},
        "rlfr": {"rollout.max_new_tokens": 1024, "train.steps": 330},
    },
    "qwen2.5-math-7b": {
        "path": "Qwen/Qwen2.5-Math-7B",
        "flow": {"flow.network.depth": 6, "flow.fit.batch_mul": 2, "flow.fit.max_tokens": 8192},
        "rlfr": {"rollout.max_new_tokens": 1024, "train.steps": 330},
    },
    "llama-3.1-8b": {
        "path": "meta-llama/Llama-3.1-8B",
        "flow": {"flow.network.depth": 6, "flow.fit.batch_mul": 2, "flow.fit.max_tokens": 8192},
        "rlfr": {"rollout.max_new_tokens": 1024, "train.steps": 330},
    },
    "qwen2.5-vl-3b": {
        "path": "Qwen/Qwen2.5-VL-3B-Instruct",
        "flow": {
            "flow.network.depth": 4,
            "flow.fit.batch_mul": 4,
            "flow.fit.max_tokens": 16384,
            "data.max_pixels": 262144,
        },
        "rlfr": {"rollout.max_new_tokens": 1024, "train.steps": 2145},
    },
    "qwen2.5-vl-7b": {
        "path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "flow": {
            "flow.network.depth": 6,
            "flow.fit.batch_mul": 4,
            "flow.fit.max_tokens": 16384,
            "data.max_pixels": 262144,
        },
        "rlfr": {"rollout.max_new_tokens": 3072, "train.steps": 2145},
    },
}
FIELD = {
    "flow.layers": [0.25, 0.5, 0.75],
    "flow.context": ["token_pre"],
    "flow.shift": [1],
    "model.dtype": "bfloat16",
    "seed": 42,
}
FIT = FIELD | {
    "flow.fit.lr": 1e-4,
    "flow.fit.epochs": 2,
    "flow.fit.weight_decay": 0.01,
    "flow.fit.batch_size": 128,
    "flow.fit.steps": None,
}
RL = FIELD | {
    "rollout.num_prompts": 128,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.vllm.gpu_memory_utilization": 0.3,
    "data.max_prompt_tokens": 3000,
    "algorithm.method": "grpo",
    "algorithm.advantage": "group",
    "algorithm.loss_aggregation": "sequence",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.dual_clip": 3.0,
    "algorithm.updates_per_rollout": 8,  # 128 x 8 samples in batches of 128
    "algorithm.gamma": 1.0,
    "algorithm.gae_lambda": 1.0,
    "algorithm.kl.coef": 0.0,
    "flow.times": [0.8],
    "flow.reward.coef": 0.01,
    "flow.reward.normalise": "minmax",
    "flow.reward.threshold": 0.6,
    "flow.reward.top_k": 15,
    "flow.reward.gamma": 1.0,
    "flow.reward.draws": 1,
    "flow.online.enabled": True,
    "flow.online.lr": 1e-4,
    "flow.online.select": ["correct"],
    "flow.online.soft_weight": 0.0,
    "optim.lr": 1e-6,
    "optim.betas": [0.9, 0.95],
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "optim.warmup_frac": 0.03,
    "optim.min_lr_ratio": 0.1,
    "train.save_steps": 50,
}
LANGUAGE = {"reward.answer": "boxed", "reward.format": "boxed", "reward.format_weight": 1.0}
VISION = {
    "reward.answer": "tag",
    "reward.format": "tags",
    "reward.format_weight": 0.5,
    "model.freeze_vision": True,
    "data.min_pixels": 4 * 28 * 28,
    "data.max_pixels": 640 * 28 * 28,
}
FLOWRL = {
    "model.path": "Qwen/Qwen2.5-7B",
    "rollout.num_prompts": 512,
    "rollout.group_size": 8,
    "rollout.max_new_tokens": 8192,
    "rollout.vllm.gpu_memory_utilization": 0.6,
    "data.max_prompt_tokens": 2048,
    "reward.wrong": -1.0,
    "algorithm.method": "flowrl",
    "algorithm.loss": "flowrl",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.updates_per_rollout": 16,
    "algorithm.flowrl.beta": 15.0,
    "algorithm.flowrl.lr": 1e-6,
    "algorithm.flowrl.weight_decay": 0.1,
    "optim.lr": 1e-6,
    "optim.weight_decay": 0.1,
    "optim.min_lr_ratio": 1.0,
    "train.steps": 34,
    "flow": None,
}

name = pytest.mark.parametrize("folder", RLFR, ids=lambda folder: folder.name)
each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The recipes' relative paths lead nowhere, whatever lies under runs/."""
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    """Exit code, standard output, standard error of the command line in this process."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exited.value.code, output.out, output.err


def verb(path):
    return "flow" if path.stem == "flow" else "train"


# -- the files -------------------------------------------------------------------------------------


def test_there_is_a_folder_per_model():
    assert {path.name for path in RLFR} == set(FAMILY) - {"qwen2.5-7b"}
    for folder in RLFR:
        assert {path.stem for path in folder.iterdir()} == {"flow", "rlfr", "rlvr"}
    assert (ROOT / "scripts/qwen2.5-7b/flowrl.yaml") in RECIPES


@each
def test_a_dry_run_prints_the_config_and_the_schedule(path, capsys):
    code, out, err = run(capsys, verb(path), "--config", path, "--dry-run")
    assert code == 0, err
    assert parse_config(yaml.safe_load(out)) == load_config(path)
    comments = [line for line in out.splitlines() if line.startswith("#")]
    for expected in (
        "# schedule",
        "# loaded",
        "# written",
        "rows unknown",
        "learning rate",
        "tokens per step",
    ):
        assert any(expected in line for line in comments), expected


@each
def test_every_setting_names_its_source(path):
    text = path.read_text()
    assert "`released`" in text and "`ours`" in text
    for line in text.splitlines():
        setting = re.match(r" *([a-z_]+): +[^# ]", line)
        if setting and setting[1] not in (
            "output_dir",
            "path",
            "system",
        ):  # output_dir: ours; path: the model; system: said above it
            assert re.search(r" # .*(released|ours|arXiv:)", line), line


@name
def test_the_baseline_differs_in_the_flow_alone(folder):
    rlfr, rlvr = (load_config(folder / f"{kind}.yaml").model_dump() for kind in ("rlfr", "rlvr"))
    assert {key for key in rlfr if rlfr[key] != rlvr[key]} == {"flow", "output_dir"}
    assert rlvr["flow"] is None


@name
def test_the_fitted_field_is_the_one_that_rl_reads(folder):
    fit, rl = (load_config(folder / f"{kind}.yaml") for kind in ("flow", "rlfr"))
    for setting in ("layers", "sides", "times", "network"):
        assert getattr(fit.flow, setting) == getattr(rl.flow, setting)
    assert Path(rl.flow.checkpoint) == Path(fit.output_dir) / "flow"
    assert (fit.model.path, fit.model.dtype) == (rl.model.path, rl.model.dtype)
    assert (fit.data.system, fit.data.suffix) == (rl.data.system, rl.data.suffix)
    assert len({fit.output_dir, rl.output_dir, load_config(folder / "rlvr.yaml").output_dir}) == 3


def setting(cfg, key):
    """Value of a dotted key; tuples as lists, as YAML has them."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return [*cfg] if isinstance(cfg, tuple) else cfg


@name
def test_published_values(folder):
    """Every figure against PUBLISHED, which was copied from the released scripts and not from the
    recipes.
    """
    model = PUBLISHED[folder.name]
    fit, rl = (load_config(folder / f"{kind}.yaml") for kind in ("flow", "rlfr"))
    for cfg, expected in (
        (fit, FIT | model["flow"]),
        (rl, RL | (VISION if "-vl-" in folder.name else LANGUAGE) | model["rlfr"]),
    ):
        assert {key: setting(cfg, key) for key in expected} == expected
    assert fit.model.path == model["path"]
    assert fit.flow.network.depth == rl.flow.network.depth == model["flow"]["flow.network.depth"]
    assert not rl.algorithm.needs_reference


def test_published_values_of_flowrl():
    cfg = load_config(ROOT / "scripts/qwen2.5-7b/flowrl.yaml")
    assert {key: setting(cfg, key) for key in FLOWRL} == FLOWRL


def test_flowrl_warms_up_for_ten_steps():
    cfg = load_config(ROOT / "scripts/qwen2.5-7b/flowrl.yaml")
    updates = cfg.algorithm.updates_per_rollout
    assert int(cfg.train.steps * updates * cfg.optim.warmup_frac) == 10 * updates
    assert cfg.rollout.num_prompts / updates == 32
    assert cfg.algorithm.needs_reference


# -- the schedule ----------------------------------------------------------------------------------


def test_the_schedule_of_the_first_recipe_by_hand(tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "?", "answer": "1"}\n' * 8448)
    recipe = ROOT / "scripts/qwen2.5-math-1.5b/rlfr.yaml"
    overrides = [
        f"data.train={data}",
        f"output_dir={tmp_path}/run",
        "eval.every=100",
        f"data.eval={data}",
        "eval.limit=10",
    ]
    code, out, err = run(capsys, "train", "--config", recipe, "--dry-run", *overrides)
    assert code == 0, err
    lines = " ".join(
        " ".join(line[1:].split()) for line in out.splitlines() if line.startswith("#")
    )
    for expected in (
        f"data 8,448 rows: {data}",
        "steps 330, 5.00 passes over its rows",
        "rollouts 128 prompts x 8 responses = 1,024 samples per step",
        "updates 8 per step of 128 samples each, 2,640 in total",
        "learning rate 1e-06 after 79 updates of warm-up, then a cosine down to 1e-07",
        "tokens per step at most 4,120,576: 1,024 samples of a prompt of 3,000 and a response of "
        "1,024",
        "response tokens at most 346,030,080 in total",
        f"(10 of 8,448 rows: {data}): 90 responses of at most 1,024 tokens, after steps 100, 200, "
        "300, 330",
        "checkpoints 7, after steps 50, 100, 150, 200, 250, 300, 330; the newest 3 are kept",
        "flow field runs/qwen2.5-math-1.5b/flow, which is not there yet",
        f"{tmp_path}/run/eval/ step_N.json and step_N.jsonl, N = 000100, 000200, 000300, 000330",
        f"{tmp_path}/run/hf/global_step_330/",
    ):
        assert expected in lines, expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["algorithm.method=dapo"], "up to 10 per step, each sampling anew"),
        (["algorithm.method=ppo", "flow=null"], "value head"),
        (
            ["algorithm.kl.coef=0.1", "algorithm.reference=other/model"],
            "other/model in bfloat16, frozen",
        ),
        (
            ["flow.online.warmup_steps=10", "train.steps=20"],
            "in the first 10 steps only the field learns",
        ),
        (
            ["flow.online.warmup_steps=10", "train.steps=20"],
            "8 per step of 128 samples each, 80 in total",
        ),
        (
            ["flow.online.enabled=false", "flow.checkpoint=null"],
            "a new one (flow.checkpoint is unset), frozen",
        ),
        (["algorithm.method=ppo", "flow=null"], "manifest.json, head.safetensors"),
        (["train.save_steps=10"], "33, after steps 10, 20, 30, 40, 50, ..., 320, 330;"),
        (["optim.min_lr_ratio=1"], "warm-up, constant after that"),
        (["data.on_bad_row=skip"], "bad_rows.jsonl"),
        ([f"model.path={ROOT}/rlfr_vlm/demo/tiny_vlm"], "512,256 parameters"),
    ],
)
def test_the_schedule_follows_the_settings(settings, expected, capsys):
    code, out, err = run(
        capsys,
        "train",
        "--config",
        ROOT / "scripts/qwen2.5-math-1.5b/rlfr.yaml",
        "--dry-run",
        *settings,
    )
    assert code == 0, err
    assert expected in out


def test_the_schedule_is_light():
    code = (
        "import sys\nfrom rlfr_vlm.cli import main\n"
        "try: main(['train', '--config', 'scripts/qwen2.5-math-1.5b/rlfr.yaml', '--dry-run'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, capsys):
    recipe = ROOT / "scripts/qwen2.5-math-1.5b/rlvr.yaml"
    (tmp_path / "few.jsonl").write_text("{}\n\n{}\n")
    (tmp_path / "README.md").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "run/checkpoints/global_step_3").mkdir(parents=True)
    for command, override, message in (
        ("train", "data.train=null", "data.train is required"),
        ("train", "eval.every=5", "data.eval is required"),
        ("flow", f"data.expert={tmp_path}/few.jsonl", "no `flow` section"),
        ("train", f"data.train={tmp_path}/few.jsonl", "rollout.num_prompts=128 exceeds the 2 rows"),
        (
            "train",
            f"data.train={tmp_path}/README.md",
            "README.md: expected .jsonl, .json, .parquet or .arrow",
        ),
        ("train", f"data.train={tmp_path}", "expected .jsonl, .json, .parquet or .arrow"),
        ("train", f"data.train={tmp_path}/broken.json", "broken.json cannot be read as .json"),
        (
            "train",
            f"output_dir={tmp_path}/run resume=false",
            "checkpoints holds checkpoints; use another output_dir",
        ),
    ):
        code, _, err = run(capsys, command, "--config", recipe, "--dry-run", *override.split())
        assert (code, message in err) == (2, True), err


def test_a_config_that_is_not_utf8_stops_with_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(b"output_dir: r\xfcn")
    code, _, err = run(capsys, "train", "--config", tmp_path / "config.yaml", "--dry-run")
    assert (code, err) == (
        2,
        f"rlfr-vlm train: config {tmp_path}/config.yaml: not UTF-8: invalid start byte at byte "
        "13\n",
    )


def test_a_quoted_override_is_text(tmp_path):
    recipe = ROOT / "scripts/qwen2.5-math-1.5b/rlvr.yaml"
    cfg = load_config(recipe, ('output_dir="2024"', "optim.lr=1e-4"))
    assert (cfg.output_dir, cfg.optim.lr) == ("2024", 1e-4)


def test_a_dry_run_says_where_it_would_go_on_from(tmp_path, capsys):
    recipe = ROOT / "scripts/qwen2.5-math-1.5b/rlvr.yaml"
    arguments = (
        "train",
        "--config",
        recipe,
        "--dry-run",
        f"output_dir={tmp_path}",
        "train.steps=20",
    )
    for step in (3, 12):
        (tmp_path / f"checkpoints/global_step_{step}").mkdir(parents=True)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and f"from {tmp_path}/checkpoints/global_step_12, or from one before it" in out
    cfg = load_config(recipe, arguments[4:])
    state = {"config_hash": config_hash(cfg), "config": cfg.model_dump(mode="json")}
    (tmp_path / "checkpoints/global_step_12/state.json").write_text(json.dumps(state))
    code, out, _ = run(capsys, *arguments)
    assert (
        code == 0 and f"from {tmp_path}/checkpoints/global_step_12: 8 of the steps are left" in out
    )
    code, _, err = run(capsys, *arguments, "optim.lr=1")
    assert code == 2 and "was written with another config: optim.lr: 1e-06 -> 1.0" in err


def open_arrow(path, schema):
    import pyarrow as pa

    return pa.ipc.new_stream(str(path), schema)


def test_rows_are_counted_in_every_format_and_unknown_ones_said(tmp_path):
    made = [{"prompt": "?", "answer": "1"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(made))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in made))
    assert [
        rows.count_rows(str(tmp_path / f"rows.{kind}")).count for kind in ("json", "jsonl")
    ] == [3, 3]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pytest.importorskip("pyarrow").Table.from_pylist(made), tmp_path / "rows.parquet"
    )
    assert rows.count_rows(str(tmp_path / "rows.parquet"), 2) == rows.RowCount(
        2, f"2 of 3 rows: {tmp_path}/rows.parquet"
    )
    table = pytest.importorskip("pyarrow").Table.from_pylist(made)
    with open_arrow(tmp_path / "rows.arrow", table.schema) as stream:
        for _ in range(2):
            stream.write_table(table)
    assert rows.count_rows(str(tmp_path / "rows.arrow")).count == 6
    for name, text in (
        ("broken.parquet", "PAR"),
        ("broken.arrow", "AR"),
        ("broken.json", "{"),
        ("deep.json", "[" * 10**6),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            rows.count_rows(str(tmp_path / name))
    for source, message in (
        (tmp_path / "none.jsonl", "is not there yet"),
        ("someone/data@train", "is read from the hub"),
    ):
        found = rows.count_rows(str(source))
        assert found.count is None and message in found.text


@pytest.mark.parametrize(("hidden", "depth"), [(8, 1), (24, 3)])
def test_the_size_of_a_field_is_its_networks(hidden, depth, tmp_path):
    network = VelocityNet(hidden, depth, 1e-6)
    assert shapes.num_field_parameters(hidden, depth) == sum(
        p.numel() for p in network.parameters()
    )
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": hidden}}))
    assert shapes.hidden_size(str(tmp_path)) == hidden
    assert shapes.hidden_size("someone/model") is None


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_the_size_of_a_model_is_estimated_from_its_config(family, model_folder):
    weights = {}
    for file in Path(model_folder(family)).glob("*.safetensors"):
        weights |= load_file(file)
    language = sum(w.numel() for name, w in weights.items() if "visual" not in name)
    assert shapes.num_parameters(model_folder(family)) == pytest.approx(language, rel=0.02)


def test_memory_is_said_where_the_size_is_known(tmp_path, capsys):
    """7.6 billion parameters, as Qwen2.5-7B has them, by hand: 7,615,283,200 x 20 + 477,281,280 x
    16 bytes.
    """
    config = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
    }
    config |= {"num_key_value_heads": 4, "vocab_size": 152064}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder, kind, more, message in (
        ("qwen2.5-math-7b", "rlfr", (), "about 149.0 GiB on one device"),
        ("qwen2.5-math-7b", "rlfr", ("flow.online.enabled=false",), "477.3M parameters x 4 bytes"),
        ("qwen2.5-math-7b", "rlvr", ("model.dtype=float32",), "7,615.3M parameters x 16 bytes"),
        (
            "qwen2.5-math-7b",
            "flow",
            (),
            "policy 7,615.3M parameters x 2 bytes, field 477.3M parameters x 16 bytes",
        ),
        ("qwen2.5-7b", "flowrl", (), "reference 7,615.3M parameters x 2 bytes"),
        (
            "qwen2.5-7b",
            "flowrl",
            ("model.path=some/model",),
            "20 bytes for each parameter of the policy, 18.6 GiB per billion",
        ),
    ):
        path = ROOT / "scripts" / folder / f"{kind}.yaml"
        code, out, err = run(
            capsys, verb(path), "--config", path, "--dry-run", f"model.path={tmp_path}", *more
        )
        assert (code, message in out) == (0, True), err + out
    for text in (
        "[]",
        '{"hidden_size": "x", "num_attention_heads": 2}',
        '{"hidden_size": 8, "num_attention_heads": 0}',
    ):
        (tmp_path / "config.json").write_text(text)
        assert shapes.num_parameters(str(tmp_path)) is None


# -- runs of a tiny model --------------------------------------------------------------------------


@pytest.fixture
def tiny(model_folder, tmp_path):
    """Folder of a tiny model for a recipe's; Llama's base model comes without a chat template."""

    def make(recipe: str) -> str:
        source = model_folder(FAMILY[recipe])
        if FAMILY[recipe] != "llama":
            return source
        copy = tmp_path / "base"
        shutil.copytree(source, copy)
        (copy / "chat_template.jinja").unlink()
        return str(copy)

    return make


def write_rows(folder, vision):
    for file in ("train", "expert"):
        rows = []
        for i in range(6):
            row = {
                "id": f"{file}{i}",
                "prompt": f"{'<image>' * vision}What is {i} + 1?",
                "answer": str(i + 1),
            }
            if vision:
                Image.new("RGB", (56, 56), (40 * i, 40, 90)).save(folder / f"{file}{i}.png")
                row["images"] = [f"{file}{i}.png"]
            if file == "expert":
                row["response"] = (
                    f"<think>{i} and one</think> <answer>{i + 1}</answer>"
                    if vision
                    else f"It is \\boxed{{{i + 1}}}."
                )
            rows.append(row)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides(folder, model, vision, small):
    """What makes a recipe small; everything else stays as it stands there."""
    write_rows(folder, vision)
    data = [f"data.{file}={folder}/{file}.jsonl" for file in ("train", "expert")]
    return [
        *data,
        f"model.path={model}",
        "model.dtype=float32",
        "model.device=cpu",
        "rollout.engine=hf",
        "reward.grader.workers=1",
        *small,
    ]


SMALL_RL = [
    "rollout.num_prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "train.steps=2",
]


def finished(folder, steps):
    """Metrics of a finished run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert (folder / f"hf/global_step_{steps}/config.json").exists()
    return lines


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.name in RUNS_SLOWLY else [])
        for f in RLFR
    ],
)
def test_flow_rlfr_and_rlvr_run_on_a_tiny_model(folder, tiny, tmp_path, capsys):
    vision = "-vl-" in folder.name
    common = overrides(tmp_path, tiny(folder.name), vision, ["flow.fit.steps=2"])
    code, out, err = run(
        capsys, "flow", "--config", folder / "flow.yaml", *common, f"output_dir={tmp_path}"
    )
    assert code == 0, err
    field = out.strip()
    fit = load_config(folder / "flow.yaml", ("flow.fit.steps=2",))
    assert (
        len(Path(field, "flow_fit.jsonl").read_text().splitlines())
        == budget.fit_steps(fit, 6)[1]
        == 2
    )
    assert Path(field, SPEC_FILE).exists() and budget.FIELD_SPEC == SPEC_FILE
    for kind in ("rlfr", "rlvr"):
        mine = [f"output_dir={tmp_path}/{kind}", *SMALL_RL]
        mine += [f"flow.checkpoint={field}"] if kind == "rlfr" else []
        code, _, err = run(
            capsys, "train", "--config", folder / f"{kind}.yaml", *common[:-1], *mine
        )
        assert code == 0, err
        lines = finished(tmp_path / kind, 2)
        assert all(("flow/deviation_mean" in line) == (kind == "rlfr") for line in lines)
        assert kind == "rlvr" or all(line["flow/num_reward_tokens"] > 0 for line in lines)
        assert (tmp_path / kind / "checkpoints/global_step_2/flow").is_dir() == (kind == "rlfr")


def test_flowrl_runs_on_a_tiny_model(tiny, tmp_path, capsys):
    common = overrides(
        tmp_path, tiny("qwen2.5-7b"), False, [*SMALL_RL, f"output_dir={tmp_path}/run"]
    )
    code, _, err = run(
        capsys, "train", "--config", ROOT / "scripts/qwen2.5-7b/flowrl.yaml", *common
    )
    assert code == 0, err
    finished(tmp_path / "run", 2)


def test_the_fit_takes_as_many_steps_as_the_schedule_says(tiny, tmp_path, capsys):
    """Passes over the rows that are not held out, in batches of no more than there are."""
    recipe = ROOT / "scripts/qwen2.5-math-1.5b/flow.yaml"
    small = [
        "flow.fit.batch_size=2",
        "flow.fit.epochs=1.5",
        "flow.fit.batch_mul=1",
        f"output_dir={tmp_path}",
    ]
    common = overrides(tmp_path, tiny("qwen2.5-math-1.5b"), False, small)
    _, out, _ = run(capsys, "flow", "--config", recipe, "--dry-run", *common)
    assert "steps            4: 1.5 passes" in out  # 6 rows, 1 of them held out
    code, out, err = run(capsys, "flow", "--config", recipe, *common)
    assert code == 0, err
    assert len(Path(out.strip(), "flow_fit.jsonl").read_text().splitlines()) == 4


# -- the launcher ----------------------------------------------------------------------------------


def test_the_launcher_brings_a_fit_to_the_place_that_is_named(tmp_path):
    recipe = str(ROOT / "scripts/qwen2.5-math-1.5b")
    place = tmp_path / "a: 'b' #1/flow"
    for method in (["flow"], []):
        done = launch(recipe, "--dry-run", *method, f'flow.checkpoint="{place}"', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        fit, *rest = (parse_config(tree) for tree in yaml.safe_load_all(done.stdout))
        assert (fit.output_dir, len(rest)) == (str(place.parent), not method)
    assert all(cfg.flow.checkpoint == str(place) for cfg in rest)
    done = launch(recipe, "flow", "--dry-run", "output_dir=here", cwd=tmp_path)
    assert [parse_config(tree).output_dir for tree in yaml.safe_load_all(done.stdout)] == ["here"]
    done = launch(recipe, "--dry-run", "flow=null", cwd=tmp_path)
    assert [parse_config(tree).flow for tree in yaml.safe_load_all(done.stdout)] == [None]


def test_the_launcher_starts_paths_where_it_is_called(tmp_path):
    shutil.copytree(ROOT / "scripts/qwen2.5-math-1.5b", tmp_path / "mine")
    (tmp_path / "rows.jsonl").write_text("{}\n" * 200)
    done = launch("--dry-run", "rlvr", "data.train=rows.jsonl", "mine/", cwd=tmp_path)
    assert done.returncode == 0 and "200 rows: rows.jsonl" in done.stdout, done.stderr
    assert launch("mine", "-h", cwd=tmp_path).stdout.startswith("Run a recipe: ")


def launch(*arguments, cwd=ROOT):
    return subprocess.run(
        ["bash", str(ROOT / "scripts/run.sh"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_launcher_fits_a_missing_field_first(tmp_path):
    recipe = str(ROOT / "scripts/qwen2.5-math-1.5b")
    field = tmp_path / "flow"
    done = launch(recipe, "--dry-run", f"flow.checkpoint={field}", "train.steps=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fit, rl = (parse_config(tree) for tree in yaml.safe_load_all(done.stdout))
    assert (fit.output_dir, rl.flow.checkpoint, rl.train.steps) == (str(tmp_path), str(field), 7)
    field.mkdir()
    (field / SPEC_FILE).write_text(
        json.dumps({"context": ["token_pre"], "shift": [1], "times": [0.8], "depth": 4})
    )
    done = launch(recipe, "rlfr", "--dry-run", f"flow.checkpoint={field}")
    assert [parse_config(tree).output_dir for tree in yaml.safe_load_all(done.stdout)] == [
        "runs/qwen2.5-math-1.5b/rlfr"
    ]
    for kind in ("rlvr", "flow"):
        trees = [*yaml.safe_load_all(launch(recipe, kind, "--dry-run", "train.steps=7").stdout)]
        assert [parse_config(tree).train.steps for tree in trees] == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "RECIPE_DIR"),
        (("nowhere",), "no folder nowhere"),
        (("scripts/qwen2.5-7b",), "has no rlfr.yaml"),
        (
            ("scripts/qwen2.5-math-1.5b", "--dry-run", "flow.checkpoint=elsewhere"),
            "it must end in /flow",
        ),
        (
            ("scripts/qwen2.5-math-1.5b", "flow", "flow.checkpoint=a/flow", "output_dir=b"),
            "say where the field goes: name one",
        ),
        (("scripts/qwen2.5-math-1.5b", "rlvr", "flow.times=[0.5]"), "rlvr has no flow field"),
        (("flowrl", "scripts/qwen2.5-7b", "flow={}"), "flowrl has no flow field"),
        (("scripts/qwen2.5-math-1.5b", "grpo"), "grpo is no method and no a.b=c"),
        (("scripts/qwen2.5-math-1.5b", "rlvr", "flow"), "both rlvr and flow: name one"),
        (("scripts/qwen2.5-math-1.5b", "--dryrun"), "unknown option --dryrun"),
        (
            ("scripts/qwen2.5-math-1.5b", "optim.lr=-1"),
            "`optim.lr`: Input should be greater than 0",
        ),
    ],
)
def test_the_launcher_says_what_is_wrong(arguments, message):
    done = launch(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
