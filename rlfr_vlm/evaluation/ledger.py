"""What an evaluation has got so far: one append-only JSONL file per benchmark, bound to the
protocol that it was made under.

`OUT/BENCHMARK/protocol.json` holds everything that decides the numbers, and its hash.
`OUT/BENCHMARK/ledger.jsonl` has one line per event:

    {"kind": "response", "protocol", "problem", "sample", "response", "finish_reason",
    "prompt_tokens", "response_tokens", "seconds"}
    {"kind": "verdict", "protocol", "problem", "sample", "verdict", "prediction", "reason", "rule",
    "judge", "seconds"}

`verdict` is correct | wrong | unjudged | failed | error. Only the first two enter an accuracy;
`failed` (the judge did not answer) is asked again when the run is resumed; `unjudged` has nobody to
ask; `error` is an answer that the grader could not read within its limits. `rule` is the rule's
verdict; `judge` is null or {"verdict", "reply", "model", "prompt", "settings", "attempts"}. A later
line on the same sample replaces an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from rlfr_vlm.config import differences
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import FinishReason

SampleKey = tuple[str, int]  # problem id, sample index
FinalVerdict = Literal["correct", "wrong", "unjudged", "failed", "error"]
COUNTED = ("correct", "wrong")


@dataclass(frozen=True)
class Answer:
    """One response of the model under test."""

    problem: str
    sample: int
    response: str
    finish_reason: FinishReason
    prompt_tokens: int
    response_tokens: int
    seconds: float  # of the batch or request that it came from


@dataclass(frozen=True)
class Judgement:
    """What became of a response."""

    problem: str
    sample: int
    verdict: FinalVerdict
    prediction: str = ""  # the answer as extracted
    reason: str = ""  # of anything but correct or wrong
    rule: str | None = None
    judge: dict[str, Any] | None = None
    seconds: float = 0.0


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Digest of everything that decides the numbers."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """Answers and verdicts of one benchmark, held by one process at a time."""

    def __init__(self, folder: Path, protocol: Mapping[str, Any]) -> None:
        """Read what is there. Raises UserError when it was made under another protocol, naming each
        setting with both values.
        """
        self.folder, self.path, self.hash = folder, folder / "ledger.jsonl", protocol_hash(protocol)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"{folder} is in use by another evaluation") from None
        self.answers: dict[SampleKey, Answer] = {}
        self.verdicts: dict[SampleKey, Judgement] = {}
        try:
            self._bind(protocol)
            self._read()
        except BaseException:
            self._lock.release()
            raise

    def _bind(self, protocol: Mapping[str, Any]) -> None:
        path = self.folder / "protocol.json"
        if path.exists():
            found = json.loads(path.read_text())
            if found["hash"] != self.hash:
                raise UserError(
                    f"{self.folder} was made under another protocol "
                    f"({differences(found['protocol'], protocol)}); numbers of two protocols do "
                    "not mix: use another output_dir"
                )
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"hash": self.hash, "protocol": protocol}, indent=1))
        os.replace(temporary, path)

    def _read(self) -> None:
        """A line torn by a kill is cut off: the file goes on after the last whole one."""
        if not self.path.exists():
            return
        good = self.path.read_bytes().rfind(b"\n") + 1
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
        _, self.answers, self.verdicts = read_ledger(self.folder)

    def append(self, records: Iterable[Answer | Judgement]) -> None:
        """Write and flush to disk; what is here survives a kill."""
        lines = []
        for record in records:
            kind = "response" if isinstance(record, Answer) else "verdict"
            lines.append(json.dumps({"kind": kind, "protocol": self.hash, **asdict(record)}) + "\n")
            if isinstance(record, Answer):
                self.answers[record.problem, record.sample] = record
            else:
                self.verdicts[record.problem, record.sample] = record
        with self.path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def unanswered(self, samples: Iterable[SampleKey]) -> list[SampleKey]:
        """Those without a response, in order."""
        return [s for s in samples if s not in self.answers]

    def ungraded(self, samples: Iterable[SampleKey]) -> list[SampleKey]:
        """Those with a response and without a verdict, or whose judge failed, in order."""
        return [
            s
            for s in samples
            if s in self.answers
            and (s not in self.verdicts or self.verdicts[s].verdict == "failed")
        ]

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()


def read_ledger(
    folder: Path,
) -> tuple[dict[str, Any], dict[SampleKey, Answer], dict[SampleKey, Judgement]]:
    """Protocol, answers and verdicts of a benchmark's folder, without its lock: while it is being
    written, up to its last whole line.

    Raises UserError naming the file, and the line that is none of this ledger's.
    """
    path = folder / "ledger.jsonl"
    try:
        bound = json.loads((folder / "protocol.json").read_text())
        lines = path.read_bytes().split(b"\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable evaluation: {error}") from None
    answers: dict[SampleKey, Answer] = {}
    verdicts: dict[SampleKey, Judgement] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            kind, hash_ = line.pop("kind"), line.pop("protocol")
            record = (Answer if kind == "response" else Judgement)(**line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}:{number}: not a line of a ledger: {error}") from None
        if hash_ != bound["hash"]:
            raise UserError(
                f"{path}:{number}: belongs to protocol {hash_}, its folder is {bound['hash']}"
            )
        (answers if kind == "response" else verdicts)[record.problem, record.sample] = record  # type: ignore[assignment]
    return bound["protocol"], answers, verdicts
