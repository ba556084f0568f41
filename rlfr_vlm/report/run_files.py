"""A run folder as typed values. What is missing, damaged or half-written becomes a `FileNote` to be
shown; nothing here raises for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rlfr_vlm.report.parquet_rows import UnreadableTable, parquet_rows
from rlfr_vlm.report.reading import (
    FileNote,
    about_folder,
    as_number,
    as_text,
    as_whole,
    is_number,
    is_there,
    json_lines,
    json_object,
    read_text,
    relative,
    unreadable,
)
from rlfr_vlm.report.yardstick import Yardstick, read_yardstick

ROLLOUT_SUFFIXES = (".jsonl", ".parquet")
QUANTITIES = (
    "flow_rewards",
    "deviations",
    "logprobs",
    "advantages",
    "entropy",
)  # per token, the names of the rollout files


@dataclass(frozen=True)
class Metrics:
    """Columns of a metrics file, one value per step, its lines merged; None where a step did not
    log the metric or it was not finite.
    """

    steps: tuple[int, ...] = ()
    series: dict[str, tuple[float | None, ...]] | None = None
    written_at: float | None = None  # seconds since the epoch


@dataclass(frozen=True)
class SourceAccuracy:
    """Accuracy on the problems of one data source."""

    name: str
    accuracy: float | None
    greedy: float | None
    num_problems: int | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the held-out problems."""

    step: int
    accuracy: float | None  # mean over sampled responses
    low: float | None  # 95 % interval of `accuracy`
    high: float | None
    greedy: float | None
    num_problems: int | None
    num_samples: int | None
    by_source: tuple[SourceAccuracy, ...] = ()


@dataclass(frozen=True)
class Response:
    """One sampled response. Every array of `traces` has one value per token."""

    sample_index: int | None
    text: str
    prediction: str
    verdict: str
    reason: str  # of an `error` verdict
    reward: float | None
    parts: dict[str, float | None]
    finish_reason: str
    policy_version: int | None
    tokens: tuple[str, ...]
    traces: dict[str, tuple[float | None, ...]]  # keys: those of QUANTITIES that were recorded
    attention: Any = None  # as written, whatever it is: see report/attention.py
    # as written: of any length, nan for what is no number
    latent: NDArray[np.float32] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Group:
    """The sibling responses to one prompt."""

    step: int
    prompt_id: str
    question: str
    answer: str  # gold
    data_source: str
    images: tuple[str, ...]  # as written, relative to the rollouts folder
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class RolloutFile:
    """The rollouts of one step, read when needed."""

    step: int
    path: Path


@dataclass(frozen=True)
class RunFiles:
    """Everything a run folder holds, rollouts unread."""

    folder: Path
    name: str
    config_text: str
    config: dict[str, Any]
    environment: dict[str, str]  # flattened: dotted key -> value
    metrics: Metrics
    flow_fit: Metrics
    yardstick: Yardstick | None  # of the fit of its field
    evaluations: tuple[Evaluation, ...]  # by step
    checkpoint_steps: tuple[int, ...]
    latest_checkpoint: str
    rollout_files: tuple[RolloutFile, ...]  # by step
    problems: tuple[FileNote, ...]

    @property
    def planned_steps(self) -> int | None:
        """`train.steps` of the config."""
        train = self.config.get("train")
        return as_whole(train.get("steps")) if isinstance(train, dict) else None


def read_run(folder: Path) -> RunFiles:
    """Read everything but the rollouts."""
    problems = about_folder(folder)
    config_text, config = _config(folder / "config.resolved.yaml", problems)
    metrics = _metrics(folder / "metrics.jsonl", problems)
    checkpoint_steps, latest = _checkpoints(folder / "checkpoints", problems)
    fit = folder / "flow" / "flow_fit.jsonl"
    fit = fit if is_there(fit) else folder / "flow_fit.jsonl"
    return RunFiles(
        folder=folder,
        name=os.fsencode(folder.resolve().name).decode("utf-8", "replace"),
        config_text=config_text,
        config=config,
        environment=_environment(folder / "env.json", problems),
        metrics=metrics,
        flow_fit=_metrics(fit, problems) if is_there(fit) else Metrics(),
        yardstick=read_yardstick(folder, config, problems),
        evaluations=_evaluations(folder / "eval", problems),
        checkpoint_steps=checkpoint_steps,
        latest_checkpoint=latest,
        rollout_files=_rollout_files(folder / "rollouts", problems),
        problems=tuple(problems),
    )


