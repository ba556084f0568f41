"""Rows that cannot be used, and what happens to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rlfr_vlm.config import DataConfig
from rlfr_vlm.errors import UserError

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of a row for a message: what steers a terminal, turns its direction or cannot be encoded
    is shown as its escape.
    """
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


class RowError(Exception):
    """A row that cannot be used. `kind` is a short class for counting, `fault` names the defect
    (rlfr_vlm.preflight.kinds lists them); the message says what is wrong and where.
    """

    def __init__(self, kind: str, message: str, fault: str = "") -> None:
        super().__init__(printable(message))
        self.kind = kind
        self.fault = fault or kind


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    id: str
    kind: str
    reason: str


class BadRows:
    """What happens to rows that cannot be used: stop at the first, or skip, record and count
    them.
    """

    def __init__(
        self, cfg: DataConfig, record: Path | None = None, switch: str = "data.on_bad_row=skip"
    ) -> None:
        """record: where skipped rows are written down. switch: what the user has to write for rows
        to be skipped.
        """
        self.stop, self.switch = cfg.on_bad_row == "stop", switch
        self.max_frac = cfg.max_bad_frac
        self.record = record
        self.rows: list[BadRow] = []
        self.total = 0  # rows of the data set

    def add(self, row_id: str, error: RowError, total: int) -> None:
        """Raises UserError with `on_bad_row=stop`, or when more than `max_bad_frac` of all rows are
        bad.

        total: rows that the caller looks at. A later look is at those that earlier ones left: the
            first is at all of them.
        """
        if self.stop:
            raise UserError(f"{error} ({self.switch} leaves such rows out)")
        row = BadRow(row_id, error.kind, str(error))
        self.rows.append(row)
        if self.record is not None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with self.record.open("a") as file:
                file.write(json.dumps(row.__dict__) + "\n")
        self.total = max(self.total, total)
        if len(self.rows) > self.max_frac * self.total:
            raise UserError(
                f"{len(self.rows)} bad rows of {self.total} exceed "
                f"data.max_bad_frac={self.max_frac}; the last: {error}"
            )
