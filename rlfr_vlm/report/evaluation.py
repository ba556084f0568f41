"""Benchmark folders as typed values, read without their lock, also while an evaluation writes to
them.

What is missing, damaged or half-written becomes a `FileNote` to be shown; nothing here raises for
it. Numbers are counted from the ledger.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlfr_vlm.evaluation.ledger import COUNTED
from rlfr_vlm.evaluation.statistics import Estimate, estimate, shares
from rlfr_vlm.report.reading import (
    FileNote,
    as_number,
    as_text,
    as_whole,
    is_there,
    json_lines,
    json_object,
)

TRAINING = (
    "metrics.jsonl",
    "rollouts",
    "checkpoints",
)  # a folder with any of these is a training run's
NOT_BENCHMARKS = (
    "rollouts",
    "checkpoints",
    "hf",
    "flow",
    "tb",
    "wandb",
    "trackio",
    "images",
)  # folders of a run without any in them
DEPTH = 4  # eval/step_000080/vlmeval/NAME
STEP = re.compile(r"step_(\d+)")
FINAL = ("correct", "wrong", "unjudged", "failed", "error")
VERDICTS = (
    *FINAL,
    "pending",
    "unanswered",
)  # the last two: a response without a verdict; no response


@dataclass(frozen=True)
class EvaluatedResponse:
    """One response and what became of it."""

    index: int
    verdict: str = "unanswered"  # of VERDICTS
    response: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    seconds: float | None = None
    prediction: str = ""
    reason: str = ""
    rule: str = ""
    judge: dict[str, Any] = field(default_factory=dict)
    judge_seconds: float | None = None

    @property
    def truncated(self) -> bool:
        """Cut at the limit."""
        return self.finish_reason == "length"

    @property
    def rule_and_judge(self) -> tuple[str, str] | None:
        """Both verdicts, where both decided."""
        judge = as_text(self.judge.get("verdict"))
        return (self.rule, judge) if self.rule in COUNTED and judge in COUNTED else None


@dataclass(frozen=True)
class EvaluatedProblem:
    """A problem with its samples, by index."""

    id: str
    question: str
    images: tuple[str, ...]  # relative to the benchmark's folder
    golds: tuple[str, ...]  # any of them is right
    data_source: str
    samples: tuple[EvaluatedResponse, ...]


@dataclass(frozen=True)
class Headline:
    """What a benchmark's verdicts say so far."""

    # over counted samples; None: none is counted, or the evaluation gave no score
    accuracy: Estimate | None
    provisional: bool  # not the numbers that summary.json holds
    withheld: bool  # the evaluation gave no score, because too many samples have no verdict
    counts: dict[str, int]  # by VERDICTS
    truncated: int  # responses
    mean_length: float | None  # tokens of a response
    agreement: tuple[int, int]  # samples on which rule and judge agree, of those that both decided


@dataclass(frozen=True)
class BenchmarkFiles:
    """One benchmark's folder."""

    folder: Path
    name: str  # of the folder
    title: str
    protocol_hash: str
    protocol: dict[str, Any]
    summary: dict[str, Any]  # as written; empty while the first run has not ended
    problems: tuple[EvaluatedProblem, ...]

    @property
    def samples(self) -> list[EvaluatedResponse]:
        """Of all problems."""
        return [sample for problem in self.problems for sample in problem.samples]


def find_benchmarks(folder: Path) -> list[Path]:
    """Folders that hold a benchmark's protocol or ledger: this one, or those below it, by name. Of
    training's eval/step_N/ the newest.
    """
    newest: dict[tuple[str, ...], tuple[int, Path]] = {}
    for path in _benchmarks_below(folder, DEPTH):
        parts = path.relative_to(folder).parts
        step = max((int(match[1]) for part in parts if (match := STEP.fullmatch(part))), default=0)
        place = tuple(part for part in parts if not STEP.fullmatch(part))
        newest[place] = max(newest.get(place, (step, path)), (step, path))
    return sorted(path for _, path in newest.values())


def _benchmarks_below(folder: Path, depth: int) -> list[Path]:
    if is_there(folder / "ledger.jsonl") or is_there(folder / "protocol.json"):
        return [folder]
    try:
        entries = [
            entry
            for entry in os.scandir(folder)
            if depth and entry.is_dir() and entry.name not in NOT_BENCHMARKS
        ]
    except OSError:
        return []
    return [path for entry in entries for path in _benchmarks_below(Path(entry.path), depth - 1)]


