"""The command line as a user meets it: what works, and one clear line for what cannot."""

import json
import shutil
from importlib import metadata

import pytest

from rlfr_vlm import doctor
from rlfr_vlm.cli import main
from tests.runs import cli, make_config, make_data


def run(capsys, *arguments):
    """Exit code, standard output, standard error of the command line in this process."""
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    output = capsys.readouterr()
    return exited.value.code, output.out, output.err


@pytest.fixture
def run_folder(model_folder, tmp_path):
    make_data(tmp_path)
    return tmp_path, make_config(tmp_path, model_folder("qwen2_5_vl"))


def test_flow_train_and_eval_end_to_end(run_folder, capsys):
    folder, config = run_folder
    code, out, _ = run(capsys, "flow", "--config", str(config))
    assert code == 0
    field = out.strip()
    code, out, err = run(
        capsys,
        "train",
        "--config",
        str(config),
        f"flow.checkpoint={field}",
        "eval.every=2",
        "train.steps=2",
    )
    assert (code, out.strip()) == (0, str(folder / "run")), err
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert {
        "actor/pg_loss",
        "flow/loss",
        "flow/reward_mean",
        "rollout/logprob_diff_mean",
        "timing_s/step",
    } <= steps[0].keys()
    assert steps[0]["rollout/logprob_diff_mean"] < 1e-4
    assert [line["step"] for line in lines if "val/accuracy" in line] == [2]
    rollout = json.loads((folder / "run/rollouts/step_000001.jsonl").read_text().splitlines()[0])
    assert (
        len(rollout["tokens"])
        == len(rollout["advantages"])
        == len(rollout["flow_rewards"])
        == len(rollout["logprobs"])
    )
    assert (folder / "run/rollouts" / rollout["images"][0]).exists()
    assert {p.name for p in (folder / "run").iterdir()} >= {
        "config.resolved.yaml",
        "env.json",
        "tb",
        "checkpoints",
        "eval",
        "flow",
    }
    code, out, _ = run(capsys, "eval", "--config", str(config), "eval.pictures=blank")
    assert code == 0
    assert json.loads(out)["num_problems"] == 4


def test_dry_run_prints_the_resolved_config_and_loads_nothing(run_folder, capsys):
    _, config = run_folder
    code, out, _ = run(
        capsys,
        "train",
        "--config",
        str(config),
        "--dry-run",
        "model.path=/nowhere",
        "optim.lr=3e-6",
    )
    assert code == 0
    assert "lr: 3.0e-06" in out


def spoil(folder, name="train", **changes):
    path = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["images/gone.png"]}, "train.jsonl:4: images/gone.png is missing"),
        ({"images": ["images/empty.png"]}, "train.jsonl:4: images/empty.png is empty (0 bytes)"),
        ({"images": []}, "train.jsonl:4: 0 images but 1 image placeholders"),
        ({"answer": ""}, "train.jsonl:4: the answer is empty"),
        ({"answer": "\\frac{"}, "train.jsonl:4: answer"),
    ],
)
def test_bad_rows_stop_with_one_line(run_folder, capsys, changes, message):
    folder, config = run_folder
    (folder / "images/empty.png").touch()
    spoil(folder, **changes)
    code, _, err = run(capsys, "train", "--config", str(config), "data.shuffle=false")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_bad_rows_can_be_skipped(run_folder, capsys):
    folder, config = run_folder
    spoil(folder, images=["images/gone.png"])
    overrides = [
        "data.on_bad_row=skip",
        "data.max_bad_frac=0.5",
        "data.shuffle=false",
        "train.steps=2",
    ]
    code, _, err = run(capsys, "train", "--config", str(config), *overrides)
    assert code == 0, err
    recorded = [
        json.loads(line) for line in (folder / "run/bad_rows.jsonl").read_text().splitlines()
    ]
    assert [(row["kind"], "gone.png" in row["reason"]) for row in recorded] == [("image", True)]
    assert "1 bad rows were left out" in err


@pytest.mark.parametrize(
    ("name", "verb", "changes", "message"),
    [
        (
            "expert",
            "flow",
            {"images": ["images/gone.png"]},
            "expert.jsonl:4: images/gone.png is missing",
        ),
        ("expert", "flow", {"response": ""}, "expert.jsonl:4: the expert response is empty"),
        ("test", "eval", {"answer": "\\frac{"}, "test.jsonl:4: answer"),
        (
            "test",
            "eval",
            {"images": ["images/gone.png"]},
            "test.jsonl:4: images/gone.png is missing",
        ),
    ],
)
def test_bad_expert_and_heldout_rows_stop_with_one_line(
    run_folder, capsys, name, verb, changes, message
):
    folder, config = run_folder
    spoil(folder, name, **changes)
    code, _, err = run(capsys, verb, "--config", str(config), "flow.fit.batch_size=7")
    assert code == 2
    assert message in err.splitlines()[-1]


