"""import-flow and export-flow as a user meets them, and a run on an imported field."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlfr_vlm.cli import main
from rlfr_vlm.commands import identity_from_config
from rlfr_vlm.config import ModelConfig
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.spec import read_spec
from rlfr_vlm.models.policy import Policy
from tests.flow.test_official import Malicious, official_state
from tests.runs import cli, make_config, make_data

FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def run(capsys, *arguments):
    """Exit code, standard output, standard error of the command line in this process."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exited.value.code, output.out.strip(), output.err.strip()


@pytest.fixture
def theirs(tmp_path):
    """A published checkpoint for the tiny models, with small weights."""
    state = {
        name: tensor if name.endswith("freqs") else tensor / 10
        for name, tensor in official_state(h=128, depth=1).items()
    }
    (tmp_path / "theirs").mkdir()
    torch.save(
        {name: tensor.bfloat16() for name, tensor in state.items()},
        tmp_path / "theirs/flow_model.bin",
    )
    return tmp_path / "theirs"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_says_what_the_loaded_policy_says(model_folder, family):
    folder = model_folder(family)
    policy = Policy(ModelConfig(path=folder, dtype="float32", device="cpu"))
    assert identity_from_config(folder) == policy.identity | {"fingerprint": ""}


def test_import_reads_no_weights_and_export_gives_the_file_back(
    theirs, model_folder, tmp_path, capsys
):
    model = tmp_path / "config-only"
    model.mkdir()
    shutil.copy(f"{model_folder('qwen2', hidden=128)}/config.json", model)
    arguments = (
        "import-flow",
        theirs,
        "--model",
        model,
        "--out",
        tmp_path / "ours",
        "--context",
        "token_pre+token_post",
    )
    code, out, err = run(capsys, *arguments, "--shift", "1+2", "--times", "0.5+0.8")
    assert (code, out) == (0, str(tmp_path / "ours")), err
    assert (
        "context token_pre+token_post (--context); shift 1+2 (--shift); layers 1+2+3 (default "
        "0.25+0.5+0.75); times 0.5+0.8" in err
    )
    spec = json.loads((tmp_path / "ours/flow_config.json").read_text())
    assert (spec["depth"], spec["backbone"]["fingerprint"], spec["backbone"]["hidden_size"]) == (
        1,
        "",
        128,
    )
    code, out, err = run(
        capsys,
        "export-flow",
        tmp_path / "ours",
        "--out",
        tmp_path / "back/field.bin",
        "--dtype",
        "bfloat16",
    )
    assert (code, out) == (0, str(tmp_path / "back/field.bin")), err
    settings = (
        "flow_context_mode token_pre+token_post, flow_shift 1+2, hook_layers_percentile "
        "0.25+0.5+0.75, "
    )
    assert settings + "rewarding_timesteps 0.5+0.8, num_layers_flow 1" in " ".join(err.split())
    original, back = (
        torch.load(path, weights_only=True) for path in (theirs / "flow_model.bin", out)
    )
    assert original.keys() == back.keys()
    assert all(
        back[name].dtype == torch.bfloat16 and torch.equal(back[name], original[name])
        for name in original
    )
    code, out, _ = run(capsys, "export-flow", tmp_path / "ours", "--out", tmp_path)
    assert (code, out) == (0, str(tmp_path / "flow_model.bin"))
    assert {tensor.dtype for tensor in torch.load(out, weights_only=True).values()} == {
        torch.float32
    }


def test_nothing_that_is_there_is_written_over(theirs, model_folder, tmp_path, capsys):
    arguments = (
        "import-flow",
        theirs,
        "--model",
        model_folder("qwen2", hidden=128),
        "--out",
        tmp_path / "ours",
        "--context",
        "token_pre",
    )
    export = ("export-flow", tmp_path / "ours", "--out", tmp_path / "back.bin")
    for call, place in (
        (arguments, tmp_path / "ours/flow_config.json"),
        (export, tmp_path / "back.bin"),
    ):
        assert run(capsys, *call)[0] == 0
        before = place.read_bytes()
        place.write_bytes(before + b" ")
        code, _, err = run(capsys, *call)
        assert (code, "already" in err, place.read_bytes()) == (2, True, before + b" ")
        place.write_bytes(before)


