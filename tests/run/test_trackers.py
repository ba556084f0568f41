"""What TensorBoard, W&B and trackio were told, read back with their own readers; real packages, no
network.
"""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rlfr_vlm.config import Config, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.run.trackers import check_recording
from tests.runs import cli, make_config, make_data

wandb_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
BLOCK = 32768  # of W&B's file, which is a log of records in blocks

WRITE = """
import json, os, signal, sys
from rlfr_vlm.config import parse_config
from rlfr_vlm.report.run_files import read_rollouts, read_run
from rlfr_vlm.run.trackers import Trackers
tree, step, calls, end = json.loads(sys.argv[1])
trackers = Trackers(parse_config(tree), step, lambda text: print("say", text), lambda text: print("warn", text))
for call in calls:
    if call == "kill wandb-core":
        import subprocess
        children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
        (process,) = (int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line)
        os.kill(process, signal.SIGKILL)
        continue
    trackers.write(call[0], {k: float(v) for k, v in call[1].items()}) if isinstance(call[1], dict) else trackers.event(*call)
if end == "kill":
    import time
    time.sleep(5)  # two turns of W&B's timer, and some
    os.kill(os.getpid(), signal.SIGKILL)
trackers.close(failed=end == "failed")
"""


def tree(folder: Path, *trackers: str, **train) -> dict:
    return {
        "output_dir": str(folder),
        "model": {"path": "none"},
        "train": {"trackers": list(trackers), **train},
    }


def record(folder: Path, step: int, calls: list) -> None:
    """metrics.jsonl as the run has it."""
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    kept = (
        [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        if path.exists()
        else []
    )
    figures = [
        (call[0], {name: float(value) for name, value in call[1].items()})
        for call in calls
        if isinstance(call[1], dict)
    ]
    path.write_text(
        "".join(
            line + "\n"
            for line in [*kept, *(json.dumps({"step": at} | found) for at, found in figures)]
        )
    )


def session(config: dict, step: int, calls: list, end: str = "ok", **environment: str) -> str:
    """One process of a run. Returns what it said."""
    env = {
        **os.environ,
        "HOME": str(Path(config["output_dir"]).parent),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_DIR"):
        if name not in environment:
            env.pop(name, None)
    record(Path(config["output_dir"]), step, calls)
    command = [sys.executable, "-c", WRITE, json.dumps([config, step, calls, end])]
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr[-3000:]
    return done.stdout


def wandb_records(folder: Path) -> list:
    """Records of all sessions in order. Each chunk of the file has 4 bytes of checksum, 2 of length
    and 1 saying which part it is.
    """
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or last
                record = wandb_pb2.Record()
                record.ParseFromString(parts)
                records.append(record)
                parts = b""
    return records


def wandb_rows(folder: Path) -> list[dict]:
    """Rows as W&B's server puts them together: of a number that the run has already it takes no
    other.
    """
    rows: dict[tuple[str, int], dict] = {}
    run = ""
    for record in wandb_records(folder):
        run = record.run.run_id or run
        row = {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
            for item in record.history.item
        }
        if row:
            known = {name: value for name, value in row.items() if not name.startswith("_")}
            rows.setdefault((run, row["_step"]), known)
    return list(rows.values())


def trackio_read(folder: Path, code: str) -> list:
    """Asks trackio's own API in a process of its own: it reads its folder's name when it is
    imported.
    """
    text = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage as "
        f"S\nprint(json.dumps({code}))"
    )
    env = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True
        ).stdout
    )


def trackio_rows(folder: Path, project: str = "rlfr_vlm") -> list[dict]:
    found = trackio_read(
        folder,
        f"[[l for l in S.get_logs({project!r}, run_id=r['id'])] for r in "
        f"S.get_run_records({project!r})]",
    )
    return [{k: v for k, v in row.items() if k != "timestamp"} for rows in found for row in rows]