def is_training_run(folder: Path) -> bool:
    """Whether training wrote here."""
    return any(is_there(folder / name) for name in TRAINING)


def read_benchmark(folder: Path, base: Path, notes: list[FileNote]) -> BenchmarkFiles:
    """What the folder holds. `base` is the folder that names are relative to."""
    place = folder.relative_to(base).as_posix()
    name = os.fsencode(
        place.removeprefix("eval/") if folder != base else folder.resolve().name
    ).decode("utf-8", "replace")
    own: list[FileNote] = []
    bound = json_object(folder / "protocol.json", own)
    protocol = bound["protocol"] if isinstance(bound.get("protocol"), dict) else {}
    summary = json_object(folder / "summary.json", own) if is_there(folder / "summary.json") else {}
    hash_ = as_text(bound.get("hash"))
    asked = [_problem(row) for row in json_lines(folder / "problems.jsonl", own)]
    problems = {problem.id: problem for problem in reversed(asked)}  # of equal ids the first
    samples = _samples(folder / "ledger.jsonl", hash_, own)
    for missing in dict.fromkeys(problem for problem, _ in samples if problem not in problems):
        problems[missing] = EvaluatedProblem(missing, "", (), (), "", ())
    order = dict.fromkeys([problem.id for problem in asked] + list(problems))
    if len(order) > len(asked) and asked:
        own.append(
            FileNote(
                "damaged",
                "problems.jsonl",
                f"{len(order) - len(asked)} problems of the ledger are not in it",
            )
        )
    if len(problems) < len(asked):
        own.append(
            FileNote(
                "damaged",
                "problems.jsonl",
                f"{len(asked) - len(problems)} problems have the id of another; left out",
            )
        )
    wanted = _wanted(protocol, summary)
    by_problem: dict[str, dict[int, EvaluatedResponse]] = {
        id_: {k: EvaluatedResponse(k) for k in range(wanted)} for id_ in order
    }
    for (id_, _), sample in samples.items():
        by_problem[id_][sample.index] = sample
    notes += [
        replace(problem, file=f"{place}/{problem.file.rpartition('/')[2]}".removeprefix("./"))
        for problem in own
    ]
    return BenchmarkFiles(
        folder=folder,
        name=name,
        title=as_text(summary.get("title")),
        protocol_hash=hash_,
        protocol=protocol,
        summary=summary,
        problems=tuple(
            replace(
                problems[id_], samples=tuple(by_problem[id_][k] for k in sorted(by_problem[id_]))
            )
            for id_ in order
        ),
    )


def headline(files: BenchmarkFiles) -> Headline:
    """Numbers of the ledger. A summary of the same verdicts decides whether there is a score, and
    its interval; an older one does not.
    """
    counted = Counter(sample.verdict for sample in files.samples)
    counts = {verdict: counted[verdict] for verdict in VERDICTS}
    answered = [sample for sample in files.samples if sample.verdict != "unanswered"]
    lengths = [sample.response_tokens for sample in answered if sample.response_tokens is not None]
    both = [sample.rule_and_judge for sample in answered if sample.rule_and_judge is not None]
    known = files.summary.get("verdicts")
    folded = {
        **{verdict: counts[verdict] for verdict in FINAL},
        "unjudged": counts["unjudged"] + counts["pending"],
    }
    current = (
        isinstance(known, dict)
        and "accuracy" in files.summary
        and all(known.get(v, 0) == n for v, n in folded.items())
    )
    accuracy = estimate(shares([_decided(problem.samples) for problem in files.problems]))
    if current:
        accuracy = _summarised(files.summary, accuracy)
    return Headline(
        accuracy=accuracy,
        provisional=not current,
        withheld=current and accuracy is None,
        counts=counts,
        truncated=sum(sample.truncated for sample in answered),
        mean_length=sum(lengths) / len(lengths) if lengths else None,
        agreement=(sum(rule == judge for rule, judge in both), len(both)),
    )


def _decided(samples: Sequence[EvaluatedResponse]) -> list[bool]:
    return [sample.verdict == "correct" for sample in samples if sample.verdict in COUNTED]


