"""What follows from a monitor's word: a line on record, an end of the run, or a way back to an
older checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.errors import NonFiniteError, NonFiniteWeightError, RolledBack, StoppedError
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.run.monitors import Event, Monitors
from rlfr_vlm.storage.checkpoint import PREFIX, list_checkpoints, read_best, set_aside, write_latest

EVENTS, METRICS, ROLLED_BACK = "events.jsonl", "metrics.jsonl", "rolled_back.jsonl"
ROLL_BACKS = "roll_backs.json"  # in the folder of the checkpoints


class Watch:
    """The monitors of a run and what they do; every rank has one, the first rank's decides."""

    def __init__(
        self, cfg: Config, folder: Path, ranks: Ranks, warn: Callable[[str], None]
    ) -> None:
        self.cfg, self.folder, self.ranks, self.warn = cfg, folder, ranks, warn
        self.monitors = Monitors(cfg)
        self.step = 0  # the last one that was seen
        self.track: Callable[[int, Event], None] | None = None  # tells the trackers

    def resume(self, step: int) -> None:
        """Go on after this step: what the monitors saw before it is read again, what came after it
        is to be written again.
        """
        self.step = step
        if not self.ranks.first:
            return
        keep_lines(self.folder / METRICS, lambda row: row["step"] <= step)
        # an empty file says that there were monitors, and that they saw nothing
        (self.folder / EVENTS).touch()
        rows = kept_events(read_lines(self.folder / EVENTS), step, count_roll_backs(self.folder))
        _write_lines(self.folder / EVENTS, rows)
        self.monitors.replay(
            merged(read_lines(self.folder / METRICS)),
            {row["monitor"] for row in rows if row["action"] == "warn"},
        )

    def look(self, step: int, figures: Mapping[str, float], refrain: str) -> None:
        """Let the monitors see a step, and do as they say. All ranks call it; figures and refrain
        are the first one's.

        Raises StoppedError, or RolledBack when the run stands at an older checkpoint now.
        """
        self.step = step
        events = self.monitors.see({"step": step, **figures}, refrain) if self.ranks.first else []
        self._act(self.ranks.broadcast(events, f"monitors of step {step}"))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Whatever in this block is not finite is an event of the step after the last one. All
        ranks must meet it.
        """
        try:
            yield
        except NonFiniteError as error:
            step = self.step + 1
            seen = (
                "No engine and no checkpoint has seen it"
                if isinstance(error, NonFiniteWeightError)
                else "No weight has seen it"
            )
            event = Event(
                step,
                step,
                "non_finite",
                self.cfg.monitors.non_finite,
                math.nan,
                0.0,
                str(error),
                "",
                seen,
            )
            try:
                self._act([event])
            except StoppedError as outcome:
                raise outcome from error

    def _act(self, events: Sequence[Event]) -> None:
        """Warn of all of them; of the others the first one counts, and stopping comes before going
        back.
        """
        urgent = min(
            (e for e in events if e.action in ("stop", "roll_back")),
            key=lambda e: e.action != "stop",
            default=None,
        )
        for event in events:
            if event is not urgent:
                # what it would have done is done by the urgent one
                self._say(replace(event, action="warn"))
        if urgent is None:
            return
        if urgent.action == "roll_back":
            urgent = self._roll_back(urgent)
        if urgent.action == "stop":
            self._say(urgent)
            raise StoppedError(
                f"{urgent.line} "
                f"(monitors.{urgent.monitor}={getattr(self.cfg.monitors, urgent.monitor)})"
            )
        raise RolledBack(
            f"{urgent.line} (monitors.{urgent.monitor}=roll_back: the run stands at step "
            f"{urgent.to}; the same command goes on)"
        )

    def _roll_back(self, event: Event) -> Event:
        """Back to the newest checkpoint from before it began, where there is one; the event as it
        came out.
        """
        outcome = event
        if self.ranks.first:
            done = count_roll_backs(self.folder)
            target = max(
                (s for s in checkpoint_steps(self.folder) if s < event.since), default=None
            )
            if done >= self.cfg.monitors.max_roll_backs:
                outcome = replace(
                    event,
                    action="stop",
                    do=f"{event.do}. It was rolled back {done} times already: "
                    "monitors.max_roll_backs",
                )
            elif target is None:
                outcome = replace(
                    event,
                    action="stop",
                    do=f"{event.do}. There is no checkpoint from before step {event.since} to go "
                    "back to",
                )
            else:
                outcome = replace(event, to=target)
                self._say(outcome)
                take_back(self.folder, outcome, done + 1)
        return self.ranks.broadcast(outcome, "rolling back")

    def _say(self, event: Event) -> None:
        if not self.ranks.first:
            return
        row = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in asdict(event).items()
        }
        with (self.folder / EVENTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.warn(event.line)
        if self.track is not None:
            self.track(event.step, event)


def count_roll_backs(folder: Path) -> int:
    """How often the run in this folder was rolled back."""
    try:
        return len(json.loads((folder / "checkpoints" / ROLL_BACKS).read_text()))
    except FileNotFoundError:
        return 0


def with_roll_backs(cfg: Config, ranks: Ranks = ALONE) -> Config:
    """The config of a run that may have been rolled back: after each time it draws other samples,
    and learns more slowly.
    """
    count = ranks.broadcast(
        count_roll_backs(Path(cfg.output_dir)) if ranks.first else 0, "counting roll-backs"
    )
    return cfg.model_copy(
        update={"monitors": cfg.monitors.model_copy(update={"roll_backs": count})}
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that there are."""
    return [
        int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(folder / "checkpoints")
    ]


