"""The page of a comparison: table of runs, what differs, curves one over the other, and the answers
that flipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from rlfr_vlm.evaluation.statistics import Estimate
from rlfr_vlm.report.answers import GREEDY, Answered, Answers, Reply, Versus, read_answers
from rlfr_vlm.report.comparison import (
    Compared,
    Setting,
    differing,
    method,
    read_compared,
    seed_groups,
)
from rlfr_vlm.report.folders import writable_file
from rlfr_vlm.report.pooling import Band, pooled
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.run_files import Evaluation
from rlfr_vlm.report.scripts import joined
from rlfr_vlm.report.template import (
    asset,
    compress,
    json_block,
    json_text,
    page,
    plotly_script,
    text_block,
    write_page,
)

VALUES = 600_000  # of all curves together; longer ones are thinned
TEXT_BYTES = 6_000_000  # of responses as the page carries them
CUTS = (
    10**9,
    20_000,
    8_000,
    3_000,
    1_000,
)  # characters of a response, tried in turn until TEXT_BYTES are enough
MAX_NOTES = 50  # shown one by one


class PointData(TypedDict):
    """One evaluation of a run."""

    step: int
    accuracy: float | None
    low: float | None
    high: float | None
    greedy: float | None


class TimedPoint(PointData):
    """With the hours of training before it."""

    hours: float | None


class VersusData(TypedDict):
    """A run against the first one."""

    difference: Estimate | None  # None: not compared
    p: float | None
    test: str
    gained: int
    lost: int
    steps: tuple[int, int] | None
    words: list[str]


class ComparedData(TypedDict):
    """A row of the table of runs."""

    name: str
    method: str
    seed: int | float | str | None
    numSteps: int | None
    plannedSteps: int | None
    hours: float | None
    best: PointData | None
    last: PointData | None
    numProblems: int | None
    numSamples: int | None
    versus: VersusData | None  # None: the first run


class PooledPoint(TypedDict):
    """Held-out accuracy over seeds."""

    step: int
    mean: float
    low: float
    high: float
    num_runs: int


class GroupData(TypedDict):
    """A run, or runs that differ in their seed alone, by number."""

    runs: list[int]
    last: PooledPoint | None


class ComparedColumns(TypedDict):
    """Curves of a run."""

    steps: list[int]
    hours: list[float | None]
    series: dict[str, list[float | None]]
    evaluations: list[TimedPoint]


class BandColumns(TypedDict):
    """A curve of pooled runs."""

    steps: list[int]
    hours: list[float | None]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


class PooledColumns(TypedDict):
    """Curves of pooled runs."""

    series: dict[str, BandColumns]
    evaluations: dict[str, BandColumns]


class ComparedCurves(TypedDict):
    """All curves of the page."""

    every: int  # of the steps, one is here
    runs: list[ComparedColumns]
    groups: list[PooledColumns | None]  # None: a single run


class ComparisonData(TypedDict):
    """The page of a comparison."""

    name: str
    writtenAt: str
    runs: list[ComparedData]
    groups: list[GroupData]
    settings: list[Setting]
    problems: list[FileNote]
    numMoreProblems: int
    curves: ComparedCurves


class FlipSide(TypedDict):
    """A run's greedy response to a problem, and whether its samples are right."""

    text: str
    prediction: str
    verdict: str
    finish_reason: str
    samples: list[bool]