@pytest.mark.parametrize("out", ["/proc/nowhere/x", "BACK/file/x", "BACK/" + 300 * "n"])
def test_a_place_that_cannot_be_written_to_stops_with_one_line(
    theirs, model_folder, tmp_path, capsys, out
):
    (tmp_path / "file").touch()
    out = out.replace("BACK", str(tmp_path))
    arguments = (
        "import-flow",
        theirs,
        "--model",
        model_folder("qwen2", hidden=128),
        "--context",
        "token_pre",
        "--out",
    )
    assert run(capsys, *arguments, tmp_path / "ours")[0] == 0
    for call in (arguments, ("export-flow", tmp_path / "ours", "--out")):
        code, _, err = run(capsys, *call, out)
        assert (code, "--out: " in err, "\n" in err) == (2, True, False), err


def test_a_fitted_field_is_not_fitted_over(model_folder, tmp_path, capsys):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"))
    assert run(capsys, "flow", "--config", config)[0] == 0
    for more in ((), ("--dry-run",)):
        code, _, err = run(capsys, "flow", "--config", config, *more)
        assert code == 2
        assert (
            "run/flow holds a fitted field, which is not written over: remove it, or choose "
            "another output_dir" in err
        )


def test_the_record_of_bad_rows_is_of_one_command_and_of_all_its_files(
    model_folder, tmp_path, capsys
):
    make_data(tmp_path)
    for name in ("train", "test"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text().replace(f"images/{name}3.png", "") + "{}\n")
    config = make_config(
        tmp_path, model_folder("qwen2_5_vl"), flow=None, eval={"every": 1, "limit": None}
    )
    for steps in (1, 2):
        more = (
            f"output_dir={tmp_path}/run",
            "data.on_bad_row=skip",
            "data.max_bad_frac=0.5",
            "train.steps=1",
            f"seed={steps}",
            "resume=true",
        )
        shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
        code, _, err = run(capsys, "train", "--config", config, *more)
        assert code == 0, err
        recorded = [
            json.loads(line)["id"]
            for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()
        ]
        assert sorted(row for row in recorded if row.endswith(":9")) == [
            f"{tmp_path}/{name}.jsonl:9" for name in ("test", "train")
        ]


@pytest.mark.parametrize("point", ["field_weights", "field_spec"])
def test_a_kill_while_a_field_is_written_leaves_none_that_looks_finished(
    theirs, model_folder, tmp_path, point
):
    arguments = (
        "import-flow",
        str(theirs),
        "--model",
        model_folder("qwen2", hidden=128),
        "--out",
        str(tmp_path / "ours"),
    )
    killed = cli(*arguments, "--context", "token_pre", fault=f"{point}:1:kill")
    assert killed.returncode == -9 and not (tmp_path / "ours/flow_config.json").exists()
    assert cli(*arguments, "--context", "token_pre").returncode == 0
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "flow.safetensors",
        "flow_config.json",
    }


def test_a_mismatched_field_is_refused_before_anything_is_loaded(tmp_path, capsys):
    make_data(tmp_path)
    config = make_config(tmp_path, "no/such-model", data={"train": str(tmp_path / "train.jsonl")})
    field = tmp_path / "field"
    field.mkdir()
    spec = {"context": ["token_pre", "identity"], "shift": [1, 0], "times": [0.8], "depth": 1}
    (field / "flow_config.json").write_text(json.dumps(spec))
    for more in (["--dry-run"], []):
        for setting, message in (
            ("flow.network.depth=2", "depth: checkpoint 1, run 2"),
            ("flow.times=[0.5,0.8]", "times: checkpoint 0.8, run 0.5+0.8"),
            ("flow.shift=2", "shift: checkpoint 1+0, run 2+0"),
            ("flow.context=token_pre", "context: checkpoint token_pre+identity, run token_pre"),
        ):
            overrides = [f"flow.checkpoint={field}", "flow.context=token_pre+identity", setting]
            code, _, err = run(capsys, "train", "--config", config, *more, *overrides)
            assert (code, message in err) == (2, True), err
    (field / "flow_config.json").write_text("[]")
    code, _, err = run(capsys, "train", "--config", config, "--dry-run", f"flow.checkpoint={field}")
    assert (code, "is not a flow spec" in err) == (2, True)


