"""Rows looked at in processes of their own, in order: a row that kills or hangs its process is
found, named, and costs nothing but itself.

The processes come from a fork server that has the libraries loaded: they are paid for once, and a
lost process is replaced at once. Each says what it found row by row, so the first row that it did
not speak of is the suspect.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.preflight.facts import Facts, Role, Task

LIBRARIES = [
    "rlfr_vlm.preflight.examine",
    "rlfr_vlm.models.policy",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
]
CHUNK = 32  # rows handed over at a time
AHEAD = 64  # chunks that may be finished while an earlier one is not: what is held in memory
START_SECONDS = 600.0  # for a process to load the tokenizer, on a busy machine
READY = "ready"


def _serve(pipe: Connection, cfg: Config, sources: dict[Role, str], with_model: bool) -> None:
    """A worker's life: chunks in, facts out, until the pipe closes."""
    from rlfr_vlm.preflight.examine import make_examiners

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd metadata
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            examiners = make_examiners(cfg, sources, with_model)
            pipe.send(READY)
            while True:
                role, tasks = pipe.recv()
                for task in tasks:
                    faultpoint("validate_row")
                    pipe.send(examiners[role].examine(task))
        except UserError as error:  # of the model, not of a row
            pipe.send(error)


@dataclass
class _RowWorker:
    process: Any
    pipe: Connection
    deadline: float
    ready: bool = False
    tasks: list[Task] = field(default_factory=list)  # handed over, not reported yet
    alone: bool = False  # whether the row in hand is a suspect, by itself


class RowWorkers:
    """A pool; a context manager."""

    def __init__(
        self,
        cfg: Config,
        sources: dict[Role, str],
        with_model: bool,
        count: int,
        row_seconds: float = 120.0,
    ) -> None:
        """row_seconds: wall time of one row before its process is ended."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES if with_model else LIBRARIES[:1])
        # which the server needs, and whose start would unmask the signal
        resource_tracker.ensure_running()
        # which the server and its workers inherit: Ctrl-C is for us
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        self._arguments = (cfg, sources, with_model)
        self._row_seconds = row_seconds
        self.lost: list[str] = []  # what happened to processes that died or hung
        # why none of them can go on, as for a model that does not load
        self.failure: UserError | None = None
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> RowWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.pipe.close()
            worker.process.join()

    def _start(self) -> _RowWorker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        return _RowWorker(process, ours, time.monotonic() + START_SECONDS)

    def examine(self, role: Role, tasks: Iterable[Task]) -> Iterator[Facts]:
        """Facts of the rows, in order."""
        if self.failure is not None:
            raise self.failure
        source = iter(tasks)
        suspects: deque[Task] = deque()
        again: deque[Task] = deque()
        finished: dict[int, Facts] = {}
        handed = given = 0  # rows read so far; rows given out so far
        exhausted = False
        while True:
            for worker in self._workers:
                if not worker.ready or worker.tasks:
                    continue
                if suspects:
                    chunk, worker.alone = [suspects.popleft()], True
                elif again:
                    chunk, worker.alone = (
                        [again.popleft() for _ in range(min(CHUNK, len(again)))],
                        False,
                    )
                elif not exhausted and handed - given < AHEAD * CHUNK:
                    chunk, worker.alone = list(islice(source, CHUNK)), False
                    handed, exhausted = handed + len(chunk), len(chunk) < CHUNK
                else:
                    continue
                if chunk:
                    self._hand(worker, role, chunk)
            while given in finished:
                yield finished.pop(given)
                given += 1
            if exhausted and given == handed:
                return
            for facts in self._collect(suspects, again):
                finished[facts.number] = facts

    def _hand(self, worker: _RowWorker, role: Role, chunk: list[Task]) -> None:
        worker.tasks, worker.deadline = chunk, time.monotonic() + self._row_seconds
        try:
            worker.pipe.send((role, chunk))
        except BrokenPipeError:
            worker.deadline = 0.0  # found dead at the next turn

    def _collect(self, suspects: deque[Task], again: deque[Task]) -> list[Facts]:
        """Wait for what workers have to say; rows of lost ones go back, the suspect by itself."""
        found: list[Facts] = []
        busy = [worker for worker in self._workers if worker.tasks or not worker.ready]
        pause = min(worker.deadline for worker in busy) - time.monotonic()
        said = set(wait([worker.pipe for worker in busy], max(0.0, pause)))
        for slot, worker in enumerate(self._workers):
            if worker not in busy:
                continue
            try:
                if worker.pipe in said:
                    self._hear(worker, found)
                elif time.monotonic() > worker.deadline:
                    raise TimeoutError
            except (EOFError, ConnectionResetError, TimeoutError) as loss:
                found += self._replace(slot, isinstance(loss, TimeoutError), suspects, again)
        return found

    def _hear(self, worker: _RowWorker, found: list[Facts]) -> None:
        while worker.pipe.poll():
            message = worker.pipe.recv()
            if isinstance(message, UserError):
                self.failure = message
                raise message
            if message == READY:
                worker.ready = True
                return
            found.append(message)
            del worker.tasks[0]
            worker.deadline = time.monotonic() + self._row_seconds
            if not worker.tasks:
                return

    def _replace(
        self, slot: int, hung: bool, suspects: deque[Task], again: deque[Task]
    ) -> list[Facts]:
        """End a lost worker and start another. Its suspect gets a second chance, by itself; one
        that had it is named.
        """
        worker = self._workers[slot]
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        what = (
            f"did not come back within {self._row_seconds:g} s"
            if hung
            else f"died (exit status {worker.process.exitcode})"
        )
        if not worker.ready:
            self.failure = UserError(
                f"a worker of validate {what} before its first row: see its messages above"
            )
            raise self.failure
        self._workers[slot] = self._start()
        if not worker.tasks:
            return []
        first, *others = worker.tasks
        self.lost.append(f"{first.where}: the process that read it {what}")
        again.extendleft(reversed(others))
        if worker.alone:
            return [
                Facts(
                    first.number,
                    first.name,
                    first.where,
                    notices=(("row_crash", f"{first.where}: the process {what}, twice"),),
                )
            ]
        suspects.append(first)
        return []
