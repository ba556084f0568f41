"""`rlfr-vlm compare A B`: two evaluations on the same problems, benchmark by benchmark."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.ledger import COUNTED, Answer, Judgement, SampleKey, read_ledger
from rlfr_vlm.evaluation.statistics import Estimate, Paired, estimate, paired, shares

MAX_FAILED = 0.01  # above this share of samples without a verdict no score is shown

# Settings of a protocol by dotted name or first word; whatever else differs is how the answers were
# got, and a warning.
SAME = (
    "grading",
    "benchmark.name",
    "benchmark.version",
    "problems.count",
)  # other problems or another grading are another measure
QUESTIONS = "problems.sha256"  # of the questions as asked, so that another prompt changes it too
PROMPT = ("benchmark.system", "benchmark.suffix")
SUBJECT = ("model", "checkpoint", "seed")  # what is compared


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation of one benchmark, as read."""

    protocol: dict[str, Any]
    answers: dict[SampleKey, Answer]
    verdicts: dict[SampleKey, Judgement]
    golds: dict[str, list[str]]  # gold answers by problem id, where they are stored

    @property
    def num_problems(self) -> int:
        """How many there should be."""
        return self.protocol.get("problems", {}).get("count") or len(
            {problem for problem, _ in self.answers}
        )

    @property
    def num_samples(self) -> int:
        """How many responses there should be."""
        most = max(Counter(problem for problem, _ in self.answers).values(), default=0)
        return self.num_problems * (self.protocol.get("benchmark", {}).get("num_samples") or most)


@dataclass(frozen=True)
class Tally:
    """What became of the samples of one evaluation."""

    accuracy: Estimate | None  # over the problems that are compared
    num_samples: int  # that there should be
    unjudged: int  # nobody gave a verdict
    failed: int  # the judge, or the model under test, did not answer
    errors: int


@dataclass(frozen=True)
class Comparison:
    """B against A on one benchmark."""

    benchmark: str
    num_problems: int  # with a verdict in both
    left_out: int  # without
    a: Tally
    b: Tally
    change: Paired | None  # None: withheld
    withheld: str  # why
    lost: tuple[SampleKey, ...]  # right in A, wrong in B
    gained: tuple[SampleKey, ...]
    warnings: tuple[str, ...]  # differences in how the answers were got
    expected: tuple[str, ...]  # differences in what is compared


@dataclass(frozen=True)
class ProtocolDifferences:
    """Settings in which two protocols differ, each with both values."""

    refused: tuple[str, ...]
    warnings: tuple[str, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Two evaluations compared on every benchmark that both have."""

    a: str
    b: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def compare(a: Path, b: Path) -> Report:
    """Compare two output folders of `eval`, or a benchmark's folders in them.

    Raises UserError where they have no benchmark in common, or problems or grading differ.
    """
    in_a, in_b = benchmark_folders(a), benchmark_folders(b)
    notes: list[str] = []
    if a in in_a.values() and b in in_b.values():
        pairs = {next(iter(in_a)): (a, b)}  # a benchmark's folder each, whatever its name
    else:
        pairs = {name: (in_a[name], in_b[name]) for name in sorted(in_a.keys() & in_b.keys())}
        if not pairs:
            raise UserError(
                f"compare: no benchmark in common: {a} has {', '.join(sorted(in_a))}; {b} has "
                f"{', '.join(sorted(in_b))}"
            )
        notes = [
            f"{name}: only in {side}"
            for side, own in (("A", in_a), ("B", in_b))
            for name in sorted(own.keys() - pairs.keys())
        ]
    sides = {name: (read_side(x), read_side(y)) for name, (x, y) in pairs.items()}
    return Report(
        str(a),
        str(b),
        tuple(compare_benchmark(name, x, y) for name, (x, y) in sides.items()),
        tuple(notes),
    )


def benchmark_folders(folder: Path) -> dict[str, Path]:
    """The benchmarks' folders by name: this one, or those in it."""
    if (folder / "protocol.json").is_file():
        return {folder.resolve().name: folder}
    found = {p.parent.name: p.parent for p in sorted(folder.glob("*/protocol.json"))}
    if not found:
        raise UserError(
            f"compare: {folder} holds no evaluation: expected BENCHMARK/protocol.json and "
            "BENCHMARK/ledger.jsonl"
        )
    return found


def read_side(folder: Path) -> StoredEvaluation:
    """One evaluation of one benchmark, also while it is running."""
    path = folder / "problems.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return StoredEvaluation(*read_ledger(folder), {row["id"]: row["golds"] for row in rows})


def compare_benchmark(name: str, a: StoredEvaluation, b: StoredEvaluation) -> Comparison:
    """B against A on one benchmark. Raises UserError naming what makes them incomparable."""
    found = protocol_differences(a.protocol, b.protocol, same_golds=a.golds == b.golds != {})
    if found.refused:
        raise UserError(
            f"compare: {name}: other problems or another grading, so the numbers do not compare: "
            f"{'; '.join(found.refused)}"
        )
    if QUESTIONS not in _flat(a.protocol):
        _same_problems(name, a, b)
    right_a, right_b = _correct(a), _correct(b)
    both = sorted(right_a.keys() & right_b.keys())
    all_a, all_b = [right_a[p] for p in both], [right_b[p] for p in both]
    tally_a, tally_b = _tally(a, all_a), _tally(b, all_b)
    withheld = _withheld(tally_a, tally_b) or ("" if both else "no problem has a verdict in both")
    lost, gained = flips(a, b)
    return Comparison(
        benchmark=name,
        num_problems=len(both),
        left_out=max(a.num_problems, b.num_problems) - len(both),
        a=tally_a,
        b=tally_b,
        change=None if withheld else paired(all_a, all_b),
        withheld=withheld,
        lost=lost,
        gained=gained,
        warnings=found.warnings,
        expected=found.expected,
    )


def protocol_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], same_golds: bool = False
) -> ProtocolDifferences:
    """Sort the settings that differ into those that forbid a comparison, those to be warned of, and
    those that are its purpose.

    Questions that differ along with the prompt are no refusal where problem ids and gold answers
    are known to be the same.
    """
    flat_a, flat_b = _flat(a), _flat(b)
    changed = [
        key for key in sorted(flat_a.keys() | flat_b.keys()) if flat_a.get(key) != flat_b.get(key)
    ]
    by_prompt = same_golds and any(key in PROMPT for key in changed)
    kinds: dict[str, list[str]] = {"refused": [], "warnings": [], "expected": []}
    for key in changed:
        names = {key, key.split(".")[0]}
        refused = names & set(SAME) or (key == QUESTIONS and not by_prompt)
        kind = "refused" if refused else "expected" if names & set(SUBJECT) else "warnings"
        kinds[kind].append(f"{key}: {_value(flat_a, key)} in A, {_value(flat_b, key)} in B")
    return ProtocolDifferences(
        *(tuple(kinds[kind]) for kind in ("refused", "warnings", "expected"))
    )


