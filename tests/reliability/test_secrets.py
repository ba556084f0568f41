"""R15: keys in the environment are found in nothing that a run writes, says or starts; what a
stranger made runs no code here.
"""

import base64
import gzip
import json
import os
import pickle
import re
import shutil
import threading
import zlib
from pathlib import Path

import pytest
import torch

from rlfr_vlm.cli import main
from rlfr_vlm.launch.processes import processes_with
from rlfr_vlm.storage import checkpoint
from tests.launch.test_ray import Launched
from tests.runs import cli, make_config, make_data, make_text_data

KEYS = {
    "WANDB_API_KEY": "5e171e1c0ffee0ddba11cafef00d5e17deadbeef",  # of the form that W&B accepts
    "OPENAI_API_KEY": "sk-sentinel-4b1d-openai",
    "HF_TOKEN": "hf_sentinelsentinelsentinelsentinel",
    "RLFR_TEST_JUDGE_KEY": "sentinel-judge-key-77aa",
    "AWS_SECRET_ACCESS_KEY": "sentinel/aws/9f8e7d",
    "TRACKIO_WRITE_TOKEN": "sentinel-trackio-3c2b",
}


def forms(key: str) -> list[bytes]:
    """A key as it is, and as it might be packed."""
    raw = key.encode()
    return [
        raw,
        base64.b64encode(raw).rstrip(b"=")[:-1],
        raw.hex().encode(),
        json.dumps(key).encode()[1:-1],
        key[4:-4].encode(),
    ]


def unpacked(content: bytes) -> list[bytes]:
    """A file's content, and what it is the packed form of."""
    found = [content]
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            found.append(unpack(content))
        except (OSError, EOFError, zlib.error):
            continue
    return found


def hits(texts: dict[str, bytes]) -> list[str]:
    """Where which key stands."""
    wanted = {name: forms(key) for name, key in KEYS.items()}
    return [
        f"{name} in {place}"
        for place, content in texts.items()
        for part in unpacked(content)
        for name, found in wanted.items()
        if any(form in part for form in found)
    ]


