"""What the fit found its field to be worth: `flow_yardstick.json` of a field's folder, as far as it
can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from rlfr_vlm.report.reading import FileNote, as_number, as_whole, is_there, json_object

FILE = "flow_yardstick.json"
FIELD = "field"  # name of the field's own deviation
KNOWS_NOTHING = "x_t / t"  # the one that a fit has to pass
MOST = 500  # rows, or names in them: a field has a few
LONGEST = 60  # letters of a name


@dataclass(frozen=True)
class HeldOut:
    """Deviations on held-out tokens, by what predicted the velocity."""

    layer: int  # -1: all
    at: str  # fit: at random times; reward: at those of the reward
    values: dict[str, float]


@dataclass(frozen=True)
class ProbedAuc:
    """How often a wrong sibling has more of something than a right one."""

    name: str
    auc: float
    low: float | None  # of the 95 % interval
    high: float | None
    pairs: int | None


class YardstickData(TypedDict):
    """A fit's figures, as the page reads them."""

    source: str
    rows: list[HeldOut]
    aucs: list[ProbedAuc]
    num_responses: int | None
    accuracy: float | None
    names: list[str]  # of any row's values


@dataclass(frozen=True)
class Yardstick:
    """Of one fit."""

    source: str  # where it was read
    rows: tuple[HeldOut, ...]  # those of all layers first
    aucs: tuple[ProbedAuc, ...]
    num_responses: int | None
    accuracy: float | None

    def for_page(self) -> YardstickData:
        """As JSON."""
        return {
            "source": self.source,
            "rows": list(self.rows),
            "aucs": list(self.aucs),
            "num_responses": self.num_responses,
            "accuracy": self.accuracy,
            "names": list(dict.fromkeys(name for row in self.rows for name in row.values)),
        }

    def overall(self, at: str = "reward") -> dict[str, float]:
        """Deviations of all layers together; empty where they are not known."""
        return next((row.values for row in self.rows if row.layer == -1 and row.at == at), {})


def read_yardstick(
    folder: Path, config: dict[str, Any], problems: list[FileNote]
) -> Yardstick | None:
    """That of the run's own fit, else of the one that `flow.checkpoint` of its config names; None
    where there is none.
    """
    if "flow" in config and config["flow"] is None:  # a field may lie there, but this run read none
        return None
    for path, source in _places(folder, config):
        if is_there(path):
            tree = json_object(path, problems)
            rows, aucs = _rows(tree.get("deviation")), _aucs(tree.get("separation"))
            separation = tree.get("separation")
            told = separation if isinstance(separation, dict) else {}
            known = as_whole(told.get("responses")), as_number(told.get("accuracy"))
            return Yardstick(source, rows, aucs, *known) if rows or aucs else None
    return None


def _places(folder: Path, config: dict[str, Any]) -> list[tuple[Path, str]]:
    places = [(folder / "flow" / FILE, f"flow/{FILE}"), (folder / FILE, FILE)]
    flow = config.get("flow")
    checkpoint = flow.get("checkpoint") if isinstance(flow, dict) else None
    if isinstance(checkpoint, str) and checkpoint:
        places.append((Path(checkpoint) / FILE, f"{checkpoint}/{FILE}"))
    return places


def _rows(rows: Any) -> tuple[HeldOut, ...]:
    found = []
    for row in rows[:MOST] if isinstance(rows, list) else ():
        layer, at = (
            (as_whole(row.get("layer")), row.get("at")) if isinstance(row, dict) else (None, None)
        )
        if layer is None or at not in ("fit", "reward"):
            continue
        numbers = {
            name[:LONGEST]: as_number(value)
            for name, value in list(row.items())[:MOST]
            if name not in ("layer", "at")
        }
        if values := {name: value for name, value in numbers.items() if value is not None}:
            found.append(HeldOut(layer, at, values))
    return tuple(sorted(found, key=lambda row: (row.layer, row.at != "reward")))


def _aucs(separation: Any) -> tuple[ProbedAuc, ...]:
    aucs = separation.get("auc") if isinstance(separation, dict) else None
    found = []
    for name, values in list(aucs.items())[:MOST] if isinstance(aucs, dict) else ():
        auc, low, high = (
            (_share(values.get(key)) for key in ("auc", "low", "high"))
            if isinstance(values, dict)
            else (None,) * 3
        )
        if auc is not None:
            found.append(ProbedAuc(name[:LONGEST], auc, low, high, as_whole(values.get("pairs"))))
    return tuple(found)


def _share(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and 0 <= number <= 1 else None
