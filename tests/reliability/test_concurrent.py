"""R13: one run per folder, whoever comes first; a dead run's folder is free; runs side by side are
as each alone.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.test_ray import Launched, weights
from tests.reliability.started import Started
from tests.runs import ROOT, cli, make_config, make_text_data

RACES = 20
LIMIT = 2.0  # seconds from the end of the imports to the end of whoever comes second
# The command line, twice, from the same moment on. Who wins waits with its first reward until the
# other has ended.
RACE = """
import json, os, sys, time
import rlfr_vlm.commands
from rlfr_vlm.cli import main

folder, config, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

def contend(number, name, start):
    os.environ["RLFR_TEST_OTHER"] = f"{folder}/{name}.{1 - number}"
    os.dup2(os.open(f"{folder}/{name}.{number}.log", os.O_CREAT | os.O_WRONLY), 2)
    time.sleep(max(0.0, start - time.monotonic()))
    code = 0
    try:
        main(["train", "--config", config, f"output_dir={folder}/{name}"])
    except SystemExit as end:
        code = end.code
    with open(f"{folder}/{name}.{number}.tmp", "w") as file:
        json.dump({"code": code, "seconds": time.monotonic() - start, "pid": os.getpid()}, file)
    os.rename(f"{folder}/{name}.{number}.tmp", f"{folder}/{name}.{number}")
    os._exit(0)

for race in range(count):
    start = time.monotonic() + 0.3
    children = []
    for number in range(2):
        pid = os.fork()
        if not pid:
            contend(number, f"race{race}", start)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
"""
REWARD = """
import hashlib, os, time

def reward(prompts, completions, **columns):
    other = os.environ.get("RLFR_TEST_OTHER")
    deadline = time.monotonic() + 20
    while other and not os.path.exists(other) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""


@pytest.fixture
def config(model_folder, tmp_path):
    """Of a run of two small steps."""
    make_text_data(tmp_path)
    (tmp_path / "waits.py").write_text(REWARD)
    return make_config(
        tmp_path,
        model_folder("qwen2"),
        flow=None,
        train={"steps": 2, "save_steps": 2},
        reward={"function": f"{tmp_path / 'waits.py'}:reward"},
    )


