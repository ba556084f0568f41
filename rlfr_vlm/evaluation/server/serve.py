"""A vLLM server on loopback for as long as it is needed: it outlives neither its use nor the death
of its user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.server import keeper

START_SECONDS = 900.0  # to load a model; a big one from a slow disk takes minutes
STOP_SECONDS = 15.0  # between SIGTERM and SIGKILL
LOG_LINES = 8  # of vLLM's in an error
STARTS = 3  # each on another port, in case somebody takes the one that was free

# What the server gets of the environment: no key, no token, no address of a proxy (which may hold a
# password).
NAMES = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "CC",
    "CXX",
)
PREFIXES = (
    "PYTHON",
    "VLLM_",
    "HF_",
    "CUDA",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "TORCH",
    "TRITON_",
    "XDG_",
    "TOKENIZERS_",
    "SSL_CERT_",
)
SECRET = re.compile(r"(^|_)(KEYS?|TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_|$)")


@contextmanager
def serve(
    model: str,
    name: str | None = None,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    kv_cache_gib: float = 1.0,
    gpu_memory_utilization: float = 0.85,
    dtype: str = "auto",
    enforce_eager: bool = True,
    start_seconds: float = START_SECONDS,
    log: Path | None = None,
) -> Iterator[str]:
    """Serve the model at a folder or hub name under `name` (default: its last part); gives
    http://127.0.0.1:PORT/v1.

    kv_cache_gib is the KV cache on CPU, gpu_memory_utilization the share of a GPU (less, where
    others already use it). `log` receives vLLM's messages. Raises UserError with the last of them
    where it does not start.
    """
    if importlib.util.find_spec("vllm") is None:  # looks, does not import
        raise UserError(
            f"serve {model}: vLLM is not installed; install it (extra `vllm`, or `cpu`), or set "
            "api_base to a running server"
        )
    options = {
        "--model": model,
        "--served-model-name": name or Path(model).name,
        "--host": "127.0.0.1",
        "--max-num-seqs": str(max_num_seqs),
        "--dtype": dtype,
        # neutral defaults, not the model's: what shapes the sampling stands in the requests
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
        # auto: the model's, or what the cache holds where that is less
        "--max-model-len": str(max_model_len or "auto"),
        **_memory(kv_cache_gib, gpu_memory_utilization),
    }
    command = [part for option in options.items() for part in option] + [
        "--enforce-eager"
    ] * enforce_eager
    with tempfile.TemporaryDirectory(prefix="rlfr-serve-") as folder:
        process, api_base = _start(
            command, log or Path(folder) / "vllm.log", time.monotonic() + start_seconds
        )
        try:
            yield api_base
        finally:
            _stop(process)


def environment() -> dict[str, str]:
    """What a server is given of this process's environment, and what keeps it on loopback and
    silent to the world.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if (k in NAMES or k.startswith(PREFIXES)) and not SECRET.search(k)
    }
    loopback = next(
        (interface for _, interface in socket.if_nameindex() if interface.startswith("lo")), "lo"
    )
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind"
    }  # else its threads share one core with whoever else is bound there
    fixed = {
        # the engine is a process either way; on CPU this saves it another (half of the start)
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    return defaults | kept | fixed


def _memory(kv_cache_gib: float, gpu_memory_utilization: float) -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"--kv-cache-memory-bytes": str(int(kv_cache_gib * 2**30))}
    if torch.cuda.is_initialized():  # the policy is there
        free, total = torch.cuda.mem_get_info()
        gpu_memory_utilization = min(gpu_memory_utilization, 0.9 * free / total)
    return {"--gpu-memory-utilization": f"{gpu_memory_utilization:.3f}"}


def _start(command: list[str], log: Path, deadline: float) -> tuple[subprocess.Popen[bytes], str]:
    """A server that answers, and its address."""
    model = command[1]
    for _ in range(STARTS):
        port = _free_port()
        server = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *command,
            "--port",
            str(port),
        ]
        keeping = [sys.executable, "-I", keeper.__file__, str(os.getpid()), str(STOP_SECONDS)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*keeping, *server],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment(),
            )
        try:
            while not _ended(process):
                if _healthy(port):
                    return process, f"http://127.0.0.1:{port}/v1"
                if time.monotonic() > deadline:
                    raise UserError(
                        f"serve {model}: vLLM was not ready in time; it last said: "
                        f"{_last_words(log)}"
                    )
                time.sleep(0.2)
        except BaseException:
            _stop(process)
            raise
        _stop(process)
        if "address already in use" not in log.read_text(errors="replace").lower():
            break
    raise UserError(f"serve {model}: vLLM did not start: {_last_words(log)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=2.0).status_code
            == 200
        )
    except httpx.HTTPError:
        return False


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; it is not reaped, so that its number still belongs to its group."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the keeper end its group; where it does not, or died itself, do it here."""
    assert process.stdin is not None
    process.stdin.close()
    deadline = time.monotonic() + STOP_SECONDS + 5
    while not _ended(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path) -> str:
    """The errors in vLLM's log with the lines that explain them, once each, or its last lines."""
    text = re.sub(
        r"(?m)^\(\w+ pid=\d+\) ?|^ERROR [\d: -]+\[\S+\] ?", "", log.read_text(errors="replace")
    )
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    words = [
        line
        for n in errors
        for line in lines[n : n + 3]
        if not line.startswith(("Traceback", "File "))
    ]
    return " | ".join(list(dict.fromkeys(words or lines))[-LOG_LINES:]) or "nothing"
