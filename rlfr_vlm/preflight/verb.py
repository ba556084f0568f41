"""The verb `validate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlfr_vlm.config import Config
from rlfr_vlm.data.rows import read_rows
from rlfr_vlm.errors import UserError
from rlfr_vlm.preflight.facts import Role
from rlfr_vlm.preflight.figures import as_data
from rlfr_vlm.preflight.files import check_copies, copied_settings, write_copies, write_findings
from rlfr_vlm.preflight.kinds import KINDS
from rlfr_vlm.preflight.scan import Finding, scan
from rlfr_vlm.preflight.show import place, print_results
from rlfr_vlm.preflight.workers import RowWorkers
from rlfr_vlm.rewards.grader import Grader

WIDTH = 140  # of what is printed into a file


@dataclass(frozen=True)
class Options:
    """How to validate."""

    folder: Path  # for the results
    workers: int = 2
    count_tokens: bool = True  # with the model's tokenizer and processor
    clean: bool = False  # write copies without the bad rows
    quarantine: tuple[str, ...] = ()  # warnings that count as errors
    as_json: bool = False  # print data instead of tables
    row_seconds: float = 120.0  # wall time of one row before its process is ended


def validate(cfg: Config, options: Options) -> int:
    """Look at every row of the config's data files, print and write what was found. Returns 0, or 2
    where there are bad rows.

    Raises UserError where there is nothing to look at, or the model's tokenizer does not load.
    """
    named: dict[Role, str | None] = {
        "train": cfg.data.train,
        "eval": cfg.data.eval,
        "expert": cfg.data.expert,
    }
    sources: dict[Role, str] = {
        role: source for role, source in named.items() if source is not None
    }
    if not sources:
        raise UserError(
            "there is no data to validate: name a file, or set data.train, data.eval or data.expert"
        )
    if unknown := [kind for kind in options.quarantine if kind not in KINDS]:
        raise UserError(
            f"--quarantine: there is no kind `{unknown[0]}`; docs/validate.md lists them"
        )
    if options.clean:
        check_copies(sources, options.folder)
    for source in sources.values():
        if next(iter(read_rows(source)), None) is None:
            raise UserError(f"data {source}: no rows")
    start = time.monotonic()
    errors = Console(stderr=True)
    with (
        Grader(cfg.reward.grader, cfg.reward.answer) as grader,
        RowWorkers(
            cfg, sources, options.count_tokens, options.workers, options.row_seconds
        ) as workers,
        _progress(errors, sources) as (on_row, say),
    ):
        scans = scan(
            cfg,
            sources,
            workers,
            grader,
            frozenset(options.quarantine),
            _first_of_each(say),
            on_row,
        )
    data = as_data(cfg, scans, options.count_tokens, workers.lost, time.monotonic() - start)
    files = write_findings(options.folder, data, scans)
    settings: list[str] = []
    if options.clean:
        copies = write_copies(options.folder, scans)
        settings = data["clean_settings"] = copied_settings(copies, scans, cfg.data.media_dirs)
    if options.as_json:
        print(json.dumps(data, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        print_results(console, cfg, data, scans)
        console.print(", ".join(map(str, files)), highlight=False, markup=False, soft_wrap=True)
        if settings:
            console.print(
                "without them: " + " ".join(f"'{text}'" for text in settings),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    return 0 if data["ok"] else 2


def _first_of_each(say: Callable[[str], None]) -> Callable[[Finding], None]:
    """Says the first error of each kind as soon as it is found."""
    seen: set[str] = set()

    def on_error(found: Finding) -> None:
        if found.kind not in seen:
            seen.add(found.kind)
            row = f" (row {found.id})" if found.id and found.id not in found.reason else ""
            say(f"{place(found)}{row}: {found.kind}: {found.reason}")

    return on_error


@contextmanager
def _progress(
    console: Console, sources: dict[Role, str]
) -> Iterator[tuple[Callable[[Role], None], Callable[[str], None]]]:
    """A bar per file where somebody looks on. Yields what to call for each row, and for each line
    to say.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield (lambda _: None), say
        return
    columns: Sequence[TextColumn | BarColumn | MofNCompleteColumn | TimeRemainingColumn]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {
            role: bar.add_task(Path(source).name, total=_count(source))
            for role, source in sources.items()
        }
        yield (lambda role: bar.advance(tasks[role])), say


def _count(source: str) -> int | None:
    """Lines of a JSONL file; None where the number of rows is not told without reading them."""
    if not source.endswith(".jsonl") or not Path(source).is_file():
        return None
    with open(source, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
