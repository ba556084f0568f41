"""Sampling by workers in other processes: one weight sync for all of them, prompts spread over
them, and lost ones replaced.

Whatever goes wrong is told to every rank before anything is done about it, so that all of them do
the same.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from rlfr_vlm.config import Config
from rlfr_vlm.errors import NonFiniteError, StoppedError, UserError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rollout import engine_name
from rlfr_vlm.rollout.engine import SamplingConfig, sample_indices
from rlfr_vlm.rollout.probe import PROBE, check_gap, probe_prompts, tolerance
from rlfr_vlm.rollout.worker import ErrorMessage, Packed, Refusal, Request, SampledResponse, packed
from rlfr_vlm.types import EncodedPrompt, Rollout, RolloutGroup

MAX_BUCKETS = 2  # sent and not yet taken by every worker
# of train.timeout_s for a worker: the other ranks, which wait for what comes of it, wait a whole
# one
WAIT_SHARE = 0.75
POLL_SECONDS = 0.5


class WorkerLost(Exception):
    """A worker died in the middle of a call, or has not come back yet."""


class Workers(Protocol):
    """Rollout workers in processes of their own, by number; one that dies is started anew by
    whoever keeps them.
    """

    def __len__(self) -> int: ...

    def share(self, value: Any) -> Any:
        """Something that several calls are given: stored once, whoever reads it."""
        ...

    def submit(self, worker: int, method: str, *arguments: Any) -> Any:
        """Start a call of a method of RolloutWorker; does not wait."""
        ...

    def result(self, call: Any, timeout_s: float) -> Any:
        """What it returned, an ErrorMessage where it raised a UserError. Raises WorkerLost, and
        TimeoutError.
        """
        ...

    def kill(self, worker: int) -> None:
        """End a worker that does not answer."""
        ...


@dataclass(frozen=True)
class LostWorker:
    """What became of a worker."""

    reason: str
    hung: bool = False  # it lives, and has to be ended


@dataclass
class _Report:
    """What one rank met, for all of them to know."""

    losses: dict[int, LostWorker]
    problem: ErrorMessage | None = None
    value: Any = None


@dataclass
class _Piece:
    """Prompts that one worker samples in one call. It is sampled anew as a whole: neighbours in a
    batch may change the last bits.
    """

    worker: int
    prompts: Sequence[EncodedPrompt]
    requests: list[Request]
    answers: list[tuple[SampledResponse, ...]] | None = None


class RemoteEngine:
    """A training rank's view of the rollout workers. Every rank has one, and they make the same
    calls in the same order.
    """

    def __init__(self, cfg: Config, policy: Policy, ranks: Ranks, workers: Workers) -> None:
        self.name = engine_name(cfg)
        self.cfg, self.policy, self.ranks, self.workers = cfg, policy, ranks, workers
        self.limit_s = WAIT_SHARE * cfg.train.timeout_s
        self.losses: list[str] = []  # of this engine's life
        self._version, self._sync_id = policy.version, ""
        self._proven: set[int] = set()  # workers that the probe has passed since they started
        # With staleness, sampling has a thread, and so a process group, of its own, and rank 0
        # keeps what it sent: the policy moves on.
        self._ahead = cfg.rollout.staleness > 0
        self._kept: list[dict[str, Packed]] = []
        self._sampling = Ranks(ranks.rank, ranks.size, ranks.timeout_s) if self._ahead else ranks

    # -- weights -----------------------------------------------------------------------------------

    def load_weights(self, policy: Policy) -> None:
        """Send the weights to every worker, bucket by bucket, and prove each worker once.

        Raises StoppedError naming the worker that is lost too often, does not come back, or
        computes something else with them.
        """
        self.policy, self._version = policy, policy.version
        self._load(self.ranks, self._current)
        self._prove(policy)

    def _current(self) -> Iterable[dict[str, Packed]]:
        """The policy's weights; gathered by all ranks, and of use to the first."""
        self._kept = []
        for bucket in self.policy.weight_buckets(self.cfg.rollout.sync_bucket_mib * 2**20):
            if not self.ranks.first:
                yield {}
                continue
            sent = packed(bucket)
            if self._ahead:
                self._kept.append(
                    {name: Packed(t.dtype, t.shape, t.data.copy()) for name, t in sent.items()}
                )
            yield sent

    def _load(self, ranks: Ranks, buckets: Callable[[], Iterable[dict[str, Packed]]]) -> None:
        """Until every worker holds the same weights. `buckets` is called by all ranks, which then
        iterate together.
        """
        while True:
            sync_id = ranks.broadcast(uuid.uuid4().hex, "weight sync")
            if not self._settle(
                ranks, ranks.gather(self._send(ranks, buckets(), sync_id), "weight sync")
            ):
                self._sync_id = sync_id
                return

    def _send(self, ranks: Ranks, buckets: Iterable[dict[str, Packed]], sync_id: str) -> _Report:
        """Rank 0 sends; once something is wrong, it only keeps up with the others."""
        report = _Report({})
        in_flight: deque[tuple[str, list[tuple[int, Any]]]] = deque()
        count = 0
        try:
            for bucket in buckets:
                if not ranks.first or report.losses or report.problem:
                    continue
                if len(in_flight) == MAX_BUCKETS:
                    self._answers(*in_flight.popleft(), report)
                shared = self.workers.share(bucket)
                calls = [
                    (worker, self.workers.submit(worker, "load_bucket", shared, sync_id))
                    for worker in range(len(self.workers))
                ]
                in_flight.append((f"the weights from `{next(iter(bucket))}` on", calls))
                count += 1
        except NonFiniteError as error:
            report.problem = ErrorMessage.of(error)
        while in_flight and not report.problem:
            self._answers(*in_flight.popleft(), report)
        if ranks.first and not report.losses and not report.problem:
            last = (self._version, sync_id, count)
            calls = [
                (worker, self.workers.submit(worker, "finish_load", *last))
                for worker in range(len(self.workers))
            ]
            for (worker, _), state in zip(
                calls, self._answers("the end of the weights", calls, report), strict=True
            ):
                if state is not None and state.sync_id != sync_id:
                    report.losses[worker] = LostWorker(
                        "it was started anew while weights were sent"
                    )
        return report

    def _prove(self, policy: Policy) -> None:
        """Let each worker that was not probed since it started sample fixed prompts, which the
        policy then scores.
        """
        while missing := [
            worker for worker in range(len(self.workers)) if worker not in self._proven
        ]:
            prompts = probe_prompts(self.cfg, policy)
            report = _Report({})
            if self.ranks.first:
                requests = [Request.of(prompt).with_pictures(prompt) for prompt in prompts]
                calls = [
                    (worker, self.workers.submit(worker, "sample", requests, PROBE, self._sync_id))
                    for worker in missing
                ]
                report.value = self._answers("the probe", calls, report)
            report = self.ranks.broadcast(report, "probe of the engines")
            if self._settle(self.ranks, [report]):
                self._load(self.ranks, self._current)
                continue
            for worker, answers in zip(missing, report.value, strict=True):
                rollouts = [
                    r
                    for prompt, found in zip(prompts, answers, strict=True)
                    for r in group_of(prompt, found, PROBE).rollouts
                ]
                cause = f"engine {worker} computes something else with the same weights"
                check_gap(
                    rollouts,
                    policy,
                    tolerance(self.cfg, [policy.dtype, self._dtype()]),
                    lambda cause=cause: cause,  # type: ignore[misc]
                )
                self._proven.add(worker)

    def _dtype(self) -> torch.dtype:
        """The dtype that workers compute in."""
        given = self.cfg.rollout.vllm.dtype
        return (
            self.policy.dtype if self.name != "vllm" or given == "auto" else getattr(torch, given)
        )

    # -- sampling ----------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        """`group_size` responses to each of this rank's prompts, in order. All ranks must call it,
        those without prompts too.

        Lost workers are waited for, get the same weights again, and sample what is missing: tokens
        depend on weights and seeds alone. With `rollout.staleness` it may run in a thread of its
        own while the policy trains.
        """
        pieces = self._pieces(prompts)
        while True:
            report = self._attempt([piece for piece in pieces if piece.answers is None], sampling)
            if not self._settle(self._sampling, self._sampling.gather(report, "sampling")):
                break
            self._load(self._sampling, (lambda: self._kept) if self._ahead else self._current)
        answers = [
            (prompt, found)
            for piece in pieces
            for prompt, found in zip(piece.prompts, piece.answers or (), strict=True)
        ]
        return [group_of(prompt, found, sampling) for prompt, found in answers]

    def _pieces(self, prompts: Sequence[EncodedPrompt]) -> list[_Piece]:
        parts = shares(len(prompts), self.ranks.rank, self.ranks.size, len(self.workers))
        return [
            _Piece(worker, prompts[a:b], [Request.of(prompt) for prompt in prompts[a:b]])
            for worker, a, b in parts
        ]

    def _attempt(self, pieces: Sequence[_Piece], sampling: SamplingConfig) -> _Report:
        """Have pieces sampled, and those whose pictures a worker cannot see a second time, with the
        pictures.
        """
        report = _Report({})
        while pieces and not report.problem:
            calls = [
                (
                    p.worker,
                    self.workers.submit(p.worker, "sample", p.requests, sampling, self._sync_id),
                )
                for p in pieces
            ]
            blind = []
            for piece, answer in zip(
                pieces, self._answers("a batch of prompts", calls, report), strict=True
            ):
                if isinstance(answer, Refusal):
                    blind.append(piece)
                    for i in answer.requests:
                        piece.requests[i] = piece.requests[i].with_pictures(piece.prompts[i])
                else:
                    piece.answers = answer
            pieces = blind
        return report

    # -- losses ------------------------------------------------------------------------------------

    def _answers(self, what: str, calls: Sequence[tuple[int, Any]], report: _Report) -> list[Any]:
        """What workers answered, in order; None where one is lost or something is wrong, which the
        report then says.
        """
        deadline = time.monotonic() + self.limit_s
        found: list[Any] = []
        for worker, call in calls:
            answer = None
            try:
                answer = self.workers.result(call, max(0.0, deadline - time.monotonic()))
            except WorkerLost as error:
                report.losses.setdefault(worker, LostWorker(str(error)))
            except TimeoutError:
                report.losses[worker] = LostWorker(
                    f"no answer to {what} within {self.limit_s:.0f} s (train.timeout_s)", hung=True
                )
            if isinstance(answer, ErrorMessage):
                report.problem, answer = report.problem or answer, None
            elif isinstance(answer, Refusal) and answer.reason == "stale":
                report.losses.setdefault(worker, LostWorker("it was started anew"))
                answer = None
            found.append(answer)
        return found

    def _settle(self, ranks: Ranks, reports: Sequence[_Report]) -> bool:
        """Whether workers were lost: then they are back, with no weights. The same on every rank.

        Raises the first rank's problem, and StoppedError for a worker that is lost once too often
        or does not come back.
        """
        problem = next((report.problem for report in reports if report.problem is not None), None)
        if problem is not None:
            raise problem.error()
        losses = {worker: loss for report in reports for worker, loss in report.losses.items()}
        if not losses:
            return False
        self._proven -= losses.keys()
        self.losses += [
            f"engine {worker}: {loss.reason}" for worker, loss in sorted(losses.items())
        ]
        if len(self.losses) > self.cfg.ray.max_restarts:
            raise StoppedError(
                f"{self.losses[-1]}; ray.max_restarts={self.cfg.ray.max_restarts} were allowed: "
                f"{'; '.join(self.losses)}"
            )
        try:
            late = self._bring_back(losses) if ranks.first else None
        except UserError as error:
            late = ErrorMessage.of(error)
        late = ranks.broadcast(late, "lost engines")
        if late is not None:
            raise late.error()
        return True

    def _bring_back(self, losses: Mapping[int, LostWorker]) -> ErrorMessage | None:
        """Wait until lost workers are there again; ones that hang are ended first.

        One that hung before anybody had a connection to it looks like one that is being started: it
        is ended at half of the time.
        """
        begun = time.monotonic()
        hung = {worker for worker, loss in losses.items() if loss.hung}
        for worker in hung:
            self.workers.kill(worker)
        for worker, loss in losses.items():
            while True:
                waited = time.monotonic() - begun
                try:
                    state = self.workers.result(
                        self.workers.submit(worker, "state"), max(0.0, self.limit_s - waited)
                    )
                    if isinstance(state, ErrorMessage):
                        return state
                    break
                except WorkerLost:
                    if waited > self.limit_s / 2 and worker not in hung:
                        hung.add(worker)
                        self.workers.kill(worker)
                    time.sleep(POLL_SECONDS)
                except TimeoutError:
                    pass
                if time.monotonic() > begun + self.limit_s:
                    return ErrorMessage(
                        "StoppedError",
                        f"engine {worker} was lost ({loss.reason}) and is not back after "
                        f"{self.limit_s:.0f} s",
                    )
        return None

    # -- the rest of a RolloutEngine ---------------------------------------------------------------

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> NoReturn:
        """Not here: the workers are loaded together."""
        raise NotImplementedError("load_weights sends the buckets")

    def finish_load(self, version: int) -> NoReturn:
        """See `load_bucket`."""
        raise NotImplementedError("load_weights sends the buckets")

    def sleep(self) -> None:
        """Workers have devices of their own: nothing to give back."""

    def close(self) -> None:
        """Who started the workers ends them."""


def shares(count: int, rank: int, ranks: int, workers: int) -> list[tuple[int, int, int]]:
    """(worker, start, end) of a rank's `count` prompts: nearly equal parts, such that every worker
    gets as many parts of all ranks.
    """
    parts = workers // math.gcd(workers, ranks)
    bounds = [count * i // parts for i in range(parts + 1)]
    return [
        ((rank * parts + i) % workers, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if b > a
    ]


def group_of(
    prompt: EncodedPrompt, answers: Sequence[SampledResponse], sampling: SamplingConfig
) -> RolloutGroup:
    """A worker's answers as responses to this rank's prompt."""
    rollouts = tuple(
        Rollout(prompt, index, a.token_ids, a.logprobs, a.text, a.finish_reason, a.policy_version)
        for index, a in zip(sample_indices(sampling), answers, strict=True)
    )
    return RolloutGroup(prompt, rollouts)
