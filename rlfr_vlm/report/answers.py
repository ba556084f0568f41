"""Two runs on the same held-out problems: what each answered, whether that compares, and which
answers flipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlfr_vlm.evaluation.ledger import COUNTED
from rlfr_vlm.evaluation.statistics import Paired, paired
from rlfr_vlm.report.reading import (
    FileNote,
    as_number,
    as_text,
    as_whole,
    is_there,
    json_lines,
    json_object,
)

GREEDY = -1  # sample_index of the greedy response
CONDITIONS = {
    "temperature": "temperature",
    "pictures": "pictures",
    "num_samples": "samples per problem",
}  # of an evaluation's step_N.json


@dataclass(frozen=True)
class Reply:
    """One response to a held-out problem."""

    text: str
    prediction: str
    verdict: str
    finish_reason: str

    @property
    def correct(self) -> bool | None:
        """None: not graded; it is in no accuracy."""
        return self.verdict == "correct" if self.verdict in COUNTED else None


@dataclass
class Answered:
    """A held-out problem with a run's responses to it."""

    gold: str
    question: str  # "" where the file does not say
    samples: dict[int, Reply] = field(default_factory=dict)

    @property
    def sampled(self) -> list[bool]:
        """Whether right, of every graded sample."""
        return [
            reply.correct
            for at, reply in sorted(self.samples.items())
            if at != GREEDY and reply.correct is not None
        ]

    @property
    def greedy(self) -> bool | None:
        """Whether the greedy response is right; None where there is none, or no verdict."""
        return self.samples[GREEDY].correct if GREEDY in self.samples else None


@dataclass(frozen=True)
class Answers:
    """One evaluation of one run, response by response."""

    step: int
    problems: dict[str, Answered]  # by id
    conditions: dict[str, str]  # by name


@dataclass(frozen=True)
class Versus:
    """A run against the first one, at `steps` (first, this)."""

    steps: tuple[int, int] | None
    change: Paired | None  # None: not compared
    gained: tuple[str, ...]  # problems: greedy answer wrong in the first run, right in this one
    lost: tuple[str, ...]
    words: tuple[str, ...]  # why not, or what a reader should know


def read_answers(folder: Path, step: int, problems: list[FileNote]) -> Answers | str:
    """The responses of `eval/step_N.jsonl`, or why they cannot be compared."""
    name = f"eval/step_{step:06d}.jsonl"
    path = folder / name
    if not is_there(path):
        return f"{name} is not there"
    found: dict[str, Answered] = {}
    repeated = without = 0
    own: list[FileNote] = []
    for row in json_lines(path, own):
        at, key = as_whole(row.get("sample_index")), as_text(row.get("id"))
        if at is None or not key:
            without += 1
            continue
        problem = found.setdefault(
            key, Answered(as_text(row.get("answer")), as_text(row.get("question")))
        )
        repeated += at in problem.samples
        texts = (
            as_text(row.get(part))
            for part in ("response", "prediction", "verdict", "finish_reason")
        )
        problem.samples.setdefault(at, Reply(*texts))
    problems.extend(own)
    summary = json_object(path.with_suffix(".json"), problems)
    each, wanted = as_whole(summary.get("num_samples")), as_whole(summary.get("num_problems"))
    num = sum(len(problem.samples) for problem in found.values())
    if not found:
        return f"{name} holds no response"
    if repeated or without or own:
        return (
            f"{name} is damaged: {repeated} responses are there twice, {without} have no id"
            if not own
            else f"{name}: {own[0].text}"
        )
    if each is not None and wanted is not None and num != wanted * (each + 1):
        return f"{name} holds {num:,} of {wanted * (each + 1):,} responses"
    return Answers(step, found, _conditions(summary))


def _conditions(summary: Mapping[str, Any]) -> dict[str, str]:
    values = {text: summary.get(key) for key, text in CONDITIONS.items()}
    return {
        text: f"{number:g}" if (number := as_number(value)) is not None else as_text(value)
        for text, value in values.items()
    }


def incomparable(a: Answers, b: Answers) -> str:
    """Why two evaluations are not of the same problems; "" where they are."""
    ids = a.problems.keys(), b.problems.keys()
    if ids[0] != ids[1]:
        only = [(sorted(ids[0] - ids[1]), "the first run"), (sorted(ids[1] - ids[0]), "this one")]
        return "other problems: " + ", ".join(
            f"{len(own)} only in {whose} (as {own[0]})" for own, whose in only if own
        )
    golds = [key for key, problem in a.problems.items() if problem.gold != b.problems[key].gold]
    return f"other gold answers to {len(golds)} problems, first {golds[0]}" if golds else ""


def against(first: Answers | str, other: Answers | str) -> Versus:
    """`other` against `first`, paired by problem; refused, in words, where they are not of the same
    problems.
    """
    missing = [
        f"{whose}: {side}"
        for whose, side in (("first run", first), ("this run", other))
        if isinstance(side, str)
    ]
    if isinstance(first, str) or isinstance(other, str):
        return Versus(None, None, (), (), ("not compared: " + "; ".join(missing),))
    steps = (first.step, other.step)
    if why := incomparable(first, other):
        return Versus(steps, None, (), (), (f"not compared: {why}",))
    both = [
        key
        for key, problem in first.problems.items()
        if problem.sampled and other.problems[key].sampled
    ]
    if not both:
        return Versus(
            steps, None, (), (), ("not compared: no problem has a graded sample in both runs",)
        )
    words = (
        [f"compared at step {steps[1]} against step {steps[0]}: no step was evaluated in both"]
        if steps[0] != steps[1]
        else []
    )
    if left := len(first.problems) - len(both):
        words.append(f"{left} problems without a graded sample in one of the two are left out")
    for name in CONDITIONS.values():
        one, two = first.conditions[name], other.conditions[name]
        if one != two:
            words.append(f"{name}: {two or 'unknown'} here, {one or 'unknown'} in the first run")
    change = paired(
        [first.problems[key].sampled for key in both], [other.problems[key].sampled for key in both]
    )
    greedy = {
        key: (problem.greedy, other.problems[key].greedy) for key, problem in first.problems.items()
    }
    if unknown := sum(None in pair for pair in greedy.values()):
        words.append(
            f"{unknown} problems without a graded greedy answer in one of the two are in no flip"
        )
    gained = tuple(key for key, pair in greedy.items() if pair == (False, True))
    return Versus(
        steps,
        change,
        gained,
        tuple(key for key, pair in greedy.items() if pair == (True, False)),
        tuple(words),
    )
