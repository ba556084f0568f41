"""Published flow checkpoints, built here from their key list: read exactly, written back exactly,
and refused for whatever is wrong.
"""

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import velocity_deviation
from rlfr_vlm.flow.official import export_field, import_field
from rlfr_vlm.flow.official_files import network_shapes
from rlfr_vlm.flow.spec import FlowSpec, check_spec

SIZE, DEPTH = 8, 2
BACKBONE = {
    "model_type": "qwen2",
    "hidden_size": SIZE,
    "num_layers": 28,
    "rms_norm_eps": 1e-6,
    "fingerprint": "",
}
POST = {"context": "token_post"}


def official_shapes(h=SIZE, depth=DEPTH):
    """The published key list: 19 + 7 * depth tensors."""
    shapes = {
        "input_proj.weight": (h, h),
        "input_proj.bias": (h,),
        "cond_embed.weight": (h, h),
        "cond_embed.bias": (h,),
    }
    for name in ("time_embed", "layer_embed"):
        shapes |= {
            f"{name}.freqs": (1, 128),
            f"{name}.mlp.0.weight": (h, 256),
            f"{name}.mlp.0.bias": (h,),
        }
        shapes |= {f"{name}.mlp.2.weight": (h, h), f"{name}.mlp.2.bias": (h,)}
    for b in range(depth):
        block = f"res_blocks.{b}"
        shapes |= {
            f"{block}.in_ln.weight": (h,),
            f"{block}.mlp.0.weight": (h, h),
            f"{block}.mlp.0.bias": (h,),
        }
        shapes |= {f"{block}.mlp.2.weight": (h, h), f"{block}.mlp.2.bias": (h,)}
        shapes |= {
            f"{block}.adaLN_modulation.1.weight": (3 * h, h),
            f"{block}.adaLN_modulation.1.bias": (3 * h,),
        }
    shapes |= {
        "final_layer.norm_final.weight": (h,),
        "final_layer.linear.weight": (h, h),
        "final_layer.linear.bias": (h,),
    }
    return shapes | {
        "final_layer.adaLN_modulation.1.weight": (2 * h, h),
        "final_layer.adaLN_modulation.1.bias": (2 * h,),
    }


def official_state(prefix="model.", dtype=torch.float32, h=SIZE, depth=DEPTH):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in official_shapes(h, depth).items()
    }
    freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)[None]
    state |= {"time_embed.freqs": freqs.clone(), "layer_embed.freqs": freqs.clone()}
    return {prefix + name: tensor.to(dtype) for name, tensor in state.items()}


