"""import-flow and export-flow as a user meets them, and a run on an imported field."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlfr_vlm.cli import main
from rlfr_vlm.commands import identity_from_config
from rlfr_vlm.config import ModelConfig
from rlfr_vlm.flow.field import FlowField, read_spec
from rlfr_vlm.models.policy import Policy
from tests.flow.test_official import Malicious, official_state
from tests.runs import make_config, make_data

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
    state = {name: tensor if name.endswith("freqs") else tensor / 10 for name, tensor in official_state(h=128, depth=1).items()}
    (tmp_path / "theirs").mkdir()
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "theirs/flow_model.bin")
    return tmp_path / "theirs"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_says_what_the_loaded_policy_says(model_folder, family):
    folder = model_folder(family)
    policy = Policy(ModelConfig(path=folder, dtype="float32", device="cpu"))
    assert identity_from_config(folder) == policy.identity | {"fingerprint": ""}


def test_import_reads_no_weights_and_export_gives_the_file_back(theirs, model_folder, tmp_path, capsys):
    model = tmp_path / "config-only"
    model.mkdir()
    shutil.copy(f"{model_folder('qwen2', hidden=128)}/config.json", model)
    arguments = ("import-flow", theirs, "--model", model, "--out", tmp_path / "ours", "--context", "token_pre+token_post")
    code, out, err = run(capsys, *arguments, "--shift", "1+2", "--times", "0.5+0.8")
    assert (code, out) == (0, str(tmp_path / "ours")), err
    assert "context token_pre+token_post (--context); shift 1+2 (--shift); layers 1+2+3 (default 0.25+0.5+0.75); times 0.5+0.8" in err
    spec = json.loads((tmp_path / "ours/flow_config.json").read_text())
    assert (spec["depth"], spec["backbone"]["fingerprint"], spec["backbone"]["hidden_size"]) == (1, "", 128)
    code, out, err = run(capsys, "export-flow", tmp_path / "ours", "--out", tmp_path / "back/field.bin", "--dtype", "bfloat16")
    assert (code, out) == (0, str(tmp_path / "back/field.bin")), err
    assert "flow_context_mode token_pre+token_post, flow_shift 1+2" in err
    original, back = (torch.load(path, weights_only=True) for path in (theirs / "flow_model.bin", out))
    assert original.keys() == back.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], original[name]) for name in original)
    code, out, _ = run(capsys, "export-flow", tmp_path / "ours", "--out", tmp_path)
    assert (code, out) == (0, str(tmp_path / "flow_model.bin"))
    assert {tensor.dtype for tensor in torch.load(out, weights_only=True).values()} == {torch.float32}


def test_what_cannot_be_imported_stops_with_one_line(theirs, model_folder, tmp_path, capsys):
    fitting, smaller = model_folder("qwen2", hidden=128), model_folder("qwen2")

    def refused(source=theirs, model=fitting, out=tmp_path / "ours", more=("--context", "token_post")):
        code, printed, err = run(capsys, "import-flow", source, "--model", model, "--out", out, *more)
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
    torch.save({"model.input_proj.weight": Malicious(tmp_path / "proof")}, theirs / "flow_model.bin")
    assert "nothing in it was run (it asks for GLOBAL posix.system)" in refused()
    assert not (tmp_path / "proof").exists()


def test_what_cannot_be_exported_stops_with_one_line(theirs, tmp_path, capsys):
    code, _, err = run(capsys, "export-flow", theirs, "--out", tmp_path / "back")
    assert code == 2
    assert "flow_config.json: No such file" in err
    assert not (tmp_path / "back").exists()


def test_a_run_takes_an_imported_field_and_refuses_one_of_another_side(theirs, model_folder, tmp_path, capsys):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"))
    (theirs / "flow_config.json").write_text(json.dumps({"flow_context_mode": "token_post", "flow_shift": "1"}))
    field = tmp_path / "ours"
    code, _, err = run(capsys, "import-flow", theirs, "--model", model_folder("qwen2_5_vl"), "--out", field)
    assert code == 0 and "context token_post (flow_config.json)" in err
    code, _, err = run(capsys, "train", "--config", config, f"flow.checkpoint={field}", "train.steps=1")
    assert code == 2
    assert "context: checkpoint ('token_post',), run ('token_pre',)" in err
    code, _, err = run(capsys, "train", "--config", config, f"flow.checkpoint={field}", "flow.context=token_post", "train.steps=1")
    assert code == 0, err
    saved = FlowField.load(tmp_path / "run/checkpoints/global_step_1/flow", read_spec(field))
    assert not torch.equal(saved.network.cond_embed.weight, load_file(field / "flow.safetensors")["cond_embed.weight"])
