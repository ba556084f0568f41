"""R14: nothing of a run can be reached from another machine, and a run needs none."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack

import pytest

from tests.launch.test_ray import Launched, intrude, listening, on_loopback
from tests.report.test_report import make_run
from tests.runs import ROOT, make_config, make_text_data
from tests.test_launch import free_port

PERIOD = 0.2  # seconds between two looks
REWARD = """
import hashlib, time

def reward(prompts, completions, **columns):
    time.sleep(0.4)
    return [hashlib.sha256(str(text).encode()).digest()[0] / 255 for text in completions]
"""


class Looking:
    """Which addresses the processes of a run listen on, from its start to its end."""

    def __init__(self, mark):
        self.mark, self.owned, self.looks = mark, set(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._ended.wait(PERIOD):
            self.owned |= set(listening(self.mark))
            self.looks += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    @property
    def found(self):
        """All addresses."""
        return {address for address, _ in self.owned}

    @property
    def open(self):
        """Those that others could reach."""
        return {address for address in self.found if not on_loopback(address)}


@pytest.fixture
def config(model_folder, tmp_path):
    make_text_data(tmp_path)
    (tmp_path / "slow.py").write_text(REWARD)
    reward = {"function": f"{tmp_path / 'slow.py'}:reward"}
    return make_config(tmp_path, model_folder("qwen2"), flow=None, reward=reward)


def test_a_socket_on_every_interface_is_seen():
    """The negative control of what follows."""
    mark = f"RLFR_TEST_RUN={uuid.uuid4().hex}"
    name, value = mark.split("=")
    for address, reachable in (("0.0.0.0", True), ("::", True), ("127.0.0.1", False)):
        code = (
            f"import socket, sys, time\ns = socket.create_server(({address!r}, 0), "
            f"family=socket.AF_INET6 if ':' in {address!r} else socket.AF_INET)\nprint(1, "
            "flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, name: value}, stdout=subprocess.PIPE
        ) as server:
            server.stdout.readline()
            (found,) = [address for address, _ in listening(mark)]
            assert on_loopback(found) is not reachable
            server.kill()


def test_a_served_report_is_this_machines_own(tmp_path, figure):
    run = make_run(tmp_path / "run", steps=2)
    mark = f"RLFR_TEST_RUN={uuid.uuid4().hex}"
    name, value = mark.split("=")
    command = [sys.executable, "-m", "rlfr_vlm.cli", "report", str(run), "--serve"]
    environment = {**os.environ, name: value}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  whatever shell started the tests in its background
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        found = [address for address, _ in listening(mark)]
        process.send_signal(signal.SIGINT)
    assert len(found) == 1 and all(on_loopback(address) for address in found)
    figure("R14", "`report --serve`: 1 socket, 0 that are not loopback")


@pytest.mark.reliability
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_by_ray_listens_on_loopback_from_start_to_end(config, tmp_path, ranks, figure):
    sections = ("launcher=ray", "ray.engines=1", f"deepspeed={{ranks: {ranks}, zero_stage: 2}}")
    with Launched(config, tmp_path / "run", *sections) as run, Looking(run.mark) as look:
        run.wait_for("step 1/4")
        intrude(listening(run.mark))
        assert run.end() == 0, run.text[-4000:]
    assert len(look.found) > 4 and look.looks > 20
    assert look.open == set()
    said = (
        f"{len(look.found)} sockets in {look.looks} looks from start to end, 0 that are not "
        "loopback; an intruder is refused"
    )
    figure("R14", f"launcher=ray, {ranks} rank{'s' * (ranks > 1)} and an engine: {said}")


@pytest.mark.reliability
@pytest.mark.parametrize("launcher", ["torchrun", "variables"])
def test_ranks_without_ray_listen_on_loopback_from_start_to_end(config, tmp_path, launcher, figure):
    """torchrun listens on every interface for itself, whatever one tells it; ranks that a shell or
    deepspeed started are on loopback alone.
    """
    mark = f"RLFR_TEST_RUN={uuid.uuid4().hex}"
    command = [
        "-m",
        "rlfr_vlm.cli",
        "train",
        "--config",
        str(config),
        f"output_dir={tmp_path / 'run'}",
        "deepspeed={zero_stage: 2}",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        mark.split("=")[0]: mark.split("=")[1],
    }
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    if launcher == "torchrun":
        commands = [
            (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command], {})
        ]
    else:
        commands = [
            (command, {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
        ]
    with Looking(mark) as look, ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *c], cwd=ROOT, env=environment | more, stdout=log, stderr=log
                )
            )
            for c, more in commands
        ]
        assert [process.wait(300) for process in started] == [0] * len(started), (
            tmp_path / "log"
        ).read_text()[-3000:]
    ranks = {
        address
        for address, pid in look.owned
        if pid not in {process.pid for process in started} or launcher == "variables"
    }
    assert len(ranks) > 2 and {address for address in ranks if not on_loopback(address)} == set()
    assert bool(look.open) is (launcher == "torchrun")
    said = (
        f"2 ranks started by {launcher}: {len(ranks)} sockets of theirs in {look.looks} looks, "
        "0 that are not loopback"
    )
    figure(
        "R14",
        said + f", and {len(look.open)} of torchrun's own that are not" * (launcher == "torchrun"),
    )


@pytest.mark.reliability
@pytest.mark.parametrize("launcher", [(), ("launcher=ray", "ray.engines=1")])
def test_a_run_needs_no_network(config, tmp_path, launcher, figure):
    start = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    if subprocess.run([*start, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("the kernel gives no network of one's own here")
    inner = [
        sys.executable,
        "-m",
        "rlfr_vlm.cli",
        "train",
        "--config",
        str(config),
        f"output_dir={tmp_path / 'run'}",
        *launcher,
    ]
    command = [*start, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inner]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
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
    assert (tmp_path / "run/hf/global_step_4").is_dir()
    how = "launcher=ray" if launcher else "one process"
    figure(
        "R14",
        f"without a network but loopback, {how}: trains to the end in "
        f"{time.monotonic() - begun:.0f} s",
    )
