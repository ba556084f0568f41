"""launcher=ray: the same weights as without it, whoever dies on the way; nothing reachable from
outside, and nothing left behind.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from rlfr_vlm.commands import train
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import Preempted, StoppedError, UserError
from rlfr_vlm.launch.placement import Needs, remove_orphans
from rlfr_vlm.launch.processes import Ended, end_process, processes_with, started, verdict
from rlfr_vlm.rollout.worker import ErrorMessage
from tests.runs import ROOT, make_config, make_data

REWARD = """
import hashlib, time

def reward(prompts, completions, **columns):  # something to learn from in every group, and time to interfere
    time.sleep(0.4)
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""
START = 600  # seconds for Ray and the actors to start: on a busy machine most of them are imports


class Launched:
    """`rlfr-vlm train` in a process of its own, whose output can be waited for. A variable marks
    every process that comes of it.
    """

    def __init__(self, config, folder, *overrides, **environment):
        self.mark = f"RLFR_TEST_RUN={uuid.uuid4().hex}"
        self.folder, self.log = folder, folder.with_suffix(".log")
        name, value = self.mark.split("=")
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            name: value,
            **environment,
        }
        command = [
            sys.executable,
            "-m",
            "rlfr_vlm.cli",
            "train",
            "--config",
            str(config),
            f"output_dir={folder}",
            *overrides,
        ]
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stderr=self.log.open("w"), stdout=subprocess.DEVNULL
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid, since in [*processes_with(self.mark)]:
            end_process(pid, since)
        self.process.wait()

    @property
    def text(self):
        return self.log.read_text()

    def wait_for(self, pattern, seconds=START):
        """The first match of a pattern in what was written so far."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, (
                f"no `{pattern}` in:\n{self.text[-4000:]}"
            )
            time.sleep(0.05)
        return found

    def end(self, seconds=START):
        return self.process.wait(seconds)

    def left(self):
        """Processes that are still there, once the launcher is gone."""
        return [
            Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid, since in processes_with(self.mark)
            if since is not None
        ]


def listening(mark):
    """(address in hex, pid) of every socket on which a process of the run listens."""
    owners = {}
    for pid, _ in processes_with(mark):
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            if target.startswith("socket:["):
                owners[target[8:-1]] = pid
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                found.append((fields[1], owners[fields[9]]))
    return found


def on_loopback(address):
    host = address.partition(":")[0]
    mapped = host.startswith("0000000000000000FFFF0000")
    return host == "00000000000000000000000001000000" or (
        (len(host) == 8 or mapped) and host.endswith("7F")
    )


def weights(folder, step):
    return (folder / "hf" / f"global_step_{step}" / "model.safetensors").read_bytes()


def traces(pid):
    """What a launcher has left on the disk and in shared memory."""
    owners = [
        path
        for path in Path("/tmp").glob("rlfr-ray-*/owner")
        if path.read_text().startswith(f"{pid} ")
    ]
    return owners + [
        path
        for path in Path("/dev/shm").glob("*")
        if re.match(f"plasma|ray|torch_{pid}_", path.name)
    ]


@pytest.fixture
def prepared(model_folder, tmp_path):
    """Makes the config of a small run by Ray."""
    make_data(tmp_path)

    (tmp_path / "noisy.py").write_text(REWARD)

    def make(**sections):
        reward = {"function": f"{tmp_path / 'noisy.py'}:reward"}
        return make_config(
            tmp_path,
            model_folder("qwen2_5_vl"),
            launcher="ray",
            **{"flow": None, "reward": reward, **sections},
        )

    return make


# -- without Ray -----------------------------------------------------------------------------------


def test_what_the_cluster_lacks_is_said_before_anything_starts(prepared, tmp_path):
    cfg = load_config(prepared(ray={"engines": 3}, deepspeed={"ranks": 500}))
    with pytest.raises(
        UserError,
        match=r"deepspeed.ranks=500 and ray.engines=3 are 503 processes, but the cluster has \d+ "
        r"CPU cores",
    ):
        train(cfg)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        UserError,
        match=r"deepspeed.ranks=500 and ray.engines=3 need 503 GPUs, but the cluster has 8",
    ):
        Needs.of(cfg, 64, 8)


def test_actors_share_the_cores_there_are(prepared):
    cfg = load_config(
        prepared(
            ray={"engines": 2}, deepspeed={"ranks": 2}, rollout={"vllm": {"tensor_parallel": 2}}
        )
    )
    assert Needs.of(cfg, 2, 0).bundles == [{"CPU": 0.5}] * 4
    assert (
        Needs.of(cfg, 64, 8).bundles == [{"CPU": 1.0, "GPU": 1}] * 2 + [{"CPU": 1.0, "GPU": 2}] * 2
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "nonsense", "127.0.0.1:notaport"])
def test_a_cluster_that_is_not_there_is_named(prepared, address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    cfg = load_config(prepared(ray={"engines": 1, "address": address}))
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"ray.address={address}: "):
        train(cfg)
    assert time.monotonic() - begun < 15


def test_something_else_at_the_address_is_no_cluster(prepared):
    from rlfr_vlm.ranks import listen

    with listen("127.0.0.1", 0) as silent:
        cfg = load_config(prepared(ray={"address": f"127.0.0.1:{silent.getsockname()[1]}"}))
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"ray.address=127.0.0.1:.*: no Ray cluster answers"):
            train(cfg)
        assert time.monotonic() - begun < 20


def problem(error, cause=None):
    error.__cause__ = cause
    return Ended.of(error)


def test_the_first_cause_is_told_from_what_follows_from_it():
    reset = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")
    lost = problem(StoppedError("rank 0 waited at `update` and got no answer"), reset)
    assert lost.peer and Ended.of(reset).peer and not Ended.of(RuntimeError("shape mismatch")).peer
    done = Ended(path="run")
    assert verdict({0: done, 1: done}, {}, []) is None
    assert "rank 1 died (SIGKILL)" in verdict({0: lost}, {1: "died (SIGKILL)"}, [])
    assert "rank 1 did not answer (rank 0 waited at `update`" in verdict({0: lost}, {}, [1])
    with pytest.raises(UserError, match=r"^data.train: no rows$"):
        verdict(
            {
                0: problem(UserError("rank 1: data.train: no rows")),
                1: problem(UserError("data.train: no rows")),
            },
            {},
            [],
        )
    with pytest.raises(StoppedError, match="3 of 4 verdicts are errors"):
        verdict({1: problem(StoppedError("3 of 4 verdicts are errors")), 0: lost}, {}, [])
    assert "rank 2 died" in verdict(
        {0: lost, 1: problem(ValueError("no such key"))}, {2: "died"}, []
    )
    with pytest.raises(RuntimeError, match=r"rank 1 failed:\n(.|\n)*ValueError: a bug"):
        verdict({0: lost, 1: problem(ValueError("a bug"))}, {}, [])
    with pytest.raises(Preempted, match="stopped at step 3"):
        verdict(
            {
                0: problem(Preempted("stopped at step 3")),
                1: problem(Preempted("stopped at step 3")),
            },
            {},
            [],
        )
    full = Ended.of(OSError(28, "No space left on device", "x.pt"))
    assert full.problem == ErrorMessage("DiskFullError", "no space left on the disk: x.pt")


def test_processes_are_named_by_pid_and_start():
    code = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "RLFR_MARK": "7"}, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        since = started(process.pid)
        assert processes_with("RLFR_MARK=7") == [(process.pid, since)] and not processes_with(
            "RLFR_MARK=77"
        )
        assert (
            end_process(process.pid, "an earlier process with this number")
            and process.poll() is None
        )
        os.kill(process.pid, signal.SIGSTOP)
        assert end_process(process.pid, since) and process.wait() == -signal.SIGKILL


def test_folders_of_killed_runs_are_removed_by_the_next(tmp_path):
    for name, owner in (
        ("dead", f"{os.getpid()} 1"),
        ("alive", f"{os.getpid()} {started(os.getpid())}"),
        ("unknown", None),
    ):
        (tmp_path / f"rlfr-ray-{name}").mkdir()
        if owner is not None:
            (tmp_path / f"rlfr-ray-{name}" / "owner").write_text(owner)
    remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rlfr-ray-alive",
        "rlfr-ray-unknown",
    ]


# -- with Ray --------------------------------------------------------------------------------------


def test_by_ray_with_an_engine_of_its_own_a_run_ends_with_the_same_weights(prepared, tmp_path):
    """The smoke case of the slow tests below: one rank and one engine sample the same batches as
    one process does.
    """
    path = prepared(train={"steps": 2, "save_steps": 2})
    train(load_config(path, ("launcher=process", f"output_dir={tmp_path / 'plain'}")))
    with Launched(
        path, tmp_path / "ray", "ray.engines=1"
    ) as run:  # a process that has not imported Ray, as vLLM does
        assert run.end() == 0, run.text[-4000:]
        assert not run.left() and not traces(run.process.pid)
    assert weights(tmp_path / "ray", 2) == weights(tmp_path / "plain", 2)


FOUR = {
    "deepspeed": {"ranks": 2, "zero_stage": 2},
    "ray": {"engines": 2},
    "train": {"steps": 12, "save_steps": 3},
}


@pytest.mark.slow
@pytest.mark.reliability
def test_an_engine_and_then_a_rank_are_killed_and_nothing_changes(prepared, tmp_path, figure):
    path = prepared(**FOUR)
    with Launched(path, tmp_path / "whole") as whole:
        whole.wait_for("step 1/12")
        sockets = listening(whole.mark)
        assert len(sockets) > 4 and all(on_loopback(address) for address, _ in sockets), sockets
        intrude(sockets)
        assert whole.end() == 0, whole.text[-4000:]
        assert not whole.left() and not traces(whole.process.pid)
    with Launched(path, tmp_path / "killed") as run:
        engine, rank = (
            int(run.wait_for(rf"{role} 1: process (\d+)")[1]) for role in ("engine", "rank")
        )
        run.wait_for("step 2/12")
        os.kill(engine, signal.SIGKILL)
        run.wait_for(rf"engine 1 \(process {engine}\) died; process \d+ stands in for it; death 1")
        deadline = time.monotonic() + START
        while (
            not list((tmp_path / "killed" / "checkpoints").glob("global_step_*"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        os.kill(rank, signal.SIGKILL)
        run.wait_for("warning: rank 1 died .* death 2")
        run.wait_for("resumed from global_step_")
        assert run.end() == 0, run.text[-4000:]
        assert not run.left() and not traces(run.process.pid)
    assert weights(tmp_path / "killed", 12) == weights(tmp_path / "whole", 12)
    assert (
        weights(tmp_path / "killed", 12)
        != (Path(load_config(path).model.path) / "model.safetensors").read_bytes()
    )
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 12
    with Launched(path, tmp_path / "stopped", "train.timeout_s=60") as run:
        rank = int(run.wait_for(r"rank 1: process (\d+)")[1])
        run.wait_for("step 4/12")
        os.kill(rank, signal.SIGSTOP)
        run.wait_for(
            r"warning: rank 1 did not answer \(rank 0 waited at .*rank 1 was last at .*death 1"
        )
        run.wait_for("resumed from global_step_3")
        assert run.end() == 0, run.text[-4000:]
        assert not run.left() and not traces(run.process.pid)
    assert weights(tmp_path / "stopped", 12) == weights(tmp_path / "whole", 12)
    figure(
        "R6",
        "launcher=ray, 2 ranks, 2 engines: an engine and then a rank SIGKILLed; in another run a "
        "rank SIGSTOPped, and named: the group starts again, final weights bit-equal",
    )


def intrude(sockets):
    """Another process of the same user, without the token, is refused by the cluster."""
    (store,) = {
        pid for _, pid in sockets if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }
    port = next(int(address.rpartition(":")[2], 16) for address, pid in sockets if pid == store)
    code = (
        f"import ray; ray.init(address='127.0.0.1:{port}', logging_level='ERROR')\n"
        "print('RAN', ray.get(ray.remote(lambda: 1).remote(), timeout=20))"
    )
    impatient = {"RAY_gcs_server_request_timeout_seconds": "5", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **impatient,
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0 and "RAN" not in found.stdout, found.stdout
    assert "token authentication" in found.stderr, found.stderr[-2000:]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(prepared, tmp_path):
    path = prepared(**FOUR)
    with Launched(path, tmp_path / "run") as run:
        run.wait_for("step 4/12")
        run.process.send_signal(signal.SIGTERM)
        assert run.end(60) == 75, run.text[-4000:]
        step = int(
            re.search(r"stopped at step (\d+) on SIGTERM; run the same command to go on", run.text)[
                1
            ]
        )
        assert (tmp_path / "run" / "checkpoints" / f"global_step_{step}").is_dir()
        assert not run.left() and not traces(run.process.pid)
    with Launched(path, tmp_path / "run", "train.timeout_s=60") as run:
        run.wait_for(f"resumed from global_step_{step}")
        first, stopped = (int(run.wait_for(rf"rank {rank}: process (\d+)")[1]) for rank in (0, 1))
        run.wait_for(f"step {step + 1}/12")
        os.kill(stopped, signal.SIGSTOP)
        run.wait_for(
            r"warning: rank 1 did not answer \(rank 0 waited at .*rank 1 was last at .*death 1"
        )
        run.wait_for(rf"rank 0: process (?!{first})\d+")
        assert started(stopped) is None
        run.wait_for(r"(?s)did not answer.*resumed from global_step_\d+.*step \d+/12")
        run.process.kill()  # and everything goes with it
        run.process.wait()
        deadline = time.monotonic() + 30
        while run.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not run.left()


@pytest.mark.slow
def test_the_fourth_death_stops_the_run_and_what_a_rank_stops_at_is_said(prepared, tmp_path):
    path = prepared(ray={"engines": 1, "max_restarts": 0}, train={"steps": 50})
    with Launched(path, tmp_path / "run") as run:
        engine = int(run.wait_for(r"engine 0: process (\d+)")[1])
        run.wait_for("step 2/50")
        os.kill(engine, signal.SIGKILL)
        assert run.end(120) == 3 and re.search(
            r"rlfr-vlm train: engine 0.* died .*ray.max_restarts=0", run.text
        ), run.text[-4000:]
        assert not run.left()
    with Launched(path, tmp_path / "run", "optim.lr=0.5") as run:
        assert run.end() == 2, run.text[-4000:]
        assert re.search(r"rlfr-vlm train: .* was written with another config: optim.lr", run.text)


DEATHS = {
    "engine_load": 1,
    "engine_sync": 2,
    "engine_prefill": 3,
    "decode": 10,
}  # fault point: its passing in the process that dies there
GRADING = """
import hashlib, time