def tensorboard(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return events


STEPS = [[1, {"loss": 1.0}], [2, {"loss": 0.5}], [2, {"val/accuracy": 0.25}], [3, {"loss": 0.25}]]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run that dies after step 3 with its newest checkpoint at step 2, and goes on to step 4."""
    folder = tmp_path_factory.mktemp("trackers") / "my run"
    config = tree(folder, "tensorboard", "wandb", "trackio")
    event = [3, "repetition", "4-grams repeat"]
    said = session(config, 0, [*STEPS, event], "kill")
    assert (
        "no API key" in said and "wandb sync" in said and "trackio show --project rlfr_vlm" in said
    )
    session(
        config,
        2,
        [STEPS[3], event, [4, {"loss": "nan", "big": "inf"}], [4, {"val/accuracy": 0.75}]],
        "failed",
    )
    return folder


def test_tensorboard_has_each_step_once(resumed):
    events = tensorboard(resumed)
    assert [(e.step, e.value) for e in events.Scalars("loss")][:3] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.25),
    ]
    assert math.isnan(events.Scalars("loss")[3].value) and math.isinf(
        events.Scalars("big")[0].value
    )
    assert [(e.step, e.value) for e in events.Scalars("val/accuracy")] == [(2, 0.25), (4, 0.75)]
    texts = [e.tensor_proto.string_val[0] for e in events.Tensors("events/text_summary")]
    assert set(texts) == {
        b"**repetition** 4-grams repeat"
    }  # text is not purged: it may stand there twice


def test_wandb_has_each_step_once_and_one_run(resumed):
    records = wandb_records(resumed)
    runs = [r.run for r in records if r.run.run_id]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.display_name, run.run_group, run.project) for run in runs} == {
        ("my run", "my run", "rlfr_vlm")
    }
    rows = wandb_rows(resumed)
    expected = [{"step": step, **figures} for step, figures in STEPS]
    assert rows[:4] == expected
    assert (
        math.isnan(rows[4]["loss"])
        and math.isinf(rows[4]["big"])
        and rows[5] == {"step": 4, "val/accuracy": 0.75}
    )
    alerts = [(r.alert.title, r.alert.text) for r in records if r.alert.title]
    assert alerts == [("repetition", "step 3: 4-grams repeat")]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [
        1
    ]  # the killed session has none
    config = {item.key: item.value_json for r in runs for item in r.config.update}
    assert json.loads(config["train"])["trackers"] == ["tensorboard", "wandb", "trackio"]
    axes = {
        (r.metric.name or r.metric.glob_name): r.metric.step_metric
        for r in records
        if r.HasField("metric")
    }
    assert axes["*"] == "step"


def test_trackio_has_each_step_once_and_one_run(resumed):
    rows = trackio_rows(resumed)
    assert rows[:4] == [{"step": step, **figures} for step, figures in STEPS]
    assert (
        math.isnan(rows[4]["loss"])
        and math.isinf(rows[4]["big"])
        and rows[5] == {"step": 4, "val/accuracy": 0.75}
    )
    runs = trackio_read(
        resumed,
        "[[r.name, r.config['_Group'], [a['text'] for a in r.alerts()]] for r in "
        "trackio.Api().runs('rlfr_vlm')]",
    )
    assert runs == [["my run", "my run", ["4-grams repeat"]]]


@pytest.mark.slow
def test_after_a_roll_back_figures_go_to_another_run_of_the_group(tmp_path):
    folder = tmp_path / "run"
    config = tree(folder, "wandb", "trackio")
    session(config, 0, STEPS)
    session({**config, "monitors": {"roll_backs": 1}}, 2, [[3, {"loss": 0.125}]])
    runs = dict.fromkeys(
        (r.run.display_name, r.run.run_group) for r in wandb_records(folder) if r.run.run_id
    )
    assert list(runs) == [("run", "run"), ("run (2)", "run")]
    whole = [{"step": step, **figures} for step, figures in STEPS]
    assert wandb_rows(folder) == whole + whole[:3] + [{"step": 3, "loss": 0.125}]
    assert [row["loss"] for row in trackio_rows(folder) if "loss" in row] == [
        1.0,
        0.5,
        0.25,
        1.0,
        0.5,
        0.125,
    ]


@pytest.mark.slow
def test_a_run_begun_anew_is_another_one(tmp_path):
    """Without a checkpoint nothing says that the settings are the same."""
    config = tree(tmp_path / "run", "wandb", project="my project")
    for _ in range(2):
        session(config, 0, STEPS[:1])
    runs = {r.run.run_id: r.run.project for r in wandb_records(tmp_path / "run") if r.run.run_id}
    assert list(runs.values()) == ["my project"] * 2 and len(wandb_rows(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_run_offline(tmp_path):
    config = tree(tmp_path / "run", "wandb")
    key = {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
    }
    said = session(config, 0, STEPS, **key)
    assert (
        said.count("warn") == 1
        and "W&B does not answer, so the run is kept offline" in said
        and "127.0.0.1:9" in said
    )
    assert len(wandb_rows(tmp_path / "run")) == 4
    said = session(config, 3, [[4, {"loss": 0.0}]], **{**key, "WANDB_API_KEY": "short"})
    assert "warn W&B does not answer" in said and wandb_rows(tmp_path / "run")[-1] == {
        "step": 4,
        "loss": 0.0,
    }


def test_wandb_dying_is_said_once_and_the_others_go_on(tmp_path):
    config = tree(tmp_path / "run", "wandb", "trackio")
    said = session(
        config,
        0,
        [
            [1, {"loss": 1.0}],
            "kill wandb-core",
            [2, {"loss": 0.5}],
            [2, "title", "text"],
            [3, {"loss": 0.25}],
        ],
    )
    assert said.count("warn") == 1 and "warn wandb is left out from here on: " in said
    assert [row["loss"] for row in trackio_rows(tmp_path / "run")] == [1.0, 0.5, 0.25]


def missing(name: str, cfg: Config, monkeypatch) -> str:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError) as raised:
        check_recording(cfg)
    return str(raised.value)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_starts(name, tmp_path, monkeypatch):
    text = missing(name, parse_config(tree(tmp_path, name)), monkeypatch)
    assert f"train.trackers: {name} is not installed" in text and f"pip install {name}" in text


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    assert "pip install pyarrow" in missing(
        "", parse_config(tree(tmp_path, rollout_format="parquet")), monkeypatch
    )


def test_a_folder_of_the_name_is_no_package(tmp_path):
    """W&B leaves a folder `wandb` behind, which Python takes for a package."""
    (tmp_path / "wandb").mkdir()
    code = (
        "import sys; sys.path[:] = [sys.argv[1]] + [p for p in sys.path if 'site-packages' not in "
        "p]\n"
        "import importlib.util; spec = importlib.util.find_spec('wandb'); assert spec is not None "
        "and spec.origin is None"
    )
    subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path)], check=True)


def test_trackio_refuses_a_project_by_name(tmp_path):
    config = tree(tmp_path / "run", "trackio", project="model_system")
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", WRITE, json.dumps([config, 0, [], "ok"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        "UserError: train.project: trackio refuses it: Project name 'model_system'" in done.stderr
    )


def untimed(rows: list[dict]) -> list[dict]:
    """Without what the clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("timing_s/", "perf/"))}
        for row in rows
    ]


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_tracked_once_with_rollouts_as_parquet(model_folder, tmp_path):
    from rlfr_vlm.report.run_files import read_rollouts, read_run

    make_data(tmp_path)
    settings = {
        "trackers": ["tensorboard", "wandb", "trackio"],
        "rollout_format": "parquet",
        "project": "bars",
    }
    config = make_config(tmp_path, model_folder("qwen2_5_vl"), train=settings, eval={"every": 2})
    home = {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
    dry = cli("train", "--config", str(config), "--dry-run", **home)
    assert (
        f"{tmp_path}/run/wandb/" in dry.stdout
        and "step_000001.parquet to step_000004.parquet" in dry.stdout
    ), dry.stderr
    assert (
        cli("train", "--config", str(config), fault="reward:4:kill", **home).returncode
        == -signal.SIGKILL
    )
    done = cli("train", "--config", str(config), **home)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    assert done.stdout == f"{run}\n"  # the trackers keep quiet there
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    rows = wandb_rows(run)
    # The killed process wrote its steps in about the time that W&B takes to save them: what did not
    # arrive comes from metrics.jsonl.
    assert untimed(rows) == untimed(lines)
    twice = untimed(
        trackio_rows(run, "bars")
    )  # rows of the last second before a kill may stand there twice, with the same figures
    assert [row for at, row in enumerate(twice) if row not in twice[:at]] == untimed(lines)
    assert {r.run.project for r in wandb_records(run) if r.run.run_id} == {"bars"}
    for name in ("reward/mean", "val/accuracy"):
        found = {event.step: event.value for event in tensorboard(run).Scalars(name)}
        assert found == pytest.approx({line["step"]: line[name] for line in lines if name in line})
    groups = [group for file in read_run(run).rollout_files for group in read_rollouts(file, [])]
    assert [group.step for group in groups] == [1, 1, 2, 2, 3, 3, 4, 4] and len(
        groups[0].responses
    ) == 4
    assert not [
        path
        for path in (run / "rollouts").iterdir()
        if path.suffix != ".parquet" and path.name != "images"
    ]
