"""The processes that train together: who they are, what they tell each other, and how long they
wait for it.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from rlfr_vlm.config import Config
from rlfr_vlm.errors import StoppedError, UserError

T = TypeVar("T")
LOOPBACK = ("127.", "localhost", "::1")
JOIN_SECONDS = 300.0  # for all ranks to start
ADD_BYTES = 2**28
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


@dataclass(frozen=True)
class Launch:
    """What torchrun, deepspeed or an actor told this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    agent: bool = False  # torchrun holds the port itself


class Ranks:
    """All training processes, this one among them. Every method that exchanges something must be
    called by all of them, in the same order.

    They talk over gloo, beside whatever moves tensors; each wait ends after `timeout_s`, with an
    error that says where every rank is.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, timeout_s: float = 1800.0, store: Any = None
    ) -> None:
        """store: where the ranks note where they are."""
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store, self._place = store, "start"
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            if size > 1
            else None
        )

    @property
    def first(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    def at(self, place: str) -> None:
        """Note where this rank is, for the others' error messages."""
        self._place = place
        if self._store is not None:
            # the store died with rank 0: the collective that follows says so
            with suppress(RuntimeError):
                self._store.set(f"at/{self.rank}", place)

    def gather(self, value: T, place: str) -> list[T]:
        """Every rank's value, by rank. Raises StoppedError when a rank does not answer in time, or
        died.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.at(place)
        try:
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        return found

    def merge(self, values: Sequence[T], place: str) -> list[T]:
        """All ranks' values, one after the other."""
        return [value for part in self.gather(list(values), place) for value in part]

    def broadcast(self, value: T, place: str) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        found = [value]
        self.at(place)
        try:
            dist.broadcast_object_list(found, src=0, group=self._group)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        return found[0]

    def sum(self, values: dict[str, float], place: str) -> dict[str, float]:
        """Sums by name over all ranks; a name that a rank lacks counts as 0 there."""
        found = self.gather(values, place)
        return {
            name: sum(part.get(name, 0.0) for part in found)
            for name in dict.fromkeys(n for part in found for n in part)
        }

    def agree(self, problem: Exception | None, place: str) -> None:
        """Raise on every rank when one of them has a problem: its own where it has one, else the
        first other rank's.
        """
        problems = self.gather(None if problem is None else (type(problem), str(problem)), place)
        if problem is not None:
            raise problem
        for rank, found in enumerate(problems):
            if found is not None:
                kind, text = found
                raise (kind if issubclass(kind, UserError) else StoppedError)(
                    f"rank {rank}: {text}"
                )

    def total(self, values: Sequence[float], place: str) -> list[float]:
        """Sums, place by place, over all ranks."""
        return [sum(column) for column in zip(*self.gather(list(values), place), strict=True)]

    def places(self, count: int) -> range:
        """Which of `count` things in a row are this rank's: each size-th."""
        return range(self.rank, count, self.size)

    def add_up(self, tensors: Sequence[torch.Tensor], place: str) -> None:
        """Sum tensors over all ranks, in place, some of them at a time."""
        if self.size == 1:
            return
        self.at(place)
        for part in _buckets(tensors, ADD_BYTES):
            flat = torch._utils._flatten_dense_tensors(part)
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                raise self.lost(place, error) from error
            for tensor, summed in zip(
                part, torch._utils._unflatten_dense_tensors(flat, part), strict=True
            ):
                tensor.copy_(summed)

    def lost(self, place: str, error: Exception) -> StoppedError:
        """What to say when the others do not answer: where each rank was last."""
        where = []
        for rank in range(self.size):
            if rank != self.rank and self._store is not None:
                try:
                    self._store.set_timeout(timedelta(seconds=2))
                    where.append(
                        f"rank {rank} was last at `{self._store.get(f'at/{rank}').decode()}`"
                    )
                except (RuntimeError, ValueError):
                    where.append(f"rank {rank} cannot be asked")
        return StoppedError(
            f"rank {self.rank} waited at `{place}` and got no answer "
            f"({' '.join(str(error).split())[:160]}); {'; '.join(where)}"
        )

    @contextmanager
    def named(self) -> Iterator[None]:
        """Whatever waits for others in this block, DeepSpeed too, says where every rank was when it
        gives up.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and lost_others(error):
                raise self.lost(self._place, error) from error
            raise

    def limit_waits(self) -> None:
        """Put the time limit on every process group: DeepSpeed makes groups of its own and ignores
        the limit that it is given.
        """
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)

    def leave(self) -> None:
        """End the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def lost_others(error: BaseException) -> bool:
    """Whether an error of one rank says no more than that another one does not answer."""
    if isinstance(error, StoppedError):
        cause = error.__cause__ or error.__context__
        return cause is not None and lost_others(cause)
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out", text)
        is not None
    )