def reward(prompts, completions, **columns):
    with open({log!r}, "a") as file:
        file.write("x")
    time.sleep(1)  # the engine is idle
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("action", "number", "timeout_s"),
    [("kill", signal.SIGKILL, 600), ("stop", signal.SIGSTOP, 80)],
    ids=["kill", "stop"],
)
def test_an_engine_that_dies_at_any_point_changes_nothing(
    prepared, tmp_path, figure, action, number, timeout_s
):
    """While it loads, gets weights, begins to sample, decodes, and waits: five processes in a row
    die, or hang, each at another point.
    """
    (tmp_path / "noisy.py").write_text(GRADING.format(log=str(tmp_path / "graded")))
    path = prepared(
        train={"steps": 6, "save_steps": 6, "timeout_s": timeout_s},
        ray={"engines": 1, "max_restarts": 9},
    )
    train(
        load_config(path, ("launcher=process", "ray.engines=0", f"output_dir={tmp_path / 'plain'}"))
    )
    (tmp_path / "graded").unlink()
    faults = ",".join(f"{point}:{nth}:{action}:{tmp_path / point}" for point, nth in DEATHS.items())
    begun = time.monotonic()
    with Launched(path, tmp_path / "ray", RLFR_FAULT=faults) as run:
        while len((tmp_path / "graded").read_text() if (tmp_path / "graded").exists() else "") < 5:
            assert run.process.poll() is None and time.monotonic() < begun + START, run.text[-4000:]
            time.sleep(0.02)
        os.kill(int(re.findall(r"engine 0.*process (\d+)", run.text)[-1]), number)
        assert run.end() == 0, run.text[-4000:]
        assert not run.left() and not traces(run.process.pid)
    assert all((tmp_path / point).exists() for point in DEATHS)
    assert weights(tmp_path / "ray", 6) == weights(tmp_path / "plain", 6)
    spent = time.monotonic() - begun
    figure(
        "R7",
        f"{action} at {', '.join(DEATHS)}, idle: 5 of 5 replaced and refitted, final weights "
        f"bit-equal, {spent:.0f} s in all",
    )