def contents(*folders: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


class Lines:
    """The command lines of all processes of a run, from its start to its end."""

    def __init__(self, mark):
        self.mark, self.found, self._ended = mark, {}, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._ended.wait(0.1):
            for pid, _ in processes_with(self.mark):
                try:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                self.found[
                    f"command line {len(self.found)}" if line not in self.found.values() else ""
                ] = line

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def test_negative_control_a_key_is_found_in_any_form(tmp_path):
    for number, form in enumerate(
        [*forms(KEYS["OPENAI_API_KEY"]), gzip.compress(KEYS["HF_TOKEN"].encode())]
    ):
        (tmp_path / "file").write_bytes(b"x" * 100 + form + b"y" if number < 5 else form)
        assert len(hits(contents(tmp_path))) == 1, form


@pytest.mark.reliability
@pytest.mark.parametrize("launcher", ["process", "ray"])
def test_keys_are_found_in_nothing_that_a_run_leaves(model_folder, tmp_path, launcher, figure):
    make_data(tmp_path)
    trackers = {"trackers": ["tensorboard", "wandb", "trackio"], "steps": 2, "save_steps": 2}
    more = {"ray": {"engines": 1}, "launcher": "ray"} if launcher == "ray" else {}
    config = make_config(
        tmp_path, model_folder("qwen2_5_vl"), train=trackers, eval={"every": 2}, **more
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {**KEYS, "HOME": str(home), "WANDB_MODE": "offline"}
    with Launched(config, tmp_path / "run", **environment) as run, Lines(run.mark) as lines:
        assert run.end() == 0, run.text[-3000:]
    with (
        Launched(
            config, tmp_path / "crashed", RLFR_FAULT="backward:1:raise", **environment
        ) as crash,
        Lines(crash.mark) as more_lines,
    ):
        assert crash.end() != 0 and "fault injected" in crash.text
    assert (
        list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
        and (tmp_path / "run/trackio").is_dir()
    )
    found = contents(tmp_path) | lines.found | more_lines.found
    assert len(lines.found) > 2 and hits(found) == []
    figure(
        "R15",
        f"{len(KEYS)} keys in 5 forms, launcher={launcher}: 0 hits in {len(found)} files, logs, "
        "command lines and W&B's records",
    )


# What strangers make.


class Marks:
    """Writes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


MARKING = "import os\nos.makedirs({!r}, exist_ok=True)\n"
REMOTE_CLASSES = """
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast

class EvilConfig(Qwen2Config):
    pass

class EvilModel(Qwen2ForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(Qwen2TokenizerFast):
    pass
"""


@pytest.fixture
def stranger(model_folder, tmp_path):
    """A copy of a good model and data, to be spoilt; the marker that must not appear; and the
    command that reads them.
    """
    make_text_data(tmp_path)
    model = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "model"))
    config = make_config(tmp_path, str(model), flow=None, train={"steps": 1, "save_steps": 1})
    return model, tmp_path / "MARKER", config


def refused_or_harmless(capsys, *arguments) -> str:
    """Run a command in this process; it may work or be refused, and what it said is returned."""
    try:
        main([*map(str, arguments)])
    except SystemExit as end:
        assert end.code in (0, 2, 4), end.code
    return capsys.readouterr().err


def edit(path: Path, **values) -> None:
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values})
    )


def remote_code(model: Path, marker: Path) -> None:
    code = MARKING.format(str(marker)) + REMOTE_CLASSES
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (model / name).write_text(code)
    auto = {
        "AutoConfig": "configuration_x.EvilConfig",
        "AutoModelForCausalLM": "modeling_x.EvilModel",
    }
    edit(model / "config.json", auto_map=auto)
    edit(
        model / "tokenizer_config.json",
        auto_map={
            "AutoTokenizer": ["tokenization_x.EvilTokenizer", "tokenization_x.EvilTokenizer"]
        },
    )


def unknown_type(model: Path, marker: Path) -> None:
    remote_code(model, marker)
    edit(model / "config.json", model_type="evil")


def pickled_weights(model: Path, marker: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    torch.save({"model.embed_tokens.weight": Marks(marker)}, model / "pytorch_model.bin")


def template(model: Path, marker: Path) -> None:
    evil = "{{ cycler.__init__.__globals__.os.makedirs('" + str(marker) + "') }}"
    (model / "chat_template.jinja").write_text(evil)
    edit(model / "tokenizer_config.json", chat_template=evil)


@pytest.mark.parametrize("spoil", [remote_code, unknown_type, pickled_weights, template])
def test_a_strangers_model_runs_no_code(stranger, capsys, spoil):
    model, marker, config = stranger
    spoil(model, marker)
    refused_or_harmless(capsys, "train", "--config", config)
    assert not marker.exists()
    assert not list((config.parent / "run").rglob("*.py"))  # nor is it handed on


def test_negative_control_what_was_asked_for_runs(stranger, capsys):
    model, marker, config = stranger
    remote_code(model, marker)
    refused_or_harmless(capsys, "train", "--config", config, "model.trust_remote_code=true")
    assert marker.exists()


@pytest.mark.parametrize("name", ["data.py", "data/data.py", "rows.pkl", "rows.pt", "rows.npy"])
def test_a_strangers_data_runs_no_code(stranger, capsys, name):
    _, marker, config = stranger
    path = config.parent / "theirs" / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".py":
        path.write_text(MARKING.format(str(marker)))
    elif path.suffix == ".pt":
        torch.save([Marks(marker)], path)
    else:
        path.write_bytes(pickle.dumps([Marks(marker)]))
    source = path.parent if "/" in name else path
    said = refused_or_harmless(capsys, "train", "--config", config, f"data.train={source}")
    assert said.startswith("rlfr-vlm train: ") and "Traceback" not in said, said
    assert not marker.exists()


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_strangers_field_runs_no_code(stranger, capsys, form):
    """More forms: tests/flow/test_official.py."""
    model, marker, config = stranger
    path = config.parent / "flow_model.bin"
    if form == "torch":
        torch.save({"model.zz": Marks(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"model.zz": Marks(marker)}))
    said = refused_or_harmless(
        capsys,
        "import-flow",
        path,
        "--model",
        model,
        "--out",
        config.parent / "field",
        "--context",
        "token_pre",
    )
    assert "nothing in it was run" in said and not marker.exists()
    with pytest.raises(FileExistsError) if marker.exists() else pytest.MonkeyPatch.context():
        pickle.loads(pickle.dumps(Marks(marker)))
    assert marker.exists(), "the file would have run it"


def test_a_strangers_checkpoint_runs_no_code(stranger, capsys):
    """Its manifest fits what is in it, as whoever wrote it can see to."""
    _, marker, config = stranger
    refused_or_harmless(capsys, "train", "--config", config)
    folder = config.parent / "run/checkpoints/global_step_1"
    torch.save({"python": Marks(marker)}, folder / "rank_0000/rng.pt")
    content = json.loads((folder / "manifest.json").read_text())
    entry = content["files"]["rank_0000/rng.pt"]
    entry |= {
        "size": (folder / "rank_0000/rng.pt").stat().st_size,
        "sha256": checkpoint.sha256(folder / "rank_0000/rng.pt"),
    }
    content["sha256"] = checkpoint._digest(
        {name: value for name, value in content.items() if name != "sha256"}
    )
    (folder / "manifest.json").write_text(json.dumps(content))
    checkpoint.verify(folder)
    said = refused_or_harmless(capsys, "train", "--config", config)
    assert re.search(r"rng\.pt is not .*nothing in it was run", said) and not marker.exists(), said


@pytest.mark.reliability
def test_nothing_of_a_strangers_runs_in_the_command_itself(stranger, figure):
    model, marker, config = stranger
    for spoil in (remote_code, template, unknown_type):
        spoil(model, marker)
        for verb in ("train", "validate"):
            done = cli(
                verb, "--config", str(config), f"output_dir={config.parent / spoil.__name__}"
            )
            assert done.returncode == 2 or spoil is remote_code, done.stderr[-2000:]
            assert not marker.exists() and "Traceback" not in done.stderr, done.stderr[-2000:]
    figure(
        "R15",
        "models with code, pickled weights or a hostile template, 5 kinds of data, fields, a "
        "checkpoint: 0 marker files",
    )