def _buckets(tensors: Sequence[torch.Tensor], max_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype in a row, about so many bytes at a time."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (
            bucket[0].dtype != tensor.dtype
            or sum(t.nbytes for t in bucket) + tensor.nbytes > max_bytes
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def launched() -> Launch:
    """What the environment says. Raises UserError naming the variable that is no number or is
    missing.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return Launch()
    size = _number("WORLD_SIZE")
    if size == 1 and "MASTER_PORT" not in os.environ:
        return Launch()
    rank, port = _number("RANK"), _number("MASTER_PORT")
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={size}")
    local = _number("LOCAL_RANK", rank)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(
        rank,
        size,
        local,
        _number("LOCAL_WORLD_SIZE", size),
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port,
        agent,
    )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        problem = "is not set" if text is None else f"is {text!r}, not a number"
        raise UserError(
            f"{name} {problem}: start ranks with torchrun, deepspeed or launcher=ray"
        ) from None


def check_launch(cfg: Config, launch: Launch) -> None:
    """Raises UserError naming the setting that does not fit the number of processes, before
    anything is loaded.
    """
    wanted = cfg.deepspeed.ranks if cfg.deepspeed is not None else 1
    if launch.size > 1 and cfg.deepspeed is None:
        raise UserError(
            f"deepspeed: {launch.size} processes were started (WORLD_SIZE), but the config trains "
            "in one; set deepspeed.zero_stage=2"
        )
    if wanted is not None and wanted != launch.size:
        start = (
            f"torchrun --standalone --nproc-per-node {wanted} -m rlfr_vlm.cli train ..., or "
            "launcher=ray"
        )
        raise UserError(
            f"deepspeed.ranks={wanted}, but {launch.size} process{'es' * (launch.size > 1)} "
            f"started: use {start}"
        )
    if (
        torch.cuda.is_available()
        and cfg.model.device == "auto"
        and launch.local_size > torch.cuda.device_count()
    ):
        raise UserError(
            f"LOCAL_WORLD_SIZE={launch.local_size} ranks on this machine, which has "
            f"{torch.cuda.device_count()} GPUs"
        )


def alone(verb: str) -> None:
    """Raises UserError where several processes were started for something that one does."""
    if (size := launched().size) > 1:
        raise UserError(
            f"{verb} runs in one process, {size} were started (WORLD_SIZE): only train runs on "
            "several ranks"
        )


def join(cfg: Config, launch: Launch | None = None) -> Ranks:
    """Meet the other ranks. Raises UserError naming the setting or the port that does not work;
    StoppedError when some never come.
    """
    launch = launch or launched()
    check_launch(cfg, launch)
    if cfg.deepspeed is None:
        return Ranks(timeout_s=cfg.train.timeout_s)
    if launch.agent:
        _end_with_parent()
    if launch.host.startswith(LOOPBACK):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME",
            next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo"),
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    store: Any = dist.HashStore() if launch.size == 1 else _store(launch)
    timeout = timedelta(seconds=cfg.train.timeout_s)
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and cfg.model.device != "cpu" else "gloo"
    )
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise StoppedError(
            f"rank {launch.rank} of {launch.size}: the others did not come: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return Ranks(launch.rank, launch.size, cfg.train.timeout_s, dist.PrefixStore("rlfr", store))


def _end_with_parent() -> None:
    """torchrun starts ranks in sessions of their own: killed, it would leave them behind, training
    on and holding the run's folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_rank(code: int) -> NoReturn:
    """End this process, one of several ranks, with an exit code. Exit handlers run; the interpreter
    is not taken down.

    While it is, native code now and then aborts the process (in 2 of about 50 runs on two ranks
    over gloo; most likely a thread of a process group): one that had saved everything would end
    with SIGABRT, and the launcher would call it failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store(launch: Launch) -> dist.TCPStore:
    """The key-value store that ranks meet at. Rank 0 listens on MASTER_ADDR only, where torch by
    itself would listen on every interface.
    """
    listening = None
    if launch.rank == 0 and not launch.agent:
        listening = listen(launch.host, launch.port)
    try:
        return dist.TCPStore(
            launch.host,
            launch.port,
            launch.size,
            is_master=listening is not None,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
            master_listen_fd=listening.detach() if listening is not None else None,
        )
    except RuntimeError as error:  # DistNetworkError among them
        raise StoppedError(
            f"rank {launch.rank} of {launch.size}: nobody answers at MASTER_ADDR={launch.host}, "
            f"MASTER_PORT={launch.port} ({' '.join(str(error).split())[:160]})"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address and no other; port 0 takes a free one. Raises UserError
    naming what is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        why = (
            "is in use by another process: choose another one"
            if in_use
            else f"cannot be listened on at MASTER_ADDR={host}: {error}"
        )
        raise UserError(f"MASTER_PORT={port} {why}") from None
    return listening