def test_bad_expert_rows_can_be_skipped(run_folder, capsys):
    folder, config = run_folder
    spoil(folder, "expert", images=["images/gone.png"])
    code, _, err = run(
        capsys,
        "flow",
        "--config",
        str(config),
        "data.on_bad_row=skip",
        "data.max_bad_frac=0.5",
        "flow.fit.batch_size=6",
    )
    assert code == 0, err
    assert "gone.png" in (folder / "run/bad_rows.jsonl").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.device=nonsense", "model.device=nonsense"),
        ("rollout.num_prompts=100", "rollout.num_prompts=100 exceeds the 8 usable rows"),
        ("flow.layers=[0.5,0.51]", "one of them twice"),
        ("reward.function=nowhere.py:f", "nowhere.py"),
    ],
)
def test_settings_that_cannot_work_stop_with_one_line(run_folder, capsys, override, message):
    _, config = run_folder
    code, _, err = run(capsys, "train", "--config", str(config), override)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_the_trained_model_is_a_plain_folder_and_a_finished_run_is_not_started_afresh(
    run_folder, capsys
):
    folder, config = run_folder
    assert run(capsys, "train", "--config", str(config), "train.steps=1")[0] == 0
    trained = folder / "run/hf/global_step_1"
    code, out, _ = run(
        capsys,
        "eval",
        "--config",
        str(config),
        f"model.path={trained}",
        f"output_dir={folder}/again",
    )
    assert code == 0
    assert json.loads(out)["num_problems"] == 4
    code, _, err = run(capsys, "train", "--config", str(config), "train.steps=1", "resume=false")
    assert code == 2
    assert "holds checkpoints; use another output_dir" in err


def test_bench_prints_one_line_with_the_figures(model_folder, capsys):
    arguments = [
        "--steps",
        "1",
        "--warmup",
        "0",
        "--prompts-per-step",
        "2",
        "--max-new-tokens",
        "4",
        "--threads",
        "1",
    ]
    code, out, _ = run(capsys, "bench", "--model", model_folder("llama"), *arguments)
    assert code == 0
    row = json.loads(out)
    assert row["response_length"] == 4
    assert row["step_s"] >= row["update_s"] > 0


def test_sigterm_saves_and_exits_75(run_folder):
    folder, config = run_folder
    done = cli("train", "--config", str(config), "train.save_steps=100", fault="backward:2:term")
    assert done.returncode == 75, done.stderr[-1000:]
    assert (folder / "run/checkpoints/latest").read_text() == "global_step_2"
    assert "stopped at step 2 on SIGTERM" in done.stderr.splitlines()[-1]


def test_sigterm_before_the_first_step_exits_75_and_the_same_command_trains(run_folder):
    _, config = run_folder
    done = cli("train", "--config", str(config), fault="load:1:term")
    assert done.returncode == 75, done.stderr[-1000:]
    assert (
        done.stderr.splitlines()[-1]
        == "rlfr-vlm train: stopped on SIGTERM; run the same command to go on"
    )
    done = cli("train", "--config", str(config), "train.steps=1")
    assert done.returncode == 0, done.stderr[-1000:]


def test_doctor_names_what_is_missing(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert (
        "HF engine" in out and f"installed, transformers {metadata.version('transformers')}" in out
    )
    assert "works" not in out, "nothing was tried"


@pytest.mark.slow
def test_doctor_imports_each_part_where_asked(capsys):
    code, out, _ = run(capsys, "doctor", "--deep")
    assert code == 0
    states = {line[: line.index("  ")]: line for line in out.splitlines() if "  " in line}
    for part in ("HF engine", "torchvision matches torch"):
        assert "works" in states[part], out


def test_doctor_says_why_a_part_does_not_load_or_match():
    assert doctor.imports("json") == ""
    assert doctor.imports("json.nothing") == "ModuleNotFoundError: No module named 'json.nothing'"
    assert doctor.part_state("no_such_part", {}, False) == "missing"
    assert doctor.part_state("json", {}, True) == "works"
    assert doctor.mismatch("no-such-part", "torch") == "missing"
    assert doctor.mismatch("torchvision", "torch") == ""
    assert doctor.builds("torch", "torch") == ""


def test_doctor_compares_with_what_a_package_asks_for(tmp_path, monkeypatch):
    for name, version, asked in (("needs", "1.0", "needed (==2.0)"), ("needed", "2.1+cpu", None)):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        lines += [f"Requires-Dist: {asked}"] if asked else []
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.mismatch("needs", "needed") == "asks for needed==2.0, 2.1+cpu is installed"
    assert doctor.builds("needs", "needed") == "needs 1.0, needed 2.1+cpu"


def test_unknown_key(run_folder, capsys):
    _, config = run_folder
    code, _, err = run(capsys, "train", "--config", str(config), "rollout.tempreature=1")
    assert code == 2
    assert "rollout.tempreature" in err and "rollout.temperature" in err


def test_a_flow_of_another_backbone_or_config_is_refused(run_folder, model_folder, capsys):
    _, config = run_folder
    field = run(capsys, "flow", "--config", str(config))[1].strip()
    other = model_folder("qwen2_5_vl", seed=1)
    code, _, err = run(
        capsys, "train", "--config", str(config), f"flow.checkpoint={field}", f"model.path={other}"
    )
    assert code == 2
    assert "does not fit this run (backbone.fingerprint: checkpoint" in err
    code, _, err = run(
        capsys,
        "train",
        "--config",
        str(config),
        f"flow.checkpoint={field}",
        "flow.context=token_post",
        "flow.times=[0.5]",
    )
    assert code == 2
    assert "context: checkpoint token_pre, run token_post; times: checkpoint 0.8, run 0.5" in err
    shutil.rmtree(field)
    code, _, err = run(capsys, "train", "--config", str(config), f"flow.checkpoint={field}")
    assert code == 2
    assert "flow.checkpoint" in err


def test_the_real_process_prints_no_traceback(run_folder):
    folder, config = run_folder
    done = cli("train", "--config", str(config), f"data.train={folder}/nothing.jsonl")
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == f"rlfr-vlm train: data file {folder}/nothing.jsonl does not exist"
    )
    assert "Traceback" not in done.stderr
