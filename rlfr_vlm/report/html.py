"""`report.html` of a run or an evaluation: one file that opens from disk, without a server or a
network.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal, TypedDict

from rlfr_vlm.report.evaluation import find_benchmarks, is_training_run
from rlfr_vlm.report.evaluation_page import BenchmarkData, write_evaluation
from rlfr_vlm.report.findings import Findings, FindingsData, examine
from rlfr_vlm.report.folders import existing_folder, writable_file
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.rollout_data import ColourRange, RolloutData
from rlfr_vlm.report.run_files import Evaluation, Metrics, RunFiles, read_run
from rlfr_vlm.report.scripts import joined
from rlfr_vlm.report.template import asset, json_block, page, plotly_script, text_block, write_page

# of rollouts and pictures; with plotly's 4.8 MB the page stays below 15 MB
ROLLOUT_BYTES = 9_000_000
CURVE_POINTS = 3000  # longer curves are thinned
MAX_PROBLEMS = 50  # shown one by one
EVALUATION_PAGE = "evaluation.html"  # of the benchmarks that a training run holds
STYLES = ("page.css", "findings.css", "attribution.css")


class Overview(TypedDict):
    """The first view of a run."""

    name: str
    state: Literal["empty", "open", "finished"]
    status: str
    writtenAt: str
    lastMetricsAt: str | None
    numSteps: int | None
    plannedSteps: int | None
    seconds: float | None
    evaluations: list[Evaluation]
    best: int | None  # step
    checkpoints: list[int]
    latestCheckpoint: str
    config: str
    environment: dict[str, str]
    problems: list[FileNote]
    numMoreProblems: int


class OverviewData(Overview):
    """With the benchmarks below the run's folder."""

    benchmarks: list[BenchmarkData]
    benchmarkPage: str


class Columns(TypedDict):
    """A metrics file."""

    every: int  # of its rows, one is here
    steps: list[int]
    series: dict[str, list[float | None]]


class EvaluationPoint(TypedDict):
    """An evaluation in the curve of accuracies."""

    step: int
    accuracy: float | None
    low: float | None
    high: float | None
    greedy: float | None


class CurveData(TypedDict):
    """All curves of a run."""

    metrics: Columns
    flowFit: Columns
    latents: Columns
    evaluations: list[EvaluationPoint]


class RolloutBrowserData(TypedDict):
    """What the rollout browser needs before it unpacks anything."""

    steps: list[int]
    scales: dict[str, ColourRange]
    numGroups: int
    numResponses: int
    numGroupsLeftOut: int
    numStepsLeftOut: int
    numAttention: int
    numAttentionLeftOut: int


