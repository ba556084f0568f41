"""The grader of training and evaluation: comparisons run in worker processes that cannot hang,
crash or starve the caller.

A worker is this module in a fresh interpreter (`python -m rlfr_vlm.rewards.grader`): no fork of a
process with threads, no import of the caller's script, no torch, and no environment variables
beyond what an interpreter needs, so no keys. It answers one line of JSON with another. The kernel
ends a worker whose verdict takes more CPU time than allowed, even where C code holds the
interpreter lock. CPU time decides rather than wall time, so that a busy machine does not change
rewards: the wall limit ends a worker that stands still, and one that gets a little CPU time now and
then only after PATIENCE such limits. Whichever limit is met, the verdict is `error`, never a
reward.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from rlfr_vlm.rewards.answers import MAX_GOLD, gold_problem, grade_answer
from rlfr_vlm.rewards.extract import MAX_ANSWER, Where, extract_answer, unwrap_gold
from rlfr_vlm.types import Verdict

if TYPE_CHECKING:
    import psutil

    from rlfr_vlm.config import GraderConfig

__all__ = ["Gold", "Graded", "Grader", "extract_answer", "gold_problem", "grade_answer"]

Gold = str | tuple[str, ...] | list[str]  # one gold answer, or several of which any is right
MAX_GOLDS = 8  # of one item: with so many its request still fits into a pipe
START_SECONDS = 120.0  # wall time for a worker to import sympy; about 1.5 s of CPU time
LATE = "wall limit"  # how the reason begins where a busy machine did not come to a verdict
PATIENCE = 12  # wall limits in a row that a worker may take as long as each brings it CPU time
MAX_FAILED_STARTS = 3  # in a row, before the fault is taken for one of the installation
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONHOME",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
)


@dataclass(frozen=True)
class Graded:
    """One graded response."""

    verdict: Verdict
    # the answer as extracted, cut at MAX_ANSWER + 1 characters; "" if there is none
    prediction: str
    reason: str = ""  # of an error


# --- in the worker --------------------------------------------------------------------------------


def _peak_bytes() -> int:
    """Largest address space that this process has had; 0 where the system does not tell (not
    Linux).
    """
    try:
        with open("/proc/self/status", "rb") as status:
            return next(
                (int(line.split()[1]) * 1024 for line in status if line.startswith(b"VmPeak:")), 0
            )
    except FileNotFoundError:
        return 0


def _confine(memory: int) -> None:
    """Limit this process: `memory` more bytes of address space, no bytes into files, no new
    processes, no core dumps, 32 open files.
    """
    import resource

    limits = [
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 32),
    ]
    if peak := _peak_bytes():
        limits.append((resource.RLIMIT_AS, peak + memory))
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _answer(request: dict[str, Any]) -> tuple[str, str]:
    """(verdict, reason) of one request. Gold answers alone are only checked: `correct` if one can
    be used.

    With more than one, the verdict is correct if any of them says so, else wrong if any can be
    used.
    """
    golds, prediction = request["golds"], request.get("prediction")
    if not 0 < len(golds) <= MAX_GOLDS:
        return "error", f"more than {MAX_GOLDS} gold answers" if golds else "no gold answer"
    try:
        if prediction is None:
            problems = [gold_problem(gold) for gold in golds]
            return ("error", problems[0] or "") if all(problems) else ("correct", "")
        verdicts = list[Verdict]()
        for gold in golds:
            verdicts.append(grade_answer(gold, prediction))
            if verdicts[-1] == "correct":
                return "correct", ""
        return ("wrong", "") if "wrong" in verdicts else ("error", gold_problem(golds[0]) or "")
    # sympy raises anything on hostile input; each is reported as an error verdict and counted
    except Exception as error:
        return "error", f"{type(error).__name__} in the comparison: {str(error)[:200]}"


def _serve(parent: int, cpu_seconds: float, memory: int) -> None:
    """The worker's life: a line in, a line out, until the parent closes the pipe or is gone."""
    import select

    # Ctrl-C and SIGTERM go to the whole process group: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # the kernel's own end of a process: needs no interpreter
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    replies = os.dup(1)
    # imports and first tables, before anything is limited or measured
    grade_answer(r"\frac{1}{2}", "(x+1)^2")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # the parser prints
    os.dup2(quiet, 2)
    _confine(memory)
    start, pending = _peak_bytes(), b""
    os.write(replies, b'["ready", "", false]\n')
    while True:
        if not select.select([0], [], [], 5.0)[0]:
            if os.getppid() != parent:  # a fork of the parent may hold the pipe open for ever
                return
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        pending += chunk
        if not pending.endswith(b"\n"):
            continue
        request, pending = json.loads(pending), b""
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        verdict, reason = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        grown = _peak_bytes() - start
        # math-verify takes a MemoryError for a difference
        if verdict == "wrong" and grown > memory // 2:
            verdict, reason = "error", f"memory: the comparison needed more than {memory >> 21} MiB"
        # the peak would count against the next verdict; a new worker starts clean
        leaving = grown > memory // 4
        os.write(replies, json.dumps([verdict, reason, leaving]).encode() + b"\n")
        if leaving:
            return


