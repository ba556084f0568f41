"""Several runs beside each other: what differs between them, which of them are one run at several
seeds, and how each does against the first.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlfr_vlm.errors import UserError
from rlfr_vlm.report.answers import Answers, Versus, against, read_answers
from rlfr_vlm.report.evaluation import find_benchmarks, is_training_run
from rlfr_vlm.report.folders import existing_folder
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.run_files import Evaluation, RunFiles, read_run

OWN = ("output_dir", "resume")  # settings in which any two runs may differ
ABSENT = "–"
MISSING = object()


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    name: str  # unlike that of any other
    files: RunFiles
    problems: tuple[FileNote, ...]
    hours: tuple[float | None, ...]  # of training up to the end of each step of `files.metrics`
    # the config without OWN, its own folder in paths written as {output_dir}
    settings: dict[str, Any]
    versus: Versus | None = None  # None: the first run

    @property
    def last(self) -> Evaluation | None:
        """The newest evaluation with an accuracy."""
        return next((e for e in reversed(self.files.evaluations) if e.accuracy is not None), None)

    @property
    def best(self) -> Evaluation | None:
        """The most accurate one, the earliest of equals."""
        return max(
            (e for e in self.files.evaluations if e.accuracy is not None),
            key=lambda e: (e.accuracy or 0, -e.step),
            default=None,
        )


@dataclass(frozen=True)
class Setting:
    """A setting that is not the same in all runs."""

    key: str
    values: tuple[str, ...]  # one per run
    unknown: bool  # equal wherever it stands; some configs, of another version, do not have it


def read_compared(folders: Sequence[Path]) -> list[Compared]:
    """Read the runs in the order given. Raises UserError for folders that are missing, or given
    twice.
    """
    twice = [
        str(folder)
        for folder, num in Counter(existing_folder(folder).resolve() for folder in folders).items()
        if num > 1
    ]
    if twice:
        raise UserError(f"{twice[0]} is given twice; a run is compared with other runs")
    if all(_only_evaluated(folder) for folder in folders):
        raise UserError(
            f"{folders[0]} and the others hold evaluations, no training: `rlfr-vlm compare A B` "
            "compares those"
        )
    runs = [_compared(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    first = runs[0]
    return [first, *(_with_versus(first, run) for run in runs[1:])]


def _only_evaluated(folder: Path) -> bool:
    return not is_training_run(folder) and bool(find_benchmarks(folder))


def names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many folders above as it takes to tell them apart."""
    parts = [
        tuple(os.fsencode(part).decode("utf-8", "replace") for part in folder.resolve().parts)
        for folder in folders
    ]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _compared(folder: Path, name: str) -> Compared:
    files = read_run(folder)
    problems = list(files.problems)
    if _only_evaluated(folder):
        problems.append(
            FileNote(
                "note",
                "metrics.jsonl",
                "an evaluation, no training; rlfr-vlm compare A B compares evaluations",
            )
        )
    seconds = (files.metrics.series or {}).get("timing_s/step", ())
    hours = accumulate(
        (value / 3600 if value is not None else 0.0 for value in seconds), initial=0.0
    )
    known = tuple(hours)[1:] if any(seconds) else (None,) * len(files.metrics.steps)
    own = files.config.get("output_dir")
    settings = {key: _placed(value, own) for key, value in files.config.items() if key not in OWN}
    return Compared(name, files, tuple(problems), known, settings)


def _placed(tree: Any, own: Any) -> Any:
    """Settings with the run's own folder taken out of its paths: a field that each run fitted for
    itself is no difference.
    """
    if isinstance(tree, dict):
        return {key: _placed(value, own) for key, value in tree.items()}
    if (
        isinstance(tree, str)
        and isinstance(own, str)
        and own
        and (tree == own or tree.startswith(own.rstrip("/") + "/"))
    ):
        return "{output_dir}" + tree[len(own.rstrip("/")) :]
    return tree


