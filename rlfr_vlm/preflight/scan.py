"""Rows put together: repeats, overlap with the held-out rows, gold answers, and the figures of each
file.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rlfr_vlm.config import Config
from rlfr_vlm.data.bad_rows import RowError, printable
from rlfr_vlm.data.prompts import claim_id
from rlfr_vlm.data.rows import read_rows, row_origin
from rlfr_vlm.errors import UserError
from rlfr_vlm.preflight.facts import Facts, Role, Task, digest_of
from rlfr_vlm.preflight.kinds import KINDS
from rlfr_vlm.preflight.workers import RowWorkers
from rlfr_vlm.rewards.answers import MAX_GOLD
from rlfr_vlm.rewards.extract import unwrap_gold
from rlfr_vlm.rewards.grader import LATE, Grader

BATCH = 128  # rows whose answers are graded together
PENDING = 4  # batches being graded while rows are read on
MAX_REMEMBERED = 50_000  # gold answers that are not graded again
LONG_TEXT = 40  # letters of a question that is no set phrase
MAJORITY, MAJORITY_ROWS = 0.5, 20  # of fewer rows nothing follows
_PLACE = re.compile(r"[:\[](\d+)\]?$")


@dataclass(frozen=True)
class Finding:
    """A defect of a row, or of a file where `line` is None."""

    file: str
    role: Role
    line: int | None  # from 1 in JSONL; else the index from 0
    id: str
    kind: str
    severity: str
    reason: str


@dataclass
class FileScan:
    """What is known of a data file."""

    role: Role
    file: str
    rows: int = 0
    tokens: list[int] = field(default_factory=list)  # of each row whose prompt could be counted
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    graded: int = 0  # gold answers given to the grader
    readable: int = 0  # those that it can grade against
    findings: list[Finding] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)  # lines with an error
    clean_rows: int = 0
    # question and pictures -> where, gold answer
    problems: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    pictures: dict[bytes, str] = field(default_factory=dict)  # pixels -> where
    # question -> times, line, id, where; of long ones
    texts: dict[bytes, tuple[int, int, str, str]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    # rows that do not say where their pictures go
    unmarked: list[tuple[int, str]] = field(default_factory=list)
    marked: int = 0

    def add(
        self, line: int | None, row_id: str, kind: str, reason: str, severity: str = ""
    ) -> Finding:
        """Note a defect."""
        found = Finding(
            self.file, self.role, line, row_id, kind, severity or KINDS[kind].severity, reason
        )
        self.findings.append(found)
        if line is not None and found.severity == "error":
            self.bad.add(line)
        return found

    @property
    def usable(self) -> int:
        """Rows without an error."""
        return self.rows - len(self.bad)


def scan(
    cfg: Config,
    sources: dict[Role, str],
    workers: RowWorkers,
    grader: Grader,
    quarantine: frozenset[str] = frozenset(),
    on_error: Callable[[Finding], None] = lambda _: None,
    on_row: Callable[[Role], None] = lambda _: None,
) -> dict[Role, FileScan]:
    """Look at every row of the files; the held-out ones first, which the others are compared with.

    quarantine: warnings that count as errors. on_error, on_row: told as it happens.
    """
    scans: dict[Role, FileScan] = {}
    limits: dict[Role, int | None] = {
        "train": cfg.data.limit,
        "eval": cfg.eval.limit,
        "expert": None,
    }
    order: tuple[Role, ...] = ("eval", "train", "expert")
    with ThreadPoolExecutor(1) as pool:
        for role in (role for role in order if role in sources):
            reading = _Reading(
                cfg,
                FileScan(role, sources[role]),
                scans.get("eval"),
                grader,
                pool,
                quarantine,
                on_error,
            )
            scans[role] = reading.scan
            try:
                tasks = islice(_tasks(sources[role]), limits[role])
                for facts in workers.examine(role, tasks):
                    reading.take(facts)
                    on_row(role)
                if not reading.scan.rows:
                    raise UserError(f"data {sources[role]}: no rows")
            except UserError as error:
                if workers.failure is not None:  # the model's, not the file's
                    raise
                reading.note(None, "", "file_unreadable", str(error))
            reading.finish()
    return {role: scans[role] for role in ("train", "eval", "expert") if role in scans}


def _tasks(source: str) -> Iterator[Task]:
    for number, (name, row, problem) in enumerate(read_rows(source)):
        yield Task(number, name, row_origin(source, name), row, problem)


def line_of(name: str) -> int:
    """Line or index of a row, from what `read_rows` calls it."""
    match = _PLACE.search(name)
    assert match is not None
    return int(match[1])


@dataclass
class _Reading:
    """A file while it is read, in order."""

    cfg: Config
    scan: FileScan
    heldout: FileScan | None
    grader: Grader
    pool: ThreadPoolExecutor
    quarantine: frozenset[str]
    on_error: Callable[[Finding], None]
    batch: list[Facts] = field(default_factory=list)
    pending: deque[tuple[list[Facts], Future[list[list[tuple[str, str]]]]]] = field(
        default_factory=deque
    )
    # gold answers seen -> why unreadable, why unreachable
    golds: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, line: int | None, row_id: str, kind: str, reason: str) -> None:
        """A defect of a row, or of the file; reasons need not say the row again."""
        name = Path(self.scan.file).name
        reason = printable(re.sub(rf"^\S*{re.escape(name)}(?::{line}|\[{line}\]): ", "", reason))
        found = self.scan.add(
            line, printable(row_id), kind, reason, "error" if kind in self.quarantine else ""
        )
        if found.severity == "error":
            self.on_error(found)

    def take(self, facts: Facts) -> None:
        """The next row."""
        scan, line = self.scan, line_of(facts.name)
        scan.rows += 1
        for kind, reason in facts.notices:
            self.note(line, facts.id, kind, reason)
        if not facts.parsed:
            return
        try:
            claim_id(facts.id, facts.where, scan.ids)
        except RowError as error:
            self.note(line, facts.id, error.fault, str(error))
        if facts.tokens is not None:
            scan.tokens.append(facts.tokens)
        scan.images += facts.num_pictures
        scan.sizes.update(facts.sizes)
        if facts.num_pictures and not facts.marked:
            scan.unmarked.append((line, facts.id))
        scan.marked += bool(facts.num_pictures and facts.marked)
        if facts.answer:
            scan.answers[facts.answer[:80]] += 1
        if facts.pictures is not None:
            self._compare(facts, line)
        self.batch.append(facts)
        if len(self.batch) >= BATCH:
            self._submit()

    def _compare(self, facts: Facts, line: int) -> None:
        """With earlier rows of the file, and with the held-out rows."""
        scan, pictures = self.scan, facts.pictures or ()
        key = digest_of(b"".join((facts.text, *pictures)))
        if key in scan.problems:
            where, answer = scan.problems[key]
            same = answer == facts.answer
            kind, what = (
                ("duplicate_row", "the same row")
                if same
                else (
                    "answer_conflict",
                    f"the answer is {facts.answer[:40]!r}, but {answer[:40]!r}",
                )
            )
            self.note(line, facts.id, kind, f"{what} at {where}")
        else:
            scan.problems[key] = (facts.where, facts.answer[:MAX_GOLD])
        if facts.text_length >= LONG_TEXT:
            times, *_ = scan.texts.get(facts.text, (0,))
            scan.texts[facts.text] = (times + 1, line, facts.id, facts.where)
        if self.heldout is None:
            for picture in pictures:
                scan.pictures.setdefault(picture, facts.where)
        elif key in self.heldout.problems:
            self.note(
                line,
                facts.id,
                "overlap_problem",
                f"the same problem as {self.heldout.problems[key][0]}",
            )
        elif shared := next((p for p in pictures if p in self.heldout.pictures), None):
            self.note(
                line,
                facts.id,
                "overlap_image",
                f"the same picture as {self.heldout.pictures[shared]}",
            )

    def _submit(self) -> None:
        if len(self.pending) >= PENDING:
            self._settle()
        rows, self.batch = self.batch, []
        self.pending.append((rows, self.pool.submit(self._grade, rows)))

    def _settle(self) -> None:
        rows, future = self.pending.popleft()
        for facts, notices in zip(rows, future.result(), strict=True):
            for kind, reason in notices:
                self.note(line_of(facts.name), facts.id, kind, reason)

    def _grade(self, rows: list[Facts]) -> list[list[tuple[str, str]]]:
        """What the grader says of gold answers and expert responses; in a thread of its own."""
        if self.cfg.reward.function is not None:
            return [[] for _ in rows]
        if len(self.golds) > MAX_REMEMBERED:
            self.golds.clear()
        self._read_golds(
            list(
                dict.fromkeys(
                    facts.answer
                    for facts in rows
                    if facts.answer and facts.answer not in self.golds
                )
            )
        )
        found: list[list[tuple[str, str]]] = []
        experts = [
            facts
            for facts in rows
            if facts.response is not None and facts.answer and not self.golds[facts.answer][0]
        ]
        graded = self.grader.grade([(facts.answer, facts.response or "") for facts in experts])
        wrong = {
            f.number: g
            for f, g in zip(experts, graded, strict=True)
            if g.verdict == "wrong" and g.prediction
        }
        for facts in rows:
            own: list[tuple[str, str]] = []
            unreadable, unreachable = self.golds.get(facts.answer, ("", ""))
            if facts.response is None:
                self.scan.graded += 1
                self.scan.readable += not unreadable
                own += (
                    [
                        (
                            "answer_unreadable",
                            f"{facts.where}: answer {facts.answer[:80]!r}: {unreadable}",
                        )
                    ]
                    if unreadable
                    else []
                )
                own += (
                    [("answer_unreachable", f"answer {facts.answer[:80]!r}: {unreachable}")]
                    if unreachable
                    else []
                )
            elif facts.number in wrong:
                own.append(
                    (
                        "response_wrong",
                        f"the response answers {wrong[facts.number].prediction[:60]!r}, the gold "
                        f"answer is {facts.answer[:60]!r}",
                    )
                )
            found.append(own)
        return found

    def _read_golds(self, golds: list[str]) -> None:
        """Whether each can be graded against, and whether it is right by its own measure."""
        unreadable = [reason or "" for reason in self.grader.check_golds(golds)]
        fine = [gold for gold, reason in zip(golds, unreadable, strict=True) if not reason]
        forms = {
            "boxed": r"\boxed{%s}",
            "tag": "<answer>%s</answer>",
            "text": "The answer is \\boxed{%s}.",
        }
        responses = [
            (gold, forms[self.cfg.reward.answer].replace("%s", unwrap_gold(gold))) for gold in fine
        ]
        graded = self.grader.grade(responses)
        graded = [
            self.grader.grade([item])[0] if one.reason.startswith(LATE) else one
            for item, one in zip(responses, graded, strict=True)
        ]
        verdicts = dict(zip(fine, graded, strict=True))
        for gold, reason in zip(golds, unreadable, strict=True):
            own = verdicts.get(gold)
            reached = own is None or own.verdict == "correct"
            self.golds[gold] = (
                reason,
                ""
                if reached or own is None
                else own.reason or f"read as {own.prediction[:60]!r}, it is graded {own.verdict}",
            )

    def finish(self) -> None:
        """What only the whole file shows."""
        if self.batch:
            self._submit()
        while self.pending:
            self._settle()
        scan = self.scan
        if scan.marked > len(scan.unmarked):
            for line, row_id in scan.unmarked:
                self.note(
                    line, row_id, "image_unmarked", "no <image> mark: the pictures come first"
                )
        for line, row_id, reason in self._same_texts():
            self.note(line, row_id, "overlap_text", reason)
        answer, times = next(iter(scan.answers.most_common(1)), ("", 0))
        total = scan.answers.total()
        if scan.role != "expert" and total >= MAJORITY_ROWS and times > MAJORITY * total:
            self.note(
                None,
                "",
                "answer_majority",
                f"the answer {answer!r} is that of {times} of {total} rows",
            )
        if scan.role == "train" and scan.rows and scan.usable < self.cfg.rollout.num_prompts:
            reason = (
                f"rollout.num_prompts={self.cfg.rollout.num_prompts} exceeds the "
                f"{scan.usable} usable rows"
            )
            self.note(None, "", "too_few_rows", reason)

    def _same_texts(self) -> Iterable[tuple[int, str, str]]:
        """Long questions that stand once here and once in the held-out rows, where the rows are not
        flagged already.
        """
        if self.heldout is None:
            return
        flagged = {
            f.line for f in self.scan.findings if f.kind in ("overlap_problem", "overlap_image")
        }
        for text, (times, line, row_id, _) in self.scan.texts.items():
            there = self.heldout.texts.get(text, (0, 0, "", ""))
            if times == 1 == there[0] and line not in flagged:
                yield line, row_id, f"the question of {there[3]}, with other pictures"