# --- in the caller --------------------------------------------------------------------------------


def _cpu_seconds(process: psutil.Process) -> float:
    """CPU time that a process has had; 0 where it is gone, so that it seems to stand still."""
    import psutil

    try:
        used = process.cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system


class _Worker:
    """A worker process, the item it has in hand and the time by which it has to answer."""

    def __init__(self, cfg: GraderConfig) -> None:
        import psutil  # here: the workers run this file, and start without it

        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # sympy's order of terms, and with it what it simplifies to, follows the hash
        environment["PYTHONHASHSEED"] = "0"
        arguments = [str(os.getpid()), str(cfg.cpu_seconds), str(cfg.memory_mib << 20)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlfr_vlm.rewards.grader", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self.seen = psutil.Process(self.process.pid)
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.patience, self.used = (
            0,
            0.0,
        )  # wall limits left to the item, CPU seconds at the beginning of this one
        self.received = b""

    def send(self, item: int, request: bytes, wall_seconds: float) -> bool:
        """Hand over a request (below the 64 KiB of a pipe: this never blocks). False if the worker
        is gone.
        """
        self.used = _cpu_seconds(self.seen)
        try:
            self.process.stdin.write(request)  # type: ignore[union-attr]
        except BrokenPipeError:
            return False
        self.item, self.deadline, self.patience = (
            item,
            time.monotonic() + wall_seconds,
            PATIENCE - 1,
        )
        return True

    def stands_still(self, wall_seconds: float) -> bool:
        """At its deadline: whether it got no CPU time since the last one, or was patient long
        enough; else it has another wall limit.
        """
        used = _cpu_seconds(self.seen)
        if self.item is None or self.patience == 0 or used <= self.used:
            return True
        self.deadline, self.patience, self.used = (
            time.monotonic() + wall_seconds,
            self.patience - 1,
            used,
        )
        return False

    def receive(self) -> list[Any] | None:
        """The reply (verdict, reason, whether it leaves) if it is complete, [] if not yet, None if
        the worker is gone.
        """
        chunk = os.read(self.process.stdout.fileno(), 65536)  # type: ignore[union-attr]
        self.received += chunk
        if not chunk:
            return None
        if not self.received.endswith(b"\n"):
            return []
        line, self.received = self.received, b""
        return json.loads(line)

    def kill(self) -> int:
        """End it now; its exit status (minus the signal)."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        return status


class Grader:
    """A pool of worker processes that grade answers; a context manager.

    May be used from any thread (calls take turns), not from a forked child. Verdicts depend on the
    two texts alone: not on order, number of workers or earlier answers; only the limits, of which
    CPU time is the first to be met, are measured, and they yield `error`.
    """

    def __init__(self, cfg: GraderConfig, where: Where = "boxed") -> None:
        if where not in get_args(Where):
            raise ValueError(f"where={where!r}: expected one of {', '.join(get_args(Where))}")
        self.cfg, self.where = cfg, where
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._failed_starts = 0
        # they import while the caller goes on
        self._workers = [_Worker(cfg) for _ in range(cfg.workers)]

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The grader cannot be used afterwards."""
        if os.getpid() == self._pid:
            with self._lock:
                while self._workers:
                    self._workers.pop().kill()

    def grade(self, items: Sequence[tuple[Gold, str]]) -> list[Graded]:
        """Verdicts of (gold answer, response text) pairs, in order. A response without an answer is
        wrong.

        A tuple or list of gold answers holds spellings or values of which any is right (Minerva);
        those that have to be given together (OlympiadBench) are one gold answer: `1, 2`.
        """
        predictions = [
            (extract_answer(response, self.where) or "")[: MAX_ANSWER + 1] for _, response in items
        ]
        requests = [
            {"golds": _cut(gold), "prediction": prediction}
            for (gold, _), prediction in zip(items, predictions, strict=True)
        ]
        replies = self._run(requests)
        return [
            Graded(verdict, prediction, reason)
            for (verdict, reason), prediction in zip(replies, predictions, strict=True)
        ]

    def check_golds(self, golds: Sequence[Gold]) -> list[str | None]:
        """For each gold answer the reason why it cannot be graded against, or None. One that a busy
        machine did not come to is asked again.
        """
        requests = [{"golds": _cut(gold)} for gold in golds]
        reasons = [reason or None for _, reason in self._run(requests)]
        for late in [
            i for i, reason in enumerate(reasons) if reason is not None and reason.startswith(LATE)
        ]:
            ((_, reason),) = self._run([requests[late]])
            reasons[late] = reason or None
        return reasons

    def check_gold(self, gold: Gold) -> str | None:
        """Why this gold answer cannot be graded against, or None."""
        return self.check_golds([gold])[0]

    def _run(self, requests: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
        """(verdict, reason) of each request, all workers at once."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this Grader belongs to the process that made it; make another one after a fork"
            )
        lines = [
            json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
            for request in requests
        ]
        replies: list[tuple[Any, str] | None] = [None] * len(lines)
        waiting = deque(range(len(lines)))
        with self._lock:
            if not self._workers:
                raise RuntimeError("this Grader is closed")
            try:
                while waiting or any(worker.item is not None for worker in self._workers):
                    self._hand_out(lines, waiting)
                    for item, reply in self._collect():
                        replies[item] = reply
            finally:
                for slot, worker in enumerate(self._workers):
                    # interrupted: its reply must not be taken for the next call's
                    if worker.item is not None:
                        worker.kill()
                        self._workers[slot] = _Worker(self.cfg)
        return [reply for reply in replies if reply is not None]

    def _hand_out(self, lines: Sequence[bytes], waiting: deque[int]) -> None:
        for slot, worker in enumerate(self._workers):
            if waiting and worker.ready and worker.item is None:
                if worker.send(waiting[0], lines[waiting[0]], self.cfg.wall_seconds):
                    waiting.popleft()
                else:
                    self._replace(slot, grace=1.0)

    def _collect(self) -> list[tuple[int, tuple[str, str]]]:
        """Wait for replies, deaths and deadlines; the items that they settle."""
        settled: list[tuple[int, tuple[str, str]]] = []
        pending = [
            worker.deadline
            for worker in self._workers
            if worker.item is not None or not worker.ready
        ]
        with selectors.DefaultSelector() as selector:
            for slot, worker in enumerate(self._workers):
                selector.register(worker.process.stdout, selectors.EVENT_READ, slot)  # type: ignore[arg-type]
            events = selector.select(max(0.0, min(pending, default=0.0) - time.monotonic()))
        for slot in (key.data for key, _ in events):
            worker = self._workers[slot]
            reply = worker.receive()
            if reply is None:
                item, status = worker.item, self._replace(slot, grace=1.0)
                if item is not None:
                    settled.append((item, ("error", self._cause(status))))
            elif reply:
                if worker.item is not None:
                    settled.append((worker.item, (reply[0], reply[1])))
                worker.ready, worker.item, self._failed_starts = True, None, 0
                if reply[2]:
                    self._replace(slot, grace=0.0)
        for slot, worker in enumerate(self._workers):
            late = time.monotonic() > worker.deadline and (
                worker.item is not None or not worker.ready
            )
            if late and worker.stands_still(self.cfg.wall_seconds):
                item, waited = worker.item, (PATIENCE - worker.patience) * self.cfg.wall_seconds
                self._replace(slot, grace=0.0)
                if item is not None:
                    settled.append((item, ("error", f"{LATE}: no verdict within {waited:g} s")))
        return settled

    def _replace(self, slot: int, grace: float) -> int:
        """End a worker (one that closed its pipe is given `grace` seconds to tell its own exit
        status) and start another in its place.
        """
        worker = self._workers[slot]
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=grace)
        status = worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{self._failed_starts} grader workers did not start (exit status {status}): "
                    "see their messages above"
                )
        self._workers[slot] = _Worker(self.cfg)
        return status

    def _cause(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"CPU limit: no verdict within {self.cfg.cpu_seconds:g} s of CPU time"
        if (
            status == -signal.SIGSEGV
            # Python raises MemoryError for its own allocations; a stack that cannot grow is the
            # kernel's to end
        ):
            return (
                "memory limit, most likely: the worker's stack found no room in "
                f"{self.cfg.memory_mib} MiB (SIGSEGV)"
            )
        return f"the worker died: exit status {status}"


def _cut(gold: Gold) -> list[str]:
    """The gold answers out of their column, cut where one is too long to be one and where they are
    too many.
    """
    golds = [gold] if isinstance(gold, str) else gold[: MAX_GOLDS + 1]
    return [unwrap_gold(one)[: MAX_GOLD + 1] for one in golds]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
