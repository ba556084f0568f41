"""What the monitors said during a run, as the page carries it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from rlfr_vlm.report.reading import FileNote, as_number, as_text, as_whole, is_there, json_lines

MAX_EVENTS = 1000  # on the page; the last ones
MAX_LETTERS = 1000  # of each text of an event


@dataclass(frozen=True)
class LoggedEvent:
    """One line of `events.jsonl`."""

    step: int
    since: int | None  # first step of what is meant
    monitor: str
    action: str  # warn, stop, roll_back; another one is shown as it is
    value: float | None
    limit: float | None
    what: str
    cause: str
    do: str  # what to do about it
    to: int | None  # step that a roll-back went back to


class EventData(TypedDict):
    """What the monitors said, as the page reads it."""

    events: list[LoggedEvent]
    numLeftOut: int
    numRollBacks: int
    numStepsTakenBack: int
    watched: bool


@dataclass(frozen=True)
class EventLog:
    """Events in the order of their file: after a roll-back, steps come again."""

    events: tuple[LoggedEvent, ...] = ()
    num_left_out: int = 0  # earlier ones
    num_roll_backs: int = 0  # in `rolled_back.jsonl`
    num_steps_taken_back: int = 0
    watched: bool = False  # there is such a file: monitors write it even where they say nothing

    def for_page(self) -> EventData:
        """As JSON."""
        return {
            "events": list(self.events),
            "numLeftOut": self.num_left_out,
            "numRollBacks": self.num_roll_backs,
            "numStepsTakenBack": self.num_steps_taken_back,
            "watched": self.watched,
        }


def read_events(folder: Path, problems: list[FileNote]) -> EventLog:
    """The run's log of events. No file is no problem: the run had no monitors."""
    events: list[LoggedEvent] = []
    left_out = strange = 0
    path = folder / "events.jsonl"
    for row in json_lines(path, problems, may_be_empty=True) if is_there(path) else ():
        event = _event(row)
        if event is None:
            strange += 1
            continue
        events.append(event)
        if len(events) >= 2 * MAX_EVENTS:  # memory is bounded, and each line is moved at most once
            left_out += len(events) - MAX_EVENTS
            del events[:-MAX_EVENTS]
    left_out += max(0, len(events) - MAX_EVENTS)
    if strange:
        problems.append(
            FileNote(
                "damaged",
                path.name,
                f"{strange} events name no step, or neither monitor nor text; left out",
            )
        )
    roll_backs, steps = _taken_back(folder / "rolled_back.jsonl", problems)
    return EventLog(tuple(events[-MAX_EVENTS:]), left_out, roll_backs, steps, is_there(path))


def _event(row: dict[str, Any]) -> LoggedEvent | None:
    step = as_whole(row.get("step"))
    texts = {
        name: as_text(row.get(name))[:MAX_LETTERS]
        for name in ("monitor", "action", "what", "cause", "do")
    }
    if step is None or not (texts["monitor"] or texts["what"]):
        return None
    return LoggedEvent(
        step=step,
        since=as_whole(row.get("since")),
        value=as_number(row.get("value")),
        limit=as_number(row.get("limit")),
        to=as_whole(row.get("to")),
        **texts,
    )


def _taken_back(path: Path, problems: list[FileNote]) -> tuple[int, int]:
    """Roll-backs, and the steps that they took back: a step taken back twice counts twice."""
    if not is_there(path):
        return 0, 0
    steps = {
        (as_whole(row.get("roll_back")), as_whole(row.get("step")))
        for row in json_lines(path, problems)
    }
    return len({roll_back for roll_back, _ in steps}), len(steps)