def read_rollouts(file: RolloutFile, problems: list[FileNote]) -> tuple[Group, ...]:
    """The groups of one step in the order of the file."""
    groups: list[tuple[dict[str, Any], list[Response]]] = []
    open_groups: dict[str, int] = {}
    misfits = 0
    for row in _rollout_rows(file.path, problems):
        response, fits = _response(row)
        misfits += not fits
        prompt_id = as_text(row.get("prompt_id"))
        at = open_groups.get(prompt_id)
        if at is None or any(
            sibling.sample_index == response.sample_index for sibling in groups[at][1]
        ):  # a prompt drawn twice in a step
            at = open_groups[prompt_id] = len(groups)
            groups.append((row, []))
        groups[at][1].append(response)
    if misfits:
        problems.append(
            FileNote(
                "damaged",
                relative(file.path),
                f"{misfits} responses have arrays that do not fit their tokens; left out",
            )
        )
    return tuple(_group(file.step, row, responses) for row, responses in groups)


def _rollout_rows(path: Path, problems: list[FileNote]) -> Iterator[dict[str, Any]]:
    if path.suffix != ".parquet":
        yield from json_lines(path, problems)
        return
    try:
        yield from parquet_rows(path)
    except UnreadableTable as error:
        problems.append(FileNote("damaged", relative(path), str(error)))
    except OSError as error:
        problems.append(unreadable(path, error))


def _group(step: int, row: dict[str, Any], responses: list[Response]) -> Group:
    images = row.get("images")
    return Group(
        step=step,
        prompt_id=as_text(row.get("prompt_id")),
        question=as_text(row.get("question")),
        answer=as_text(row.get("answer")),
        data_source=as_text(row.get("data_source")),
        images=tuple(as_text(image) for image in images) if isinstance(images, list) else (),
        responses=tuple(sorted(responses, key=lambda response: response.sample_index or 0)),
    )


def _response(row: dict[str, Any]) -> tuple[Response, bool]:
    """The response, and whether all its arrays fit its tokens."""
    tokens = row.get("tokens")
    tokens = tuple(as_text(token) for token in tokens) if isinstance(tokens, list) else ()
    traces = {
        name: tuple(as_number(value) for value in row[name])
        for name in QUANTITIES
        if isinstance(row.get(name), list)
    }
    fitting = {name: values for name, values in traces.items() if len(values) == len(tokens)}
    parts = row.get("parts")
    return Response(
        sample_index=as_whole(row.get("sample_index")),
        text=as_text(row.get("response")),
        prediction=as_text(row.get("prediction")),
        verdict=as_text(row.get("verdict")),
        reason=as_text(row.get("reason")),
        reward=as_number(row.get("reward")),
        parts={name: as_number(value) for name, value in parts.items()}
        if isinstance(parts, dict)
        else {},
        finish_reason=as_text(row.get("finish_reason")),
        policy_version=as_whole(row.get("policy_version")),
        tokens=tokens,
        traces=fitting,
        attention=row.get("attention"),
        latent=_latent(row.get("latent")),
    ), len(fitting) == len(traces)


def _latent(values: Any) -> NDArray[np.float32] | None:
    if not isinstance(values, list):
        return None
    with np.errstate(over="ignore"):  # numbers too large for float32 become inf
        # None becomes nan
        return np.array([as_number(value) for value in values], dtype=np.float64).astype(np.float32)


def _config(path: Path, problems: list[FileNote]) -> tuple[str, dict[str, Any]]:
    text = read_text(path, problems)
    try:
        tree = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        problems.append(FileNote("damaged", relative(path), "not YAML; shown as it is"))
        tree = {}
    if text and not text.endswith("\n"):
        problems.append(
            FileNote(
                "damaged",
                relative(path),
                "cut off in its last line; that setting is wrong, and later ones are missing",
            )
        )
    return text, tree if isinstance(tree, dict) else {}


def _environment(path: Path, problems: list[FileNote]) -> dict[str, str]:
    tree = json_object(path, problems)
    flat: dict[str, str] = {}
    stack = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))
            else:
                flat[f"{prefix}{key}".removeprefix("versions.")] = (
                    value if isinstance(value, str) else json.dumps(value)
                )
    return dict(sorted(flat.items()))


