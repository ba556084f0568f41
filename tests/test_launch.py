"""How training processes find each other, and what is said when they do not."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rlfr_vlm.config import parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.launch.processes import started
from rlfr_vlm.ranks import ALONE, Launch, Ranks, check_launch, join, launched
from tests.runs import ROOT, cli

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables and no others."""

    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    put()
    return put


def config(**sections):
    return parse_config({"output_dir": "unused", "model": {"path": "nowhere"}, **sections})


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_without_a_launcher_there_is_one_process(environment):
    assert launched() == Launch()
    assert join(config()).size == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": 0}, "WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": 2, "MASTER_PORT": 1}, "RANK is 'x', not a number"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "MASTER_PORT is not set"),
        (
            {"RANK": 2, "WORLD_SIZE": 2, "MASTER_PORT": 1},
            "RANK=2 must be at least 0 and below WORLD_SIZE=2",
        ),
    ],
)
def test_a_broken_launch_is_named(environment, values, message):
    environment(**values)
    with pytest.raises(UserError, match=message):
        launched()


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (
            None,
            2,
            r"deepspeed: 2 processes were started \(WORLD_SIZE\), but the config trains in one; "
            r"set deepspeed.zero_stage=2",
        ),
        (
            {"ranks": 4},
            2,
            r"deepspeed.ranks=4, but 2 processes started: use torchrun --standalone "
            r"--nproc-per-node 4",
        ),
        ({"ranks": 2}, 1, r"deepspeed.ranks=2, but 1 process started"),
    ],
)
def test_a_wrong_number_of_ranks_is_named(settings, size, message):
    with pytest.raises(UserError, match=message):
        check_launch(config(deepspeed=settings), Launch(0, size))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage"),
        (
            {"deepspeed": {"zero_stage": 2, "offload": "all"}},
            "deepspeed.offload=all needs deepspeed.zero_stage=3, not 2",
        ),
        (
            {"deepspeed": {"zero_stage": 0, "offload": "optimizer"}},
            "deepspeed.offload=optimizer needs deepspeed.zero_stage of at least 1",
        ),
        (
            {"deepspeed": {"offload": "optimizer"}, "optim": {"name": "sgd"}},
            "optim.name must be adamw",
        ),
        (
            {"deepspeed": {}, "model": {"path": "m", "master_weights": False}},
            "model.master_weights=false",
        ),
        ({"ray": {"engines": 1}}, "ray.engines=1 needs launcher=ray"),
        (
            {"rollout": {"vllm": {"tensor_parallel": 2}}},
            "rollout.vllm.tensor_parallel=2 needs engines of their own: set ray.engines",
        ),
        (
            {"rollout": {"staleness": 1}},
            "rollout.staleness=1 needs engines of their own: set ray.engines",
        ),
        (
            {"rollout": {"staleness": 1}, "launcher": "ray", "ray": {"engines": 1}},
            "set algorithm.importance_cap",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(sections, message):
    with pytest.raises(UserError, match=message):
        config(**sections)


def test_a_port_in_use_ends_with_2_before_weights_load(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "config.yaml").write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{path: nowhere}}\ndata: {{train: "
        f"{tmp_path}/rows.jsonl}}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = cli(
            "train",
            "--config",
            str(tmp_path / "config.yaml"),
            "deepspeed.zero_stage=2",
            **variables,
        )
    assert done.returncode == 2, done.stderr
    assert f"MASTER_PORT={port} is in use by another process" in done.stderr
    assert not (tmp_path / "run").exists()


def test_only_train_runs_on_ranks(tmp_path):
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path}/run\nmodel: {{path: nowhere}}\n")
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = cli("flow", "--config", str(tmp_path / "config.yaml"), **variables)
    assert done.returncode == 2
    assert "flow runs in one process, 2 were started" in done.stderr