def raced(config, folder, count):
    """The ends of both contenders, race by race; of the second one what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RACE, str(folder), str(config), str(count)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [
        [json.loads((folder / f"race{race}.{number}").read_text()) for number in range(2)]
        for race in range(count)
    ]
    said = [
        [(folder / f"race{race}.{number}.log").read_text() for number in range(2)]
        for race in range(count)
    ]
    return ends, said


def judged(ends, said):
    """How often exactly one won, the other being told who; and the longest that took."""
    good, slowest = 0, 0.0
    for pair, texts in zip(ends, said, strict=True):
        (second,) = [number for number in range(2) if pair[number]["code"] == 2] or [None]
        if second is None or pair[1 - second]["code"] != 0:
            continue
        slowest = max(slowest, pair[second]["seconds"])
        good += (
            re.search(
                rf"is in use by another run \(process {pair[1 - second]['pid']} on .*\)",
                texts[second],
            )
            is not None
        )
    return good, slowest


@pytest.mark.reliability
def test_of_two_starts_in_one_folder_one_wins_each_time(config, tmp_path, figure):
    good, slowest = judged(*raced(config, tmp_path, RACES))
    assert good == RACES and slowest < LIMIT
    for race in range(RACES):
        rows = [
            json.loads(line)["step"]
            for line in (tmp_path / f"race{race}/metrics.jsonl").read_text().splitlines()
        ]
        assert rows == [1, 2]
    figure(
        "R13",
        f"{good} of {RACES} races for a folder: one wins, the other exits 2 naming it, at most "
        f"{slowest:.2f} s after its imports",
    )


@pytest.mark.reliability
def test_negative_control_without_the_lock_both_train(config, tmp_path):
    code = RACE.replace(
        "from rlfr_vlm.cli import main",
        "import fcntl\nfcntl.flock = lambda *_: None\nfrom rlfr_vlm.cli import main",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path), str(config), "1"]
    subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=300,
        start_new_session=True,
        check=True,
    )
    assert [
        json.loads((tmp_path / f"race0.{number}").read_text())["code"] for number in range(2)
    ].count(2) == 0


@pytest.mark.reliability
def test_a_killed_runs_folder_is_free_at_once(config, tmp_path, figure):
    """Only the run itself is killed: what it had started may live a moment longer."""
    out = tmp_path / "killed"
    with Started(config, out) as run:
        assert run.wait_for(out / "metrics.jsonl")
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        dead = run.process.pid
        assert f"process {dead} on" in (out / ".lock").read_text()
        done = cli("train", "--config", str(config), f"output_dir={out}")
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"process {dead} on" not in (out / ".lock").read_text()
    figure("R13", "a dead run's lock is taken over by the next start")


@pytest.mark.reliability
def test_two_runs_side_by_side_are_as_each_alone(config, tmp_path, figure):
    seeds = (1, 2)
    for seed in seeds:
        done = cli(
            "train", "--config", str(config), f"output_dir={tmp_path}/alone{seed}", f"seed={seed}"
        )
        assert done.returncode == 0, done.stderr[-2000:]
    with (
        Started(config, tmp_path / "beside1", "seed=1") as one,
        Started(config, tmp_path / "beside2", "seed=2") as two,
    ):
        assert one.end() == 0 and two.end() == 0
    names = [
        [p.relative_to(tmp_path / f"{how}1") for p in (tmp_path / f"{how}1").glob("hf/*/*")]
        for how in ("alone", "beside")
    ]
    assert sorted(names[0]) == sorted(names[1])
    found = {
        how: [weights(tmp_path / f"{how}{seed}", 2) for seed in seeds]
        for how in ("alone", "beside")
    }
    assert found["alone"] == found["beside"] and found["alone"][0] != found["alone"][1]
    figure("R13", "two runs in two folders side by side: weights equal to each alone, to the bit")


@pytest.mark.reliability
def test_two_runs_by_ray_side_by_side_are_as_each_alone(config, tmp_path, figure):
    """Each has a cluster of its own; the one that ends first ends nothing of the other's."""
    for seed in (1, 2):
        done = cli(
            "train", "--config", str(config), f"output_dir={tmp_path}/alone{seed}", f"seed={seed}"
        )
        assert done.returncode == 0, done.stderr[-2000:]
    ray = ("launcher=ray", "ray.engines=1")
    with (
        Launched(config, tmp_path / "ray1", "seed=1", *ray) as one,
        Launched(config, tmp_path / "ray2", "seed=2", *ray) as two,
    ):
        assert one.end() == 0, one.text[-4000:]
        assert two.end() == 0, two.text[-4000:]
        assert "died" not in one.text + two.text
    assert [weights(tmp_path / f"ray{seed}", 2) for seed in (1, 2)] == [
        weights(tmp_path / f"alone{seed}", 2) for seed in (1, 2)
    ]
    figure(
        "R13",
        "two runs by Ray side by side: weights equal to each alone by one process, no death on the "
        "way",
    )


@pytest.mark.reliability
def test_a_second_start_by_ray_is_told_before_a_cluster_starts(config, tmp_path, figure):
    with Started(config, tmp_path / "run", "train.steps=40000") as run:
        assert run.wait_for(tmp_path / "run/metrics.jsonl")
        begun = time.monotonic()
        done = cli(
            "train",
            "--config",
            str(config),
            f"output_dir={tmp_path / 'run'}",
            "launcher=ray",
            "ray.engines=1",
        )
        assert (
            done.returncode == 2
            and f"in use by another run (process {run.process.pid} on" in done.stderr
        ), done.stderr[-2000:]
        fits = cli("flow", "--config", str(config), f"output_dir={tmp_path / 'run'}", "flow={}")
        assert fits.returncode == 2 and "in use by another run" in fits.stderr, fits.stderr[-2000:]
    assert time.monotonic() - begun < 120
    figure(
        "R13",
        "launcher=ray and `flow` in a folder that trains: exit 2, before a cluster starts or "
        "weights load",
    )