def _summarised(summary: dict[str, Any], ours: Estimate | None) -> Estimate | None:
    """The summary's accuracy with its interval, or ours where it has none; None where it withholds
    the score.
    """
    value, bounds = as_number(summary["accuracy"]), summary.get("accuracy_ci")
    if value is None or ours is None:
        return None
    low, high = (
        (as_number(bound) for bound in bounds)
        if isinstance(bounds, list) and len(bounds) == 2
        else (None, None)
    )
    if low is None or high is None:
        low, high = ours.low, ours.high
    return Estimate(value, low, high, ours.num_problems)


def _problem(row: dict[str, Any]) -> EvaluatedProblem:
    def texts(name: str) -> tuple[str, ...]:
        found = row.get(name)
        return tuple(map(as_text, found)) if isinstance(found, list) else ()

    return EvaluatedProblem(
        id=as_text(row.get("id")),
        question=as_text(row.get("question")),
        images=texts("images"),
        golds=texts("golds"),
        data_source=as_text(row.get("data_source")),
        samples=(),
    )


def _samples(
    path: Path, hash_: str, notes: list[FileNote]
) -> dict[tuple[str, int], EvaluatedResponse]:
    """By problem and index; a later line on the same sample replaces an earlier one."""
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    verdicts: dict[tuple[str, int], dict[str, Any]] = {}
    strange = foreign = 0
    for line in json_lines(path, notes, growing=True):
        index = as_whole(line.get("sample"))
        kind, verdict = line.get("kind"), line.get("verdict")
        if (
            index is None
            or kind not in ("response", "verdict")
            or (kind == "verdict" and verdict not in FINAL)
        ):
            strange += 1
        elif hash_ and line.get("protocol") != hash_:
            foreign += 1
        else:
            (answers if kind == "response" else verdicts)[as_text(line.get("problem")), index] = (
                line
            )
    if strange:
        notes.append(
            FileNote(
                "damaged",
                path.name,
                f"{strange} lines are neither a response nor a verdict; left out",
            )
        )
    if foreign:
        notes.append(
            FileNote("damaged", path.name, f"{foreign} lines belong to another protocol; left out")
        )
    if lost := len(verdicts.keys() - answers.keys()):
        notes.append(FileNote("damaged", path.name, f"{lost} verdicts have no response; left out"))
    return {key: _sample(key[1], answer, verdicts.get(key, {})) for key, answer in answers.items()}


def _sample(index: int, answer: dict[str, Any], verdict: dict[str, Any]) -> EvaluatedResponse:
    judge = verdict.get("judge")
    return EvaluatedResponse(
        index=index,
        verdict=as_text(verdict.get("verdict")) or "pending",
        response=as_text(answer.get("response")),
        finish_reason=as_text(answer.get("finish_reason")),
        prompt_tokens=as_whole(answer.get("prompt_tokens")),
        response_tokens=as_whole(answer.get("response_tokens")),
        seconds=as_number(answer.get("seconds")),
        prediction=as_text(verdict.get("prediction")),
        reason=as_text(verdict.get("reason")),
        rule=as_text(verdict.get("rule")),
        judge=judge if isinstance(judge, dict) else {},
        judge_seconds=as_number(verdict.get("seconds")),
    )


def _wanted(protocol: dict[str, Any], summary: dict[str, Any]) -> int:
    """Samples that each problem is to have; 0 where nothing says so."""
    benchmark = protocol.get("benchmark")
    asked = (
        benchmark.get("num_samples") if isinstance(benchmark, dict) else protocol.get("num_samples")
    )
    wanted = as_whole(asked if asked is not None else summary.get("num_samples"))
    return min(max(0, wanted or 0), 10_000)


def model_names(files: BenchmarkFiles) -> tuple[str, str]:
    """What the protocol calls the model under test, and which kind and weights it was; each may be
    empty.
    """
    identity = files.protocol.get("model")
    if not isinstance(identity, dict):
        return as_text(identity), ""
    name = next(
        (
            identity[key]
            for key in ("name", "path", "endpoint", "model")
            if isinstance(identity.get(key), str)
        ),
        "",
    )
    weights = as_text(identity.get("fingerprint"))
    kind = ", ".join(
        part
        for part in (as_text(identity.get("model_type")), weights and f"weights {weights}")
        if part
    )
    return "/".join(name.split("/")[-3:]) if name.startswith("/") else name, kind


def flat(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Dotted key and value of every leaf, in order."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += [(f"{key}.{inner}", text) for inner, text in flat(value)]
        else:
            rows.append((key, value if isinstance(value, str) else json.dumps(value)))
    return rows