def flips(
    a: StoredEvaluation, b: StoredEvaluation
) -> tuple[tuple[SampleKey, ...], tuple[SampleKey, ...]]:
    """(right in A and wrong in B, wrong in A and right in B), of the samples with a verdict in
    both.

    With several samples per problem the pairing of sample i with sample i is no more than a way to
    list them.
    """
    both = sorted(
        s
        for s in a.verdicts.keys() & b.verdicts.keys()
        if {a.verdicts[s].verdict, b.verdicts[s].verdict} == set(COUNTED)
    )
    lost = tuple(s for s in both if a.verdicts[s].verdict == "correct")
    return lost, tuple(s for s in both if b.verdicts[s].verdict == "correct")


def _same_problems(name: str, a: StoredEvaluation, b: StoredEvaluation) -> None:
    ids_a, ids_b = {p for p, _ in a.answers}, {p for p, _ in b.answers}
    only = [
        f"{len(ids)} only in {which} ({some_of_names(sorted(ids), 3)})"
        for which, ids in (("A", ids_a - ids_b), ("B", ids_b - ids_a))
        if ids
    ]
    if only:
        raise UserError(
            f"compare: {name}: the problems differ: {', '.join(only)}; is an evaluation "
            "unfinished, or limited?"
        )


def _correct(side: StoredEvaluation) -> dict[str, list[bool]]:
    """Whether right, of every sample with a verdict, by problem."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for problem, sample in sorted(side.verdicts):
        verdict = side.verdicts[problem, sample].verdict
        if verdict in COUNTED and (problem, sample) in side.answers:
            found[problem].append(verdict == "correct")
    return found


def _tally(side: StoredEvaluation, correct: Sequence[Sequence[bool]]) -> Tally:
    kinds = Counter(
        side.verdicts[s].verdict if s in side.verdicts else "unjudged" for s in side.answers
    )
    unanswered = side.num_samples - len(side.answers)
    return Tally(
        estimate(shares(correct)),
        side.num_samples,
        kinds["unjudged"],
        kinds["failed"] + unanswered,
        kinds["error"],
    )


def _withheld(a: Tally, b: Tally) -> str:
    without = [(side, t.failed + t.unjudged, t.num_samples) for side, t in (("A", a), ("B", b))]
    over = [
        f"{missing} of {num} in {side}"
        for side, missing, num in without
        if missing > MAX_FAILED * num
    ]
    return (
        f"no score: samples without a verdict: {', '.join(over)}; resume the evaluation to ask for "
        "them"
        if over
        else ""
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def _value(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "nothing"


# --- as text --------------------------------------------------------------------------------------


def some_of_names(names: Sequence[str], most: int) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:most]) + (
        f", and {len(names) - most} more" if len(names) > most else ""
    )