def test_what_cannot_be_imported_stops_with_one_line(theirs, model_folder, tmp_path, capsys):
    fitting, smaller = model_folder("qwen2", hidden=128), model_folder("qwen2")

    def refused(
        source=theirs, model=fitting, out=tmp_path / "ours", more=("--context", "token_post")
    ):
        code, printed, err = run(
            capsys, "import-flow", source, "--model", model, "--out", out, *more
        )
        assert (code, printed) == (2, "")
        assert err.startswith("rlfr-vlm import-flow: ") and "\n" not in err
        assert not (tmp_path / "ours").exists()
        return err

    assert "--context token_pre" in refused(more=())
    assert f"reads latents of size 128, but {smaller} has hidden_size 64" in refused(model=smaller)
    assert "--model: the config of" in refused(model=tmp_path / "nowhere")
    assert "--out: " in refused(out=theirs / "flow_model.bin")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    assert "model type `bert` is not known" in refused(model=tmp_path / "other")
    for text in ("{", "[]", '{"model_type": "qwen2", "hidden_size": "x"}'):
        (tmp_path / "other/config.json").write_text(text)
        assert "--model: the config of" in refused(model=tmp_path / "other")
    whole = (theirs / "flow_model.bin").read_bytes()
    (theirs / "flow_model.bin").write_bytes(whole[: len(whole) // 2])
    assert "flow_model.bin is not a plain torch file" in refused()
    torch.save(
        {"model.input_proj.weight": Malicious(tmp_path / "proof")}, theirs / "flow_model.bin"
    )
    assert "nothing in it was run (it asks for GLOBAL posix.system)" in refused()
    assert not (tmp_path / "proof").exists()


def test_what_cannot_be_exported_stops_with_one_line(theirs, tmp_path, capsys):
    code, _, err = run(capsys, "export-flow", theirs, "--out", tmp_path / "back")
    assert code == 2
    assert "flow_config.json: No such file" in err
    assert not (tmp_path / "back").exists()


def test_a_run_takes_an_imported_field_and_refuses_one_of_another_side(
    theirs, model_folder, tmp_path, capsys
):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"))
    (theirs / "flow_config.json").write_text(
        json.dumps({"flow_context_mode": "token_post", "flow_shift": "1"})
    )
    field = tmp_path / "ours"
    code, _, err = run(
        capsys, "import-flow", theirs, "--model", model_folder("qwen2_5_vl"), "--out", field
    )
    assert code == 0 and "context token_post (flow_config.json)" in err
    assert (
        "the released RL configs say token_post of fields that were fitted at token_pre; --context "
        "token_pre reads it as fitted" in err
    )
    code, _, err = run(
        capsys, "train", "--config", config, f"flow.checkpoint={field}", "train.steps=1"
    )
    assert code == 2
    assert "context: checkpoint token_post, run token_pre" in err
    code, _, err = run(
        capsys,
        "train",
        "--config",
        config,
        f"flow.checkpoint={field}",
        "flow.context=token_post",
        "train.steps=1",
    )
    assert code == 0, err
    saved = FlowField.load(tmp_path / "run/checkpoints/global_step_1/flow", read_spec(field))
    assert not torch.equal(
        saved.network.cond_embed.weight, load_file(field / "flow.safetensors")["cond_embed.weight"]
    )