def _with_versus(first: Compared, run: Compared) -> Compared:
    """Compare at the last step that both evaluated, else the last evaluation of each."""
    steps = [
        [e.step for e in each.files.evaluations if e.accuracy is not None] for each in (first, run)
    ]
    common = set(steps[0]) & set(steps[1])
    pair = (
        (max(common), max(common))
        if common
        else (max(steps[0], default=None), max(steps[1], default=None))
    )
    notes: list[FileNote] = []
    sides = [_answers(each, step, notes) for each, step in zip((first, run), pair, strict=True)]
    versus = against(sides[0], sides[1])
    words = list(versus.words)
    if versus.change and common and (max(steps[0]), max(steps[1])) != pair:
        words.insert(0, f"compared at step {pair[0]}, the last that both evaluated")
    found = Versus(versus.steps, versus.change, versus.gained, versus.lost, tuple(words))
    return Compared(run.name, run.files, run.problems, run.hours, run.settings, found)


def _answers(run: Compared, step: int | None, notes: list[FileNote]) -> Answers | str:
    return "no evaluation" if step is None else read_answers(run.files.folder, step, notes)


def method(settings: dict[str, Any]) -> str:
    """What a run trains with, in a word or two; "" where its config does not say."""
    algorithm = settings.get("algorithm")
    name = algorithm.get("method") if isinstance(algorithm, dict) else None
    if not isinstance(name, str):
        return ""
    return f"{name} + flow" if isinstance(settings.get("flow"), dict) else name


def differing(runs: Sequence[Compared]) -> list[Setting]:
    """Settings that differ between the runs that have a config, and versions; a section that some
    of them leave out counts once.
    """
    found: list[Setting] = []
    _differences(
        "",
        {number: run.settings for number, run in enumerate(runs) if run.settings},
        len(runs),
        found,
    )
    for key in sorted(set().union(*(run.files.environment for run in runs))):
        values = [run.files.environment.get(key) for run in runs]
        if len({value for value in values if value is not None}) > 1:
            found.append(
                Setting(
                    f"env: {key}",
                    tuple(value if value is not None else ABSENT for value in values),
                    False,
                )
            )
    return found


def _differences(key: str, values: Mapping[int, Any], num_runs: int, found: list[Setting]) -> None:
    """values: by run, of the runs that have the section that this setting would be in; MISSING
    where it is not.
    """
    if len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) < 2:
        return
    trees = {number: value for number, value in values.items() if isinstance(value, dict)}
    there = {
        json.dumps(value, sort_keys=True, default=str)
        for value in values.values()
        if value is not MISSING
    }
    if len(trees) < len(values):
        said = {
            number: "on" if number in trees else _text(value) for number, value in values.items()
        }
        found.append(
            Setting(
                key, tuple(said.get(number, ABSENT) for number in range(num_runs)), len(there) < 2
            )
        )
    for name in dict.fromkeys(name for tree in trees.values() for name in tree):
        inner = {number: tree.get(name, MISSING) for number, tree in trees.items()}
        _differences(f"{key}.{name}" if key else str(name), inner, num_runs, found)


def _text(value: Any) -> str:
    if value is MISSING:
        return ABSENT
    return (
        "none"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, default=str)
    )


def seed_groups(runs: Sequence[Compared]) -> list[list[int]]:
    """Runs by number, those that differ in their seed alone together. A seed that is there twice,
    or no config: on its own.
    """
    groups: dict[str, list[int]] = {}
    seeds: set[tuple[str, str]] = set()
    for number, run in enumerate(runs):
        rest = json.dumps(
            {key: value for key, value in run.settings.items() if key != "seed"},
            sort_keys=True,
            default=str,
        )
        seed = json.dumps(run.settings.get("seed"), default=str)
        alone = not run.settings or (rest, seed) in seeds
        seeds.add((rest, seed))
        groups.setdefault(f"{number}" if alone else rest, []).append(number)
    return list(groups.values())