PEER = """
import sys, time, torch
from rlfr_vlm.config import parse_config
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.ranks import join
seconds = float(sys.argv[1])
cfg = parse_config({"output_dir": "x", "model": {"path": "m"}, "deepspeed": {"ranks": 2}, "train": {"timeout_s": seconds}})
ranks = join(cfg)
assert ranks.gather(ranks.rank, "hello") == [0, 1]
ranks.at("gathering `layers.3.weight`")
ranks.limit_waits()
print("ready", flush=True)
if ranks.rank == 1:
    time.sleep(600)
try:
    if len(sys.argv) > 2:  # a collective of somebody else's
        ranks.at("metrics of step 7")
        with ranks.named():
            torch.distributed.all_reduce(torch.ones(1))
    ranks.gather(None, "metrics of step 7")
except StoppedError as error:
    print(error, flush=True)
"""


def peers(seconds, *more):
    """Two ranks, of which the second never answers."""
    variables = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PEER, str(seconds), *more]
    environments = [{**os.environ, **variables, "RANK": str(rank)} for rank in range(2)]
    found = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
        for env in environments
    ]
    for process in found:
        assert process.stdout.readline() == "ready\n"
    return found


@pytest.mark.parametrize(
    ("number", "seconds", "most", "whose"),
    [
        (signal.SIGSTOP, 5, 9, ()),
        (signal.SIGKILL, 60, 4, ()),
        (signal.SIGSTOP, 5, 9, ("another's",)),
    ],
)
def test_a_rank_that_hangs_or_dies_is_named(number, seconds, most, whose):
    assert seconds_to_notice(number, seconds, *whose) < most


@pytest.mark.reliability
def test_how_soon_it_is_missed(figure):
    killed = max(seconds_to_notice(signal.SIGKILL, 60) for _ in range(5))
    stopped = max(seconds_to_notice(signal.SIGSTOP, 10) for _ in range(2))
    assert killed <= 2 and stopped <= 12
    figure(
        "R6",
        f"2 gloo ranks: SIGKILL noticed in {killed:.2f} s (5 times), SIGSTOP in {stopped:.2f} s of "
        "a timeout of 10 s (2 times); named",
    )


def seconds_to_notice(number, seconds, *whose):
    """Until the first rank says that the second, which got this signal, does not answer; it must
    name both places.
    """
    waiting, silent = peers(seconds, *whose)
    try:
        silent.send_signal(number)
        start = time.monotonic()
        said = waiting.stdout.readline()
        spent = time.monotonic() - start
    finally:
        silent.kill()
        waiting.kill()
    assert "rank 0 waited at `metrics of step 7` and got no answer" in said
    assert "rank 1 was last at `gathering `layers.3.weight``" in said
    return spent


def test_an_error_on_one_rank_is_raised_on_all():
    class Two(Ranks):
        def gather(self, value, place):
            return [None, (UserError, "no such row")]

    with pytest.raises(UserError, match="rank 1: no such row"):
        Two().agree(None, "reading")
    ALONE.agree(None, "reading")
    with pytest.raises(KeyError):
        ALONE.agree(KeyError("own"), "reading")


RANK = """
import os, sys, time
from pathlib import Path
from rlfr_vlm.config import parse_config
from rlfr_vlm.ranks import join
ranks = join(parse_config({"output_dir": "x", "model": {"path": "m"}, "deepspeed": {"ranks": 2}}))
ranks.gather(None, "hello")
(Path(sys.argv[1]) / str(os.getpid())).touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_end_with_the_torchrun_that_is_killed(tmp_path):
    """They are in sessions of their own: left behind, they would go on training and hold the run's
    folder.
    """
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "pids").mkdir()
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    ]
    command = [sys.executable, *launcher, str(tmp_path / "rank.py"), str(tmp_path / "pids")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pids = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as torchrun:
        try:
            deadline = time.monotonic() + 120
            while len(pids) < 2 and torchrun.poll() is None and time.monotonic() < deadline:
                pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
                time.sleep(0.05)
        finally:
            torchrun.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while (
        left := [pid for pid in pids if started(pid) is not None]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
