"""Watching a run: what looks wrong, since when, why, and what to do. Each monitor is a function of
the steps' figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.run.checks import (
    check_accuracy,
    check_entropy,
    check_format,
    check_length,
    check_mismatch,
    check_non_finite,
    check_repetition,
    check_truncation,
    check_update,
    check_zero_variance,
)
from rlfr_vlm.run.flow_checks import (
    check_flow_collapse,
    check_flow_hacked,
    check_flow_inverted,
    check_flow_share,
    check_flow_unfit,
)
from rlfr_vlm.run.mismatch import Figures
from rlfr_vlm.run.signs import Check


@dataclass(frozen=True)
class Event:
    """What a monitor says; a line of events.jsonl."""

    step: int
    since: int  # first step that looked wrong
    monitor: str
    action: str
    value: float
    limit: float
    what: str
    cause: str
    do: str
    to: int | None = None  # step that a roll-back went back to

    @property
    def line(self) -> str:
        """For the terminal."""
        since = f", since step {self.since}" if self.since < self.step else ""
        cause = f". Likely cause: {self.cause}" if self.cause else ""
        return f"step {self.step}{since}: {self.monitor}: {self.what}{cause}. {self.do}"


CHECKS: dict[str, Check] = {
    "non_finite": check_non_finite,
    "update": check_update,
    "mismatch": check_mismatch,
    "accuracy": check_accuracy,
    "entropy": check_entropy,
    "length": check_length,
    "truncation": check_truncation,
    "repetition": check_repetition,
    "format": check_format,
    "zero_variance": check_zero_variance,
    "flow_share": check_flow_share,
    "flow_collapse": check_flow_collapse,
    "flow_inverted": check_flow_inverted,
    "flow_hacked": check_flow_hacked,
    "flow_unfit": check_flow_unfit,
}


class Monitors:
    """All of them, with the steps that they have seen."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.rows: list[Figures] = []
        # steps in a row that look wrong, or minus those that do not
        self.streaks: dict[str, int] = dict.fromkeys(CHECKS, 0)
        # it has spoken, and speaks again after as many good steps
        self.quiet: dict[str, bool] = dict.fromkeys(CHECKS, False)

    def replay(self, rows: Sequence[Mapping[str, Any]], said: Collection[str] = ()) -> None:
        """See the steps before a resumed run's first. said: monitors that have warned of them;
        others may have been off, or had other limits.
        """
        for row in rows:
            self.see(
                {
                    name: float(value)
                    for name, value in row.items()
                    if isinstance(value, int | float)
                }
            )
        for name in CHECKS:
            self.quiet[name] &= name in said and getattr(self.cfg.monitors, name) == "warn"

    def see(self, figures: Figures, refrain: str = "") -> list[Event]:
        """What a further step gives rise to. figures: its metrics, `step` among them; refrain: text
        of the commonest repeated 4-gram.
        """
        self.rows.append(figures)
        found = []
        for name, check in CHECKS.items():
            action = getattr(self.cfg.monitors, name)
            sign = None if action == "off" else check(self.cfg, self.rows, refrain)
            patience = 1 if name == "non_finite" else self.cfg.monitors.patience
            if sign is None:
                self.streaks[name] = min(0, self.streaks[name]) - 1
                self.quiet[name] &= -self.streaks[name] < patience
                continue
            self.streaks[name] = max(0, self.streaks[name]) + 1
            if self.streaks[name] >= patience and not self.quiet[name]:
                self.quiet[name] = True
                step = int(figures["step"])
                since = int(self.rows[-self.streaks[name]]["step"])
                found.append(
                    Event(
                        step,
                        since,
                        name,
                        action,
                        sign.value,
                        sign.limit,
                        sign.what,
                        sign.cause,
                        sign.do,
                    )
                )
        return found