@pytest.mark.reliability
def test_the_fourth_death_of_an_engine_ends_the_run(prepared, tmp_path, figure):
    path = prepared(ray={"engines": 1}, train={"steps": 50})
    with Launched(path, tmp_path / "run", RLFR_FAULT="decode:3:kill") as run:
        assert run.end() == 3, run.text[-4000:]
        last = run.text.strip().splitlines()[-1]
        assert re.search(r"rlfr-vlm train: .*engine 0.*ray.max_restarts=3", last), run.text[-4000:]
        assert not run.left()
    figure("R7", "4th death of an engine: exit 3, engine 0 named")


CLUSTER = """
import sys, logging
from rlfr_vlm.launch.placement import private_folder

with private_folder() as folder:
    import os, ray
    found = ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=str(folder), log_to_driver=False)
    print(found.address_info["gcs_address"], os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
    sys.stdin.read()
    print(ray.get(ray.remote(lambda: "alive").remote(), timeout=120), flush=True)
"""


@pytest.mark.slow
def test_a_running_cluster_is_joined_with_its_token_and_left_running(prepared, tmp_path):
    path = prepared(train={"steps": 2})
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        address, token = next(line for line in cluster.stdout if "127.0.0.1" in line).split()
        with Launched(path, tmp_path / "refused", f"ray.address={address}") as run:
            assert (
                run.end() == 2 and f"ray.address={address}: " in run.text and "token" in run.text
            ), run.text[-4000:]
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        with Launched(path, tmp_path / "run", f"ray.address={address}", **secret) as run:
            assert run.end() == 0, run.text[-4000:]
            assert not run.left()
        assert (tmp_path / "run" / "hf" / "global_step_2").is_dir()
        assert "alive" in cluster.communicate(timeout=180)[0]