def _metrics(path: Path, problems: list[FileNote]) -> Metrics:
    rows: dict[int, dict[str, Any]] = {}
    repeated = set()
    for row in json_lines(path, problems):
        step = as_whole(row.pop("step", None))
        if step is not None:
            known = rows.setdefault(step, {})  # training and evaluation write a line each
            if known.keys() & row.keys():
                repeated.add(step)
            known.update(row)
    if repeated:
        problems.append(
            FileNote(
                "note",
                relative(path),
                f"{len(repeated)} steps were written twice (a resumed run?); later values count",
            )
        )
    steps = tuple(sorted(rows))
    names = dict.fromkeys(
        name for step in steps for name, value in rows[step].items() if is_number(value)
    )
    series = {name: tuple(as_number(rows[step].get(name)) for step in steps) for name in names}
    for name in names:
        bad = [
            step
            for step in steps
            if is_number(rows[step].get(name)) and as_number(rows[step][name]) is None
        ]
        if bad:
            problems.append(
                FileNote(
                    "note",
                    relative(path),
                    f"{name} is not a finite number at {len(bad)} steps, first at step {bad[0]}",
                )
            )
    return Metrics(steps, series, _written_at(path))


def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:  # not there, or no more
        return None


def _evaluations(folder: Path, problems: list[FileNote]) -> tuple[Evaluation, ...]:
    found: dict[int, Evaluation] = {}
    for step, path in _step_files(folder, ".json", problems):
        row = json_object(path, problems)
        if not row:
            continue
        interval = row.get("accuracy_ci")
        low, high = (
            (as_number(bound) for bound in interval)
            if isinstance(interval, list) and len(interval) == 2
            else (None, None)
        )
        sources = row.get("by_source")
        found[step] = Evaluation(
            step=step,
            accuracy=as_number(row.get("accuracy")),
            low=low,
            high=high,
            greedy=as_number(row.get("greedy")),
            num_problems=as_whole(row.get("num_problems")),
            num_samples=as_whole(row.get("num_samples")),
            by_source=tuple(_source(name, values) for name, values in sorted(sources.items()))
            if isinstance(sources, dict)
            else (),
        )
    ended = {step for step, _ in _step_files(folder, ".json", [])}
    for step, path in _step_files(folder, ".jsonl", []):
        if step not in ended:
            problems.append(
                FileNote(
                    "note",
                    relative(path),
                    "responses of an evaluation that has not ended; train again to go on",
                )
            )
    return tuple(found[step] for step in sorted(found))


def _source(name: str, values: Any) -> SourceAccuracy:
    if not isinstance(values, dict):
        return SourceAccuracy(name, as_number(values), None, None)
    return SourceAccuracy(
        name,
        as_number(values.get("accuracy")),
        as_number(values.get("greedy")),
        as_whole(values.get("num_problems")),
    )


def _checkpoints(folder: Path, problems: list[FileNote]) -> tuple[tuple[int, ...], str]:
    """Steps of the kept checkpoints, and the name `latest` points to."""
    try:
        names = [
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.is_symlink()
        ]
    except OSError as error:
        problems.append(unreadable(folder, error))
        return (), ""
    steps = sorted(
        int(match[1]) for name in names if (match := re.fullmatch(r"global_step_(\d+)", name))
    )
    latest = folder / "latest"
    name = ""
    try:
        name = (
            os.readlink(latest)
            if latest.is_symlink()
            else latest.read_text(errors="replace").strip()
        )
        if not name:
            problems.append(FileNote("damaged", relative(latest), "empty"))
    except OSError as error:
        problems.append(unreadable(latest, error))
    name = Path(name).name
    if name and not is_there(folder / name):
        problems.append(FileNote("damaged", relative(latest), f"names {name}, which is not there"))
    return tuple(steps), name


def _rollout_files(folder: Path, problems: list[FileNote]) -> tuple[RolloutFile, ...]:
    """One per step: where a step has both, the table is the later one."""
    found = {
        step: path for suffix in ROLLOUT_SUFFIXES for step, path in _step_files(folder, suffix, [])
    }
    if not found:
        _step_files(folder, ROLLOUT_SUFFIXES[0], problems)  # says what is missing
    return tuple(RolloutFile(step, found[step]) for step in sorted(found))


def _step_files(folder: Path, suffix: str, problems: list[FileNote]) -> list[tuple[int, Path]]:
    """(step, path) of the `step_<number><suffix>` files of a folder, by step."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        problems.append(unreadable(folder, error))
        return []
    matches = (re.fullmatch(rf"step_(\d+){re.escape(suffix)}", name) for name in names)
    found = sorted((int(match[1]), folder / match[0]) for match in matches if match)
    if not found:
        problems.append(FileNote("missing", relative(folder), f"no step_*{suffix} in it"))
    return found
