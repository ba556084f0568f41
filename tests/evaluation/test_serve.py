"""A real vLLM on loopback: it answers, keeps no key, listens to nobody else, and leaves nothing
behind.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlfr_vlm
from rlfr_vlm.config import EndpointConfig, JudgeConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.server import keeper
from rlfr_vlm.evaluation.server.endpoint import ChatReply, ChatRequest, Endpoint
from rlfr_vlm.evaluation.server.judge import Judge, JudgeItem
from rlfr_vlm.evaluation.server.serve import environment, serve

KEY = "sk-SENTINEL-0123456789abcdef"
ROOT = Path(rlfr_vlm.__file__).parent.parent
LIMITS = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_gib": 0.125}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
linux_only = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks processes up under /proc"
)


@pytest.fixture
def compiled_once(request, monkeypatch):
    """Where Python writes no bytecode, three processes would each compile all of vLLM and torch."""
    if sys.dont_write_bytecode:
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(request.config.cache.mkdir("bytecode")))


def members(group):
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def groups_of_children():
    """Process groups led by children of this process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and stat.parent.name == pgrp and state != "Z":
            found.append(int(pgrp))
    return found


def listening(pids):
    """(address in hex, port) of every listening TCP socket of these processes."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


def gone(group, seconds):
    deadline = time.monotonic() + seconds
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not members(group)


@needs_vllm
@linux_only
def test_it_answers_and_leaves_nothing_behind(model_folder, tmp_path, monkeypatch, compiled_once):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "PYTHON_KEY", "SOMEBODYS_THING"):
        monkeypatch.setenv(name, KEY)
    log = tmp_path / "vllm.log"
    before = set(groups_of_children())
    with serve(model_folder("qwen2"), "tiny", **LIMITS, log=log) as api_base:
        (group,) = set(groups_of_children()) - before
        pids = members(group)
        assert len(pids) >= 3 and api_base.startswith("http://127.0.0.1:")
        for pid in pids:
            assert (
                KEY.encode()
                not in Path(f"/proc/{pid}/environ").read_bytes()
                + Path(f"/proc/{pid}/cmdline").read_bytes()
            )
        sockets = listening(pids)
        assert int(api_base.split(":")[2].split("/")[0]) in [port for _, port in sockets]
        assert {address for address, _ in sockets} <= {
            "0100007F",
            "00000000000000000000000001000000",
            "0000000000000000FFFF00000100007F",
        }

        endpoint = Endpoint(EndpointConfig(model="tiny", api_base=api_base))
        endpoint.probe()
        requests = [
            ChatRequest(
                [{"role": "user", "content": f"{i} + 3 = ?"}],
                temperature=1.0,
                top_p=0.9,
                max_tokens=8,
                seed=i,
            )
            for i in range(6)
        ]
        first, second = (dict(endpoint.chat(requests)) for _ in range(2))
        assert all(
            isinstance(r, ChatReply) and r.response_tokens > 0 and r.prompt_tokens > 5
            for r in first.values()
        )
        assert [first[i].text for i in range(6)] == [second[i].text for i in range(6)] and len(
            {r.text for r in first.values()}
        ) > 1
        with pytest.raises(UserError, match="does not serve `other` but tiny"):
            Endpoint(EndpointConfig(model="other", api_base=api_base)).probe()
        cfg = JudgeConfig(model="tiny", api_base=api_base, max_tokens=16)
        ((_, verdict),) = Judge(cfg, Endpoint(cfg)).judge(
            [JudgeItem("3 + 4?", "7", "7", "It is 7.")]
        )
        assert (
            verdict.verdict == "failed" and verdict.attempts == 3
        )  # a random model decides nothing
    assert not members(group) and KEY not in log.read_text()
    with pytest.raises(UserError, match="cannot be reached"):
        Endpoint(EndpointConfig(model="tiny", api_base=api_base, retries=0)).probe()


@needs_vllm
@linux_only
def test_a_server_that_is_not_ready_in_time_is_stopped(model_folder):
    before = set(groups_of_children())
    with (
        pytest.raises(UserError, match="was not ready in time"),
        serve(model_folder("qwen2"), start_seconds=0.5),
    ):
        raise AssertionError("it cannot have started")
    assert set(groups_of_children()) <= before


@needs_vllm
@pytest.mark.slow
def test_a_server_that_does_not_start_is_quoted(tmp_path, compiled_once):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    start = time.monotonic()
    with (
        pytest.raises(UserError, match=r"vLLM did not start: .*no_such_type"),
        serve(str(tmp_path)),
    ):
        raise AssertionError("it cannot have started")
    assert time.monotonic() - start < 120  # seen at once, not at the deadline


def test_the_servers_environment(monkeypatch):
    for name in (
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "VLLM_API_KEY",
        "PYTHON_SECRETS",
        "TORCH_AUTH_HEADER",
        "http_proxy",
        "RANK",
    ):
        monkeypatch.setenv(name, KEY)
    kept = {
        "HF_HOME": "/a",
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_USE_V2": "1",
    }
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    given = environment()
    assert (
        KEY not in given.values()
        and kept.items() <= given.items()
        and given["PATH"] == os.environ["PATH"]
    )


# -- the keeper alone ------------------------------------------------------------------------------

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
print(child.pid, flush=True)
time.sleep({seconds})
"""


def keep(code, starter, **streams):
    command = [
        sys.executable,
        "-I",
        keeper.__file__,
        str(starter),
        "0.3",
        sys.executable,
        "-c",
        code,
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        **streams,
    )


@linux_only
@pytest.mark.parametrize("seconds", [60, 0.3])
def test_the_keeper_ends_a_stubborn_group(seconds):
    """When its input closes (60), and when the command ends by itself and leaves a child (0.3)."""
    process = keep(STUBBORN.format(seconds=seconds), os.getpid())
    child = int(process.stdout.readline())
    assert child in members(process.pid)
    start = time.monotonic()
    if seconds == 60:
        process.stdin.close()
    assert gone(process.pid, 20) and time.monotonic() - start < 20
    assert process.wait() == -signal.SIGKILL


@linux_only
def test_the_keeper_outlives_its_starter_by_a_moment_even_where_a_fork_holds_the_pipe():
    code = (
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom "
        "tests.evaluation.test_serve import STUBBORN, keep\nprocess = "
        "keep(STUBBORN.format(seconds=60), os.getpid())\nprocess.stdout.readline()\nfork = "
        "os.fork()\nif fork: print(process.pid, fork, flush=True)\ntime.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    group, fork = map(int, starter.stdout.readline().split())
    try:
        assert len(members(group)) == 3
        starter.kill()
        starter.wait()
        assert gone(group, 20)
    finally:
        os.kill(fork, signal.SIGKILL)


@needs_vllm
@linux_only
@pytest.mark.slow
def test_no_orphan_when_the_parent_is_killed(model_folder, compiled_once):
    code = (
        "import sys, time\nfrom rlfr_vlm.evaluation.server.serve import serve\nwith "
        f"serve({model_folder('qwen2')!r}, 'tiny', **{LIMITS!r}) as api_base:\n    print(api_base, "
        "flush=True)\n    time.sleep(300)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    api_base = parent.stdout.readline().strip()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    (group,) = [
        int(pid) for pid in children if "keeper.py" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    endpoint = Endpoint(EndpointConfig(model="tiny", api_base=api_base, retries=0))
    endpoint.probe()
    assert len(members(group)) >= 3
    parent.kill()
    parent.wait()
    assert gone(group, 40)
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint.probe()