def written(folder, state, name="flow_model.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    return folder / name


def read(path, given=POST, backbone=BACKBONE):
    return import_field(Path(path), backbone, given, "the-model")[0]


def refused(path, given=POST):
    with pytest.raises(UserError) as error:
        read(path, given)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_key_list_is_our_networks():
    assert len(official_shapes()) == 19 + 7 * DEPTH
    assert official_shapes() == network_shapes(SIZE, DEPTH)


@pytest.mark.parametrize("prefix", ["", "model.", "flow.model.", "flow."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_prefix_and_dtype_is_read_exactly_and_written_back_exactly(tmp_path, prefix, dtype):
    state = official_state(prefix, dtype)
    field = read(written(tmp_path / "theirs", state))
    field.save(tmp_path / "ours")
    stored = load_file(tmp_path / "ours/flow.safetensors")
    assert stored.keys() == official_shapes().keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[prefix + name].float())
    for option in (None, dtype):
        (tmp_path / "back/flow_model.bin").unlink(missing_ok=True)
        back = torch.load(
            export_field(tmp_path / "ours", tmp_path / "back", option), weights_only=True
        )
        assert list(back) == [f"model.{name}" for name in network_shapes(SIZE, DEPTH)]
        for name in official_shapes():
            assert back[f"model.{name}"].dtype == (option or torch.float32)
            assert torch.equal(
                back[f"model.{name}"], state[prefix + name].to(option or torch.float32)
            )
    assert (tmp_path / "back/flow_model.bin").stat().st_size < 3 * sum(
        t.numel() * 4 for t in stored.values()
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_the_flow_part_of_an_offline_fit(tmp_path, zipped):
    state = {
        "pretrained_model.model.embed_tokens.weight": torch.ones(4, 4),
        "pretrained_model.input_proj.weight": torch.ones(2),
    }
    state |= official_state("flow.model.", torch.bfloat16)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    field = read(tmp_path)
    assert torch.equal(
        field.network.cond_embed.weight, state["flow.model.cond_embed.weight"].float()
    )


def sharded(folder, **places):
    state = official_state("flow.model.")
    half = len(state) // 2
    parts = {"a.bin": dict(list(state.items())[:half]), "b.bin": dict(list(state.items())[half:])}
    for name, part in parts.items():
        written(folder, part | {"pretrained_model.w": torch.ones(1)}, name)
    weight_map = (
        {key: name for name, part in parts.items() for key in part}
        | {"pretrained_model.x": "unread.bin"}
        | places
    )
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return state


def test_only_shards_with_flow_keys_are_read(tmp_path):
    state = sharded(tmp_path)
    (tmp_path / "unread.bin").write_bytes(b"not a torch file")
    for source in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        assert torch.equal(
            read(source).network.final_layer.linear.bias,
            state["flow.model.final_layer.linear.bias"],
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "pytorch_model.bin.index.json is not an index of shards"),
        ("{", "pytorch_model.bin.index.json is not an index of shards"),
        ('{"weight_map": {"pretrained_model.x": "a.bin"}}', "names no such key"),
        ('{"weight_map": {"flow.model.x": "../a.bin"}}', "names ['../a.bin']"),
        ('{"weight_map": {"flow.model.x": "gone.bin"}}', "gone.bin does not exist"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, text, message):
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert message in refused(tmp_path)


def test_rounded_frequencies_are_kept_as_stored(tmp_path):
    state = official_state(dtype=torch.bfloat16)
    found = read(written(tmp_path, state)).network.time_embed.freqs
    assert torch.equal(found, state["model.time_embed.freqs"].float())
    assert not torch.equal(found, VelocityNet(SIZE, DEPTH).time_embed.freqs)


def test_the_imported_network_gives_the_golden_deviations(tmp_path):
    """Golden vector H1: weights 0.1 sin(i + 1 + 0.7 j) over their sorted names."""
    state = official_state(h=4, depth=1)
    names = sorted(name for name in state if not name.endswith("freqs"))
    for j, name in enumerate(names):
        i = torch.arange(state[name].numel(), dtype=torch.float64)
        value = 0.1 * torch.sin(i + 1 + 0.7 * j) + name.endswith(
            ("in_ln.weight", "norm_final.weight")
        )
        state[name] = value.view(state[name].shape).float()
    network = read(written(tmp_path, state), backbone=BACKBONE | {"hidden_size": 4}).network
    target, noise = (
        torch.tensor([[1, 2, -1, 0.5], [0.2, -0.4, 0.6, -0.8]]),
        torch.tensor([[0.5, -1, 1, 0], [1, 0, -1, 0.5]]),
    )
    context = torch.tensor([[0.3, -0.1, 0.7, 0.2], [1, 2, -1, 0.5]])
    found = velocity_deviation(
        network, target, context, noise, torch.full((2,), 0.8), torch.full((2,), 0.25)
    )
    assert found.tolist() == pytest.approx([3.812174, 1.103808], abs=1e-5)


def test_an_imported_field_scores_as_the_network_it_was_written_from(tmp_path):
    torch.manual_seed(0)
    network = VelocityNet(SIZE, DEPTH)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    path = written(
        tmp_path / "theirs",
        {f"model.{name}": tensor for name, tensor in network.state_dict().items()},
    )
    read(path).save(tmp_path / "ours")
    spec = read(path).spec
    field = FlowField.load(tmp_path / "ours", spec)
    target, context = torch.arange(2, 12), torch.stack([torch.arange(1, 11)])
    latents = Latents(
        torch.randn(3, 12, SIZE), target, context, torch.ones(1, 10, dtype=torch.bool)
    )
    expected = FlowField(spec, network).score(latents, [6, 4], [1, 2])
    assert expected.std() > 0
    assert torch.equal(field.score(latents, [6, 4], [1, 2]), expected)
    assert all(parameter.requires_grad for parameter in field.network.parameters())


def test_the_spec_says_what_was_given_and_the_defaults(tmp_path):
    path = written(tmp_path, official_state())
    spec = read(path, {"context": "token_pre+token_post", "shift": None}).spec
    assert spec == FlowSpec(
        (7, 14, 21), 28, ("token_pre", "token_post"), (1, 1), (0.8,), DEPTH, BACKBONE
    )
    spec = read(
        path,
        {"context": "identity + token_pre", "shift": "1+2", "layers": "0.5+1", "times": "0.5+0.8"},
    ).spec
    assert (spec.sides, spec.layers, spec.times) == (
        (("identity", 0), ("token_pre", 2)),
        (14, 27),
        (0.5, 0.8),
    )


def test_settings_are_found_in_configs_beside_the_file(tmp_path):
    folder = tmp_path / "global_step50_hf_flow"
    path = written(folder, official_state())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.json").write_text("[1")
    (folder / "config.json").write_text(
        json.dumps(
            {"flow_context_mode": "token_post", "flow_shift": "2", "hook_layers_percentile": "0.5"}
        )
    )
    for source in (folder, path):
        field, origins = import_field(source, BACKBONE, {}, "m")
        assert (field.spec.sides, field.spec.layers) == ((("token_post", 2),), (14,))
        assert origins == {
            "context": "config.json",
            "shift": "config.json",
            "layers": "config.json",
            "times": "default 0.8",
        }
    (folder / "fit.yaml").write_text(
        "hook_layers_percentile: 0.5\nflow_context_mode: token_pre\nrewarding_timesteps: 0.5+0.8\n"
    )
    differ = (
        "context is ['token_post'] in config.json, but ['token_pre'] in fit.yaml; name the "
        "right one with --context"
    )
    assert differ in refused(folder, {})
    field, origins = import_field(folder, BACKBONE, {"context": "token_pre"}, "m")
    assert (field.spec.context, field.spec.times, origins["context"]) == (
        ("token_pre",),
        (0.5, 0.8),
        "--context",
    )


def test_a_side_that_nothing_names_is_asked_for(tmp_path):
    message = refused(written(tmp_path, official_state()), {})
    assert (
        "offline fitting used token_pre" in message
        and "RL configs token_post" in message
        and "--context token_pre" in message
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"context": "layer_post"},
            "--context: Input should be 'token_pre', 'token_post' or 'identity' (given: "
            "layer_post)",
        ),
        ({"context": "token_pre", "shift": "x"}, "--shift: Input should be a valid integer"),
        ({"context": "token_pre", "shift": "1+2"}, "--shift: 2 values for 1 contexts"),
        ({"context": "token_pre", "layers": "0.5+0.25"}, "must rise"),
        ({"context": "token_pre", "layers": "0.5+0.51"}, "one of them twice"),
        ({"context": "token_pre", "times": "1"}, "--times: 1.0 is not between 0"),
        ({"context": "identity", "shift": "3"}, "leave --shift out"),
        (
            {"context": "token_pre", "times": "+".join(["0.8"] * 65)},
            "--times is a list of 65 values, neither a value nor a flat list",
        ),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, message):
    assert message in refused(written(tmp_path, official_state()), given)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b}\n  <<: [*{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", BOMB + "flow_shift: *k", "c.yaml has YAML aliases and is not read"),
        ("c.yaml", MERGES * 3 + "flow_shift: 1", "c.yaml has YAML aliases and is not read"),
        ("c.yaml", "flow_shift: [1, [2]]", "shift in"),
        ("c.yaml", "flow_shift: {a: 1}", "is dict, neither a value nor a flat list of a few"),
        ("c.json", '{"flow_shift": [null]}', "is a list with NoneType, neither a value"),
        ("c.json", '{"flow_shift": []}', "is a list of 0 values"),
        ("c.json", '{"flow_shift": true}', "is bool"),
        (
            "c.json",
            '{"flow_shift": "1+x"}',
            "shift (c.json): Input should be a valid integer, unable to parse string as an integer "
            "(given: x)",
        ),
        ("c.json", '{"flow_shift": "' + "x" * 5000 + '"}', "(given: " + "x" * 80 + "...)"),
    ],
)
def test_settings_in_a_config_are_values_or_flat_lists(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    found = refused(written(tmp_path, official_state()))
    assert message in found and len(found) < 1000


def test_a_config_that_names_no_setting_may_hold_anything(tmp_path):
    (tmp_path / "compose.yaml").write_text(BOMB)
    assert read(written(tmp_path, official_state())).spec.shift == (1,)


def drop(state, name):
    return {key: value for key, value in state.items() if key != name}


def spoiled(name, value):
    return official_state() | {f"model.{name}": value}


NAN = torch.full((SIZE,), float("nan"))
BAD_STATES = {
    "missing": (
        drop(official_state(), "model.res_blocks.1.mlp.2.bias"),
        "1 missing keys ['model.res_blocks.1.mlp.2.bias'], 0 unexpected",
    ),
    "missing entry": (
        drop(official_state(), "model.input_proj.weight"),
        "1 missing keys ['model.input_proj.weight']",
    ),
    "extra": (
        spoiled("res_blocks.0.gate", torch.ones(1)),
        "1 unexpected keys ['model.res_blocks.0.gate']",
    ),
    "extra outside": (official_state() | {"optimizer": 1}, "1 unexpected keys ['optimizer']"),
    "extra in flow": (
        official_state("flow.model.") | {"flow.other": torch.ones(1)},
        "1 unexpected keys ['flow.other']",
    ),
    "gap in blocks": (
        spoiled("res_blocks.999999999.in_ln.weight", torch.ones(SIZE)),
        "res_blocks.999999999.in_ln.weight",
    ),
    "no blocks": (
        official_state(depth=0),
        "7 missing keys ['model.res_blocks.0.adaLN_modulation.1.bias'",
    ),
    "mis-shaped": (
        spoiled("cond_embed.weight", torch.ones(SIZE, 9)),
        "`model.cond_embed.weight` is (8, 9), of size 8 it must be (8, 8)",
    ),
    "flat entry": (
        spoiled("input_proj.weight", torch.ones(SIZE)),
        "`model.input_proj.weight` is (8,), of size 8 it must be (8, 8)",
    ),
    "scalar": (spoiled("cond_embed.bias", torch.tensor(1.0)), "`model.cond_embed.bias` is ()"),
    "huge": (
        spoiled("cond_embed.bias", torch.ones(1).expand(10**15)),
        "`model.cond_embed.bias` is (1000000000000000,)",
    ),
    "width": (
        spoiled("input_proj.weight", torch.ones(12, SIZE)),
        "`model.input_proj.weight` is (12, 8): only a network as wide",
    ),
    "other size": (
        official_state(h=12),
        "`model.input_proj.weight` reads latents of size 12, but the-model has hidden_size 8",
    ),
    "integers": (
        spoiled("cond_embed.bias", torch.ones(SIZE, dtype=torch.int64)),
        "`model.cond_embed.bias` is torch.int64",
    ),
    "doubles": (
        spoiled("cond_embed.bias", torch.ones(SIZE).double()),
        "`model.cond_embed.bias` is torch.float64",
    ),
    "sparse": (
        spoiled("cond_embed.bias", torch.ones(SIZE).to_sparse()),
        "`model.cond_embed.bias` is torch.float32 in the layout sparse_coo, not a plain tensor",
    ),
    "no data": (
        spoiled("cond_embed.bias", torch.ones(SIZE, device="meta")),
        "`model.cond_embed.bias` is torch.float32 without data (meta)",
    ),
    "long key": (spoiled("x" * 10**6, torch.ones(1)), f"1 unexpected keys ['model.{'x' * 74}...']"),
    "not a tensor": (spoiled("cond_embed.bias", [1.0] * SIZE), "`model.cond_embed.bias` is list"),
    "NaN": (spoiled("cond_embed.bias", NAN), "`model.cond_embed.bias` holds NaN"),
    "infinite": (
        spoiled("time_embed.freqs", torch.full((1, 128), math.inf)),
        "`model.time_embed.freqs` holds NaN or infinite",
    ),
    "a model": ({"model.layers.0.mlp.weight": torch.ones(1)}, "holds no flow network"),
    "a list": ([torch.ones(1)], "holds a list, not a dict of named tensors"),
    "a tensor": (torch.ones(1), "holds a Tensor, not a dict"),
    "empty dict": ({}, "not a dict of named tensors with one in it"),
    "numbered": ({0: torch.ones(1)}, "holds a dict, not a dict of named tensors"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_dict_that_is_not_a_flow_network_is_refused_by_file_and_key(tmp_path, case):
    state, message = BAD_STATES[case]
    path = written(tmp_path, state)
    found = refused(path)
    assert str(path) in found and message in found


def test_damaged_files_are_refused_by_name(tmp_path):
    path = written(tmp_path, official_state())
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        assert f"{path} is not a plain torch file" in refused(path)
    torch.save(official_state(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not a plain torch file" in refused(path)
    path.write_text("{}")
    assert f"{path} is not a plain torch file" in refused(path)
    save_file(official_state(), path)
    assert f"{path} is not a plain torch file" in refused(path)


def test_packed_archives_and_stand_ins_are_named(tmp_path):
    path = written(tmp_path, official_state())
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    found = refused(tmp_path / "packed.bin")
    assert "is compressed, which no torch file is; nothing in it was read" in found
    for text, message in (
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
            "is a Git LFS pointer and not the file itself",
        ),
        ("\n<!DOCTYPE html><html>", "is a web page"),
        ("<html lang=en>", "is a web page"),
    ):
        path.write_text(text)
        assert f"{path} {message}" in refused(path)


def test_flipped_bytes_never_crash(tmp_path):
    path = written(tmp_path, official_state(), "flow_model.bin")
    whole = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    refusals = 0
    for place in torch.randint(len(whole), (60,), generator=generator).tolist() + list(
        range(0, 4000, 100)
    ):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read(path)
        except UserError as error:
            refusals += str(path) in str(error)
    assert refusals > 0


class Malicious:
    """Runs a shell command where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "key"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, form):
    proof, path = tmp_path / "proof", tmp_path / "flow_model.bin"
    state = official_state() | {"model.zz": Malicious(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model.zz": Malicious(proof)}, protocol=2))
    elif form == "key":
        torch.save({Malicious(proof): 1}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(path)
    assert f"{path} is not a plain torch file of tensors, and nothing in it was run" in message
    assert "weights_only" not in message
    assert not proof.exists()
    if form != "key":
        assert "posix.system" in message
        torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(
            path.read_bytes()
        )
        assert proof.exists(), "the file would have run it"


def test_sources_without_a_checkpoint(tmp_path):
    assert "nothing does not exist" in refused(tmp_path / "nothing")
    assert (
        "holds none of flow_model.bin, pytorch_model.bin, pytorch_model.bin.index.json"
        in refused(tmp_path)
    )
    save_file(official_state(), tmp_path / "model.safetensors")
    assert "holds none of flow_model.bin" in refused(tmp_path)
    assert "model.safetensors is not a torch file" in refused(tmp_path / "model.safetensors")
    read(written(tmp_path / "theirs", official_state())).save(tmp_path / "ours")
    assert "flow.safetensors there is this program's own format" in refused(tmp_path / "ours")


def own_field(tmp_path):
    field = read(written(tmp_path / "theirs", official_state()))
    field.save(tmp_path / "ours")
    return tmp_path / "ours", field.spec


def test_weights_of_another_depth_than_the_spec_says_are_not_exported(tmp_path):
    folder, _ = own_field(tmp_path)
    path = folder / "flow_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": DEPTH + 1}))
    with pytest.raises(UserError, match=f"has {DEPTH} blocks, but .* says depth {DEPTH + 1}"):
        export_field(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fingerprint_is_compared_only_where_it_is_known(tmp_path):
    folder, spec = own_field(tmp_path)
    run = FlowSpec(**{**vars(spec), "backbone": BACKBONE | {"fingerprint": "abc"}})
    FlowField.load(folder, run)
    other = FlowSpec(**{**vars(spec), "backbone": BACKBONE | {"fingerprint": "def"}})
    for found, expected in ((other, run), (other, spec)):
        with pytest.raises(UserError, match=r"backbone\.fingerprint: checkpoint def, run (abc)?"):
            check_spec(found, expected, folder)
    with pytest.raises(UserError, match=r"backbone\.num_layers: checkpoint 28, run 36"):
        check_spec(
            spec, FlowSpec(**{**vars(run), "backbone": run.backbone | {"num_layers": 36}}), folder
        )


@pytest.mark.parametrize("length", [0, 5, 100, -10])
def test_our_own_truncated_weights_are_refused(tmp_path, length):
    folder, spec = own_field(tmp_path)
    path = folder / "flow.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    for call in (
        lambda: FlowField.load(folder, spec),
        lambda: export_field(folder, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"flow\.safetensors cannot be read"):
            call()
    path.unlink()
    for call in (
        lambda: FlowField.load(folder, spec),
        lambda: export_field(folder, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"flow\.safetensors"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cond_embed.bias", None, r"flow\.safetensors: (1 )?missing keys \['cond_embed\.bias'\]"),
        ("other", torch.ones(1), r"unexpected keys \['other'\]"),
        ("cond_embed.bias", torch.ones(9), r"flow\.safetensors: `cond_embed\.bias` is \(9,\)"),
    ],
)
def test_our_own_weights_that_do_not_fit_are_refused(tmp_path, name, value, message):
    folder, spec = own_field(tmp_path)
    weights = drop(load_file(folder / "flow.safetensors"), name) | (
        {} if value is None else {name: value}
    )
    save_file(weights, folder / "flow.safetensors")
    for call in (
        lambda: FlowField.load(folder, spec),
        lambda: export_field(folder, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        '"x"',
        "{}",
        "\x80",
        '{"layers": [1]}',
        "BACKBONE",
        "EXTRA",
        "SHIFT",
    ],
)
def test_json_that_is_not_our_spec_is_refused(tmp_path, text):
    folder, spec = own_field(tmp_path)
    path = folder / "flow_config.json"
    tree = json.loads(path.read_text())
    changes = {"BACKBONE": {"backbone": 5}, "EXTRA": {"other": 1}, "SHIFT": {"shift": 1}}
    path.write_bytes(
        json.dumps(tree | changes[text]).encode() if text in changes else text.encode("latin1")
    )
    with pytest.raises(UserError, match=r"flow_config\.json is not a flow spec"):
        FlowField.load(folder, spec)