class Flip(TypedDict):
    """A problem that one run solves and the other does not."""

    kind: Literal["gained", "lost"]
    id: str
    question: str
    gold: str
    a: FlipSide  # the first run
    b: FlipSide


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of these runs, in this order. Raises UserError for folders that are missing,
    and a path that cannot be written.
    """
    writable_file(path)
    runs = read_compared(folders)
    groups = seed_groups(runs)
    notes = [
        FileNote(note.kind, f"{run.name}: {note.file}", note.text)
        for run in runs
        for note in run.problems
    ]
    flips = {
        number: _flips(runs[0], run, run.versus, notes)
        for number, run in enumerate(runs)
        if run.versus and run.versus.change
    }
    data: ComparisonData = {
        "name": " · ".join(run.name for run in runs[:3])
        + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        "writtenAt": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "runs": [_row(run) for run in runs],
        "groups": [
            {"runs": group, "last": _last_of_all([runs[number] for number in group])}
            for group in groups
        ],
        "settings": differing(runs),
        "problems": notes[:MAX_NOTES],
        "numMoreProblems": max(0, len(notes) - MAX_NOTES),
        "curves": _curves(runs, groups),
    }
    blocks = [json_block("comparison-data", data)]
    blocks += [text_block(f"flips-{number}", packed) for number, packed in _pack(flips).items()]
    scripts = {"plotly": plotly_script(), "script": joined("comparison")}
    style = asset("page.css") + asset("comparison.css")
    return write_page(
        path, page("comparison.html", f"comparison of {len(runs)} runs", style, blocks, scripts)
    )


def _row(run: Compared) -> ComparedData:
    steps, seed = run.files.metrics.steps, run.settings.get("seed")
    return {
        "name": run.name,
        "method": method(run.settings),
        "seed": seed if isinstance(seed, int | float | str) else None,
        "numSteps": steps[-1] if steps else None,
        "plannedSteps": run.files.planned_steps,
        "hours": next((value for value in reversed(run.hours) if value is not None), None),
        "best": _point(run.best),
        "last": _point(run.last),
        "numProblems": run.last.num_problems if run.last else None,
        "numSamples": run.last.num_samples if run.last else None,
        "versus": _versus(run.versus) if run.versus else None,
    }


def _point(e: Evaluation | None) -> PointData | None:
    return (
        {"step": e.step, "accuracy": e.accuracy, "low": e.low, "high": e.high, "greedy": e.greedy}
        if e
        else None
    )


def _versus(versus: Versus) -> VersusData:
    change = versus.change
    return {
        "difference": change.difference if change else None,
        "p": change.p_value if change else None,
        "test": change.test if change else "",
        "gained": len(versus.gained),
        "lost": len(versus.lost),
        "steps": versus.steps,
        "words": list(versus.words),
    }


def _last_of_all(runs: Sequence[Compared]) -> PooledPoint | None:
    """Held-out accuracy over seeds at the last step that all of them evaluated; None of a single
    run.
    """
    found = pooled(
        [
            {e.step: e.accuracy for e in run.files.evaluations if e.accuracy is not None}
            for run in runs
        ]
    )
    if not found:
        return None
    step = max(found)
    last = found[step]
    return {
        "step": step,
        "mean": last.mean,
        "low": last.low,
        "high": last.high,
        "num_runs": last.num_runs,
    }


# Curves.


def _curves(runs: Sequence[Compared], groups: Sequence[Sequence[int]]) -> ComparedCurves:
    """Per run its steps, hours and series, and per pooled group bands; every k-th step of all, so
    that lines stay comparable.
    """
    num = sum(
        len(run.files.metrics.steps) * (1 + len(run.files.metrics.series or {})) for run in runs
    )
    every = max(1, math.ceil(num / VALUES))
    return {
        "every": every,
        "runs": [_columns(run, every) for run in runs],
        "groups": [
            _pooled([runs[number] for number in group], every) if len(group) > 1 else None
            for group in groups
        ],
    }


def _columns(run: Compared, every: int) -> ComparedColumns:
    metrics = run.files.metrics
    rows = sorted({*range(0, len(metrics.steps), every), *range(len(metrics.steps))[-1:]})
    return {
        "steps": [metrics.steps[row] for row in rows],
        "hours": [_rounded(run.hours[row]) for row in rows],
        "series": {
            name: [_rounded(values[row]) for row in rows]
            for name, values in (metrics.series or {}).items()
        },
        "evaluations": [
            {
                "step": e.step,
                "accuracy": e.accuracy,
                "low": e.low,
                "high": e.high,
                "greedy": e.greedy,
                "hours": _hours_at(run, e.step),
            }
            for e in run.files.evaluations
        ],
    }


def _hours_at(run: Compared, step: int) -> float | None:
    """Hours of training before an evaluation: of the last step up to it."""
    known = [
        hours
        for at, hours in zip(run.files.metrics.steps, run.hours, strict=True)
        if at <= step and hours is not None
    ]
    return (
        _rounded(known[-1])
        if known
        else 0.0
        if step == 0 and any(hours is not None for hours in run.hours)
        else None
    )


def _pooled(runs: Sequence[Compared], every: int) -> PooledColumns:
    names = dict.fromkeys(name for run in runs for name in run.files.metrics.series or {})
    hours = pooled([_by_step(run, run.hours) for run in runs])
    series = {
        name: pooled(
            [_by_step(run, (run.files.metrics.series or {}).get(name, ())) for run in runs]
        )
        for name in names
    }
    evaluated = {
        key: pooled(
            [
                {
                    e.step: value
                    for e in run.files.evaluations
                    if (value := getattr(e, key)) is not None
                }
                for run in runs
            ]
        )
        for key in ("accuracy", "greedy")
    }
    at = {
        step: [_hours_at(run, step) for run in runs]
        for found in evaluated.values()
        for step in found
    }
    known = {step: [value for value in values if value is not None] for step, values in at.items()}
    mean_at = {
        step: sum(values) / len(values)
        for step, values in known.items()
        if len(values) == len(runs)
    }
    return {
        "series": {
            name: _lines(found, {step: value.mean for step, value in hours.items()}, every)
            for name, found in series.items()
            if found
        },
        "evaluations": {
            key: _lines(found, mean_at, 1) for key, found in evaluated.items() if found
        },
    }


def _by_step(run: Compared, values: Sequence[float | None]) -> dict[int, float]:
    return {
        step: value
        for step, value in zip(run.files.metrics.steps, values, strict=False)
        if value is not None
    }


def _lines(bands: dict[int, Band], hours: dict[int, float], every: int) -> BandColumns:
    steps = [step for at, step in enumerate(bands) if at % every == 0 or at == len(bands) - 1]
    return {
        "steps": steps,
        "hours": [_rounded(hours.get(step)) for step in steps],
        "mean": [_rounded(bands[step].mean) for step in steps],
        "low": [_rounded(bands[step].low) for step in steps],
        "high": [_rounded(bands[step].high) for step in steps],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


# Answers that flipped.


def _flips(
    first: Compared, run: Compared, versus: Versus | None, notes: list[FileNote]
) -> list[Flip]:
    """The flipped problems with both greedy responses, those gained first."""
    if versus is None or versus.steps is None:
        return []
    one, two = (
        read_answers(each.files.folder, step, notes)
        for each, step in zip((first, run), versus.steps, strict=True)
    )
    if not isinstance(one, Answers) or not isinstance(two, Answers):  # the folder changed meanwhile
        return []
    kinds: tuple[tuple[Literal["gained", "lost"], tuple[str, ...]], ...] = (
        ("gained", versus.gained),
        ("lost", versus.lost),
    )
    return [
        _flip(kind, key, one.problems[key], two.problems[key])
        for kind, keys in kinds
        for key in keys
        if key in one.problems and key in two.problems
    ]


def _flip(kind: Literal["gained", "lost"], key: str, one: Answered, two: Answered) -> Flip:
    return {
        "kind": kind,
        "id": key,
        "question": two.question,
        "gold": one.gold,
        "a": _side(one),
        "b": _side(two),
    }


def _side(problem: Answered) -> FlipSide:
    reply = problem.samples.get(GREEDY, Reply("", "", "", ""))
    return {
        "text": reply.text,
        "prediction": reply.prediction,
        "verdict": reply.verdict,
        "finish_reason": reply.finish_reason,
        "samples": problem.sampled,
    }


def _pack(flips: dict[int, list[Flip]]) -> dict[int, str]:
    """Compressed, responses cut in their middle as far as the page's size demands."""
    packed: dict[int, str] = {}
    for cut in CUTS:
        packed = {
            number: compress([json_text(_cut(row, cut)) for row in rows])
            for number, rows in flips.items()
        }
        if sum(map(len, packed.values())) <= TEXT_BYTES:
            break
    return packed


def _cut(row: Flip, most: int) -> Flip:
    """A response that is cut keeps more of its end, where its answer stands, and says how much is
    left out.
    """
    return {**row, "a": _cut_side(row["a"], most), "b": _cut_side(row["b"], most)}


def _cut_side(side: FlipSide, most: int) -> FlipSide:
    text = side["text"]
    left = len(text) - most
    if left <= 0:
        return side
    begin, end = text[: most // 3], text[most // 3 + left :]
    return {**side, "text": f"{begin}\n… {left:,} characters left out …\n{end}"}
