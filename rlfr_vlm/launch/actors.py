"""The processes of launcher=ray: what a training rank and a rollout engine are, whoever starts
them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.launch.processes import Ended, Place, started
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Launch, Ranks, join
from rlfr_vlm.rollout.remote import RemoteEngine, Workers
from rlfr_vlm.rollout.worker import ErrorMessage, RolloutWorker, answered


class Actor:
    """A process of the run; its name stands before each line that it writes."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        with suppress(OSError):
            os.chdir(folder)  # paths of the config are relative to it

    def __repr__(self) -> str:
        return self.name

    def place(self, node: str) -> Place:
        """Where this is. node: what the cluster calls the machine."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Place(
            socket.gethostname(),
            node,
            os.getpid(),
            started(os.getpid()),
            f"GPU {gpus}" if gpus else "CPU",
        )


class TrainerActor(Actor):
    """A training rank."""

    def port(self, host: str) -> int | ErrorMessage:
        """A port that rank 0 will listen on: bound until then, by a socket that lets this process
        bind it once more.
        """
        self._held = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
        )
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._held.bind((host, 0))
        except OSError as error:
            self._held.close()
            return ErrorMessage(
                "UserError",
                f"ray.bind={host} is no address of {socket.gethostname()}, where rank 0 is: "
                f"{error.strerror}",
            )
        return self._held.getsockname()[1]

    def run(
        self, cfg: Config, train_rank: Callable[..., Path], launch: Launch, workers: Workers | None
    ) -> Ended:
        """Train to the end. Errors are values here, so that the launcher can tell the first from
        those that follow from it.
        """
        told = {
            "RANK": launch.rank,
            "WORLD_SIZE": launch.size,
            "LOCAL_RANK": launch.local_rank,
            "LOCAL_WORLD_SIZE": launch.local_size,
        }
        os.environ |= {
            name: str(value) for name, value in told.items()
        }  # DeepSpeed looks there as well
        try:
            ranks = join(cfg, launch)
            path = train_rank(
                cfg, ranks, partial(_remote_engine, cfg, workers) if workers is not None else None
            )
            ranks.leave()
            return Ended(path=str(path))
        except Exception as error:
            return Ended.of(error)


def _remote_engine(cfg: Config, workers: Workers, policy: Policy, ranks: Ranks) -> RemoteEngine:
    return RemoteEngine(cfg, policy, ranks, workers)


class EngineActor(Actor):
    """A rollout worker. It loads at its first call, because an error in a constructor would only
    say that the actor died.
    """

    def __init__(self, name: str, folder: str, cfg: Config) -> None:
        super().__init__(name, folder)
        self.cfg = cfg
        self._worker: RolloutWorker | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of RolloutWorker; see `answered`."""
        try:
            self._worker = self._worker or RolloutWorker(self.cfg)
        except UserError as error:
            return ErrorMessage.of(error)
        return answered(self._worker, method, arguments)