def take_back(folder: Path, event: Event, number: int) -> None:
    """Set aside checkpoints, evaluations and rollouts, and move away metrics, of the steps after
    the one that is gone back to; the count comes last.

    Killed before that, the run goes on from the same checkpoint as if it had never gone further,
    and comes to the same point again.
    """
    assert event.to is not None
    root = folder / "checkpoints"
    for step in checkpoint_steps(folder):
        if step > event.to:
            set_aside(root, step, f"rolled-back-{number}")
    write_latest(root, f"{PREFIX}{event.to}")
    best = read_best(root)
    if best is None or best["step"] > event.to:  # another checkpoint will have its name
        (root / "best.json").unlink(missing_ok=True)
    for path in [*(folder / "eval").glob("step_*"), *(folder / "rollouts").glob("step_*")]:
        if (found := re.match(r"step_(\d+)", path.name)) and int(found[1]) > event.to:
            path.rename(path.with_name(f"rolled-back-{number}-{uuid.uuid4().hex[:8]}-{path.name}"))
    # a kill may have left some of this time
    before = [row for row in read_lines(folder / ROLLED_BACK) if row.get("roll_back", 0) < number]
    taken = [
        {"roll_back": number, **row}
        for row in read_lines(folder / METRICS)
        if row["step"] > event.to
    ]
    _write_lines(folder / ROLLED_BACK, [*before, *taken])
    keep_lines(folder / METRICS, lambda row: row["step"] <= event.to)
    known = json.loads((root / ROLL_BACKS).read_text()) if (root / ROLL_BACKS).exists() else []
    temporary = root / f".tmp-{ROLL_BACKS}"
    with temporary.open("w") as file:
        json.dump([*known, {"step": event.step, "to": event.to, "monitor": event.monitor}], file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / ROLL_BACKS)


def kept_events(
    rows: Sequence[Mapping[str, Any]], step: int, num_roll_backs: int
) -> list[Mapping[str, Any]]:
    """Events that stay when the run goes on after this step: those up to it, and all up to the last
    stop or roll-back.

    A roll-back beyond the count was cut short by a kill: it will come again.
    """
    kept: list[Mapping[str, Any]] = []
    # of steps that are to come again, unless a stop or a roll-back follows
    later: list[Mapping[str, Any]] = []
    done = 0
    for row in rows:
        done += row.get("action") == "roll_back"
        if row.get("action") == "stop" or (
            row.get("action") == "roll_back" and done <= num_roll_backs
        ):
            kept, later = [*kept, *later, row], []
        elif row.get("action") == "warn":
            (kept if row["step"] <= step else later).append(row)
    return kept


def merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step of training, without the lines of evaluations."""
    return [dict(row) for row in rows if any(name.startswith("reward/") for name in row)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file with a `step`; a line that was torn by a kill ends it."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


def keep_lines(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite a JSONL file, where there is one, with the rows that are wanted."""
    if path.exists():
        _write_lines(path, [row for row in read_lines(path) if wanted(row)])


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