class RunData(FindingsData):
    """The page of a run."""

    overview: OverviewData
    curves: CurveData
    rollouts: RolloutBrowserData


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write `report.html` of a run or an evaluation, finished or not, into its folder. Raises
    UserError where there is no such folder.

    A training run that also holds benchmarks gets a second page, `evaluation.html`, and a table
    that leads to it.
    """
    folder = existing_folder(Path(folder))
    path = folder / "report.html" if path is None else writable_file(path)
    benchmarks = find_benchmarks(folder)
    if benchmarks and not is_training_run(folder):
        return write_evaluation(folder, benchmarks, path)[0]
    run = read_run(folder)
    problems = list(run.problems)
    rollouts, findings = examine(folder, run, ROLLOUT_BYTES, problems)
    evaluated = (
        write_evaluation(folder, benchmarks, path.with_name(EVALUATION_PAGE))[1]
        if benchmarks
        else []
    )
    return write_page(path, _page(run, rollouts, findings, problems, evaluated))


def _page(
    run: RunFiles,
    rollouts: RolloutData,
    findings: Findings,
    problems: list[FileNote],
    evaluated: list[BenchmarkData],
) -> str:
    data: RunData = {
        "overview": {
            **_overview(run, problems),
            "benchmarks": evaluated,
            "benchmarkPage": EVALUATION_PAGE,
        },
        "curves": {
            "metrics": _columns(run.metrics),
            "flowFit": _columns(run.flow_fit),
            "latents": _columns(findings.latent_curves),
            "evaluations": _evaluation_points(run),
        },
        **findings.for_page(),
        "rollouts": {
            "steps": list(rollouts.steps),
            "scales": rollouts.scales,
            "numGroups": rollouts.num_groups,
            "numResponses": rollouts.num_responses,
            "numGroupsLeftOut": rollouts.num_groups_left_out,
            "numStepsLeftOut": rollouts.num_steps_left_out,
            "numAttention": rollouts.num_attention,
            "numAttentionLeftOut": rollouts.num_attention_left_out,
        },
    }
    blocks = [
        json_block("run-data", data),
        text_block("rollout-index", rollouts.index),
        *findings.blocks(),
    ]
    blocks += [
        text_block(f"rollout-step-{step}", packed) for step, packed in rollouts.steps.items()
    ]
    blocks += [text_block(f"picture-{key}", url) for key, url in rollouts.pictures.items()]
    scripts = {"plotly": plotly_script(), "script": joined("page")}
    return page("page.html", run.name, "".join(map(asset, STYLES)), blocks, scripts)


def _overview(run: RunFiles, problems: list[FileNote]) -> Overview:
    series = run.metrics.series or {}
    seconds = [value for value in series.get("timing_s/step", ()) if value is not None]
    state, status = _status(run)
    best = _best(run)
    return {
        "name": run.name,
        "state": state,
        "status": status,
        "writtenAt": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "lastMetricsAt": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.metrics.written_at))
        if run.metrics.written_at
        else None,
        "numSteps": run.metrics.steps[-1] if run.metrics.steps else None,
        "plannedSteps": run.planned_steps,
        "seconds": sum(seconds) if seconds else None,
        "evaluations": list(run.evaluations),
        "best": best.step if best else None,
        "checkpoints": list(run.checkpoint_steps),
        "latestCheckpoint": run.latest_checkpoint,
        "config": run.config_text,
        "environment": run.environment,
        "problems": problems[:MAX_PROBLEMS],
        "numMoreProblems": max(0, len(problems) - MAX_PROBLEMS),
    }


def _status(run: RunFiles) -> tuple[Literal["empty", "open", "finished"], str]:
    """A word for the badge's colour, and its text."""
    done = run.metrics.steps[-1] if run.metrics.steps else 0
    if not done:
        return "empty", "no steps yet"
    if run.planned_steps is None:
        return "open", f"{done} steps"
    return (
        ("finished", f"finished, {done} steps")
        if done >= run.planned_steps
        else ("open", f"step {done} of {run.planned_steps}")
    )


def _best(run: RunFiles) -> Evaluation | None:
    """The most accurate evaluation of a checkpoint that is still there; the earliest of equals."""
    kept = [e for e in run.evaluations if e.step in run.checkpoint_steps and e.accuracy is not None]
    return max(kept, key=lambda e: (e.accuracy, -e.step), default=None)


def _evaluation_points(run: RunFiles) -> list[EvaluationPoint]:
    """The points on the accuracy curve: evaluations, and `val/` metrics of steps whose evaluation
    file is not there.
    """
    points: dict[int, EvaluationPoint] = {
        e.step: {
            "step": e.step,
            "accuracy": e.accuracy,
            "low": e.low,
            "high": e.high,
            "greedy": e.greedy,
        }
        for e in run.evaluations
    }
    series = run.metrics.series or {}
    nothing = (None,) * len(run.metrics.steps)
    columns = zip(
        run.metrics.steps,
        series.get("val/accuracy", nothing),
        series.get("val/greedy", nothing),
        strict=True,
    )
    for step, accuracy, greedy in columns:
        if step not in points and (accuracy is not None or greedy is not None):
            points[step] = {
                "step": step,
                "accuracy": accuracy,
                "low": None,
                "high": None,
                "greedy": greedy,
            }
    return [points[step] for step in sorted(points)]


def _columns(metrics: Metrics) -> Columns:
    """Columns of at most CURVE_POINTS rows: every k-th and the last."""
    every = max(1, math.ceil(len(metrics.steps) / CURVE_POINTS))
    rows = sorted({*range(0, len(metrics.steps), every), *range(len(metrics.steps))[-1:]})
    return {
        "every": every,
        "steps": [metrics.steps[row] for row in rows],
        "series": {
            name: [_rounded(values[row]) for row in rows]
            for name, values in (metrics.series or {}).items()
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
