"""What the actors of launcher=ray need of a cluster, and where it is: everything that can be said
before Ray is started.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.launch.processes import end_leftovers, started

PREFIX = "rlfr-ray-"
CONNECT_SECONDS = 10.0  # for a cluster that is named to answer
END_SECONDS = 10.0  # for Ray's own processes to end by themselves
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_",
    "TRANSFORMERS_",
    "VLLM_",
    "NCCL_",
    "GLOO_",
    "RLFR_",
)
ACTORS_PER_CORE = 8  # at most, where there are no GPUs


@dataclass(frozen=True)
class Needs:
    """What one actor of each kind reserves."""

    trainers: int
    engines: int
    cpus: float
    trainer_gpus: int
    engine_gpus: int

    @classmethod
    def of(cls, cfg: Config, cpus: float, gpus: float) -> Needs:
        """Raises UserError naming the settings that ask for more than there is."""
        trainers = (cfg.deepspeed.ranks or 1) if cfg.deepspeed is not None else 1
        engines, split, device = cfg.ray.engines, cfg.rollout.vllm.tensor_parallel, cfg.model.device
        asked = f"deepspeed.ranks={trainers} and ray.engines={engines}"
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"model.device={device}: with launcher=ray each actor sees its own GPU only; use "
                "auto"
            )
        if device == "cuda" and not gpus:
            raise UserError("model.device=cuda, but the cluster has no GPU")
        if gpus and device != "cpu":
            wanted = trainers + engines * split
            if wanted > gpus:
                many = f" x rollout.vllm.tensor_parallel={split}" * (split > 1)
                raise UserError(f"{asked}{many} need {wanted} GPUs, but the cluster has {gpus:g}")
            return cls(trainers, engines, min(1.0, _share(cpus, trainers + engines)), 1, split)
        if trainers + engines > ACTORS_PER_CORE * cpus:
            raise UserError(
                f"{asked} are {trainers + engines} processes, but the cluster has {cpus:g} CPU "
                f"cores, for {ACTORS_PER_CORE * cpus:g} at most"
            )
        return cls(trainers, engines, min(1.0, _share(cpus, trainers + engines)), 0, 0)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """For a placement group: the trainers, then the engines."""
        kinds = [self.trainer_gpus] * self.trainers + [self.engine_gpus] * self.engines
        return [{"CPU": self.cpus, **({"GPU": gpus} if gpus else {})} for gpus in kinds]


def _share(cpus: float, actors: int) -> float:
    """Ray counts in steps of 0.0001."""
    return int(1000 * cpus / actors) / 1000


@cache
def _token() -> str:
    """One for all clusters of this process: Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for the files of a cluster of one's own, and the environment that keeps others out
    of it.

    Afterwards every process that was started in this environment is gone, and so is the folder.
    """
    # names of sockets have at most 107 letters
    parent = Path("/tmp" if len(tempfile.gettempdir()) > 24 else tempfile.gettempdir())
    remove_orphans(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    token = folder / "token"
    try:
        (folder / "owner").write_text(f"{os.getpid()} {started(os.getpid())}")
        token.touch(0o600)
        token.write_text(_token())
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ |= {
            # where Ray has no clusters, all of its sockets listen on loopback
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # would kill actors at 95 % of the memory, whoever else uses it
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_NUM_REDIS_GET_RETRIES": "120",  # a busy machine takes its time
            "RAY_worker_register_timeout_seconds": "300",
            # 15 by default: training would run in whatever time others leave
            "RAY_worker_niceness": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_DEDUP_LOGS": "0",
            "TQDM_DISABLE": "1",
        }
        yield folder / "ray"
    finally:
        end_leftovers(f"RAY_AUTH_TOKEN_PATH={token}", END_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def remove_orphans(parent: Path) -> None:
    """Remove such folders of this user whose process was killed before it could."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, ValueError):
            pid, since = (folder / "owner").read_text().split()
            if folder.stat().st_uid == os.getuid() and started(int(pid)) != since:
                end_leftovers(f"RAY_AUTH_TOKEN_PATH={folder / 'token'}", END_SECONDS)
                shutil.rmtree(folder, ignore_errors=True)


def passed_on() -> dict[str, str]:
    """What of the user's environment goes along to a cluster that others started."""
    return {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}


def store_bytes(cfg: Config) -> int:
    """Size of the object store: the buckets of a weight sync that are under way, and some more;
    taken only as it is filled.
    """
    wanted = 2**28 + (4 * 2**20 * cfg.rollout.sync_bucket_mib if cfg.ray.engines else 0)
    with suppress(OSError):
        wanted = min(wanted, int(0.8 * shutil.disk_usage("/dev/shm").free))
    return max(wanted, 80 * 2**20)


def find_cluster(address: str) -> tuple[str, int]:
    """Host and port of a cluster that answers. Raises UserError naming the address, within
    CONNECT_SECONDS.
    """
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS", "")
        with suppress(OSError):
            found = found or Path("/tmp/ray/ray_current_cluster").read_text().strip()
        if not found:
            raise UserError(
                "ray.address=auto: no cluster runs on this machine, and RAY_ADDRESS is not set; "
                "use local, or HOST:PORT"
            )
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"ray.address={address}: `{found}` is not of the form HOST:PORT (nor local, nor auto)"
        )
    if not answers(host.strip("[]"), int(port)):
        raise UserError(f"ray.address={address}: no Ray cluster answers at {found}")
    return host, int(port)


def answers(host: str, port: int) -> bool:
    """Whether something speaks HTTP/2 there, as Ray's server does: Ray itself would try for over a
    minute.
    """
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS / 2) as connection:
            connection.settimeout(CONNECT_SECONDS / 2)
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4" + bytes(5))
            return connection.recv(9)[3:4] == b"\4"  # its settings
    except (OSError, OverflowError):
        return False


def own_address() -> str:
    """The address of this machine that others see; loopback where there is none."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"
