"""The report of a run that is still training: written again and again, at a price that is kept
small, and never at the price of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rlfr_vlm.errors import UserError
from rlfr_vlm.report.html import write_report

# times its own duration that pass before a report is written again: less than 1/60 of the run's
# time
REST = 60
HURRY = 5.0  # seconds that a page may take of the time between SIGTERM and SIGKILL
FAILURES = (
    UserError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
)  # what a folder in any state can lead to


class ReportKeeper:
    """Keeps `report.html` of a run up to date."""

    def __init__(
        self, folder: Path, warn: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: seconds."""
        self.folder, self.warn, self.clock = folder, warn, clock
        self._due = clock()
        self._took = 0.0
        self._warned = False

    def __call__(self, last: bool = False, hurried: bool = False) -> None:
        """Write it, unless that was done a moment ago; the last one is always written. What fails
        is said once.

        hurried: the run was asked to stop and is killed if it does not: a page that took long is
            left as it is.
        """
        start = self.clock()
        if (start < self._due and not last) or (hurried and self._took > HURRY):
            return
        try:
            write_report(self.folder)
        except FAILURES as error:
            if not self._warned:
                self.warn(
                    f"report.html was not written: {error or type(error).__name__}; the run goes "
                    "on without it"
                )
            self._warned = True
        self._took = self.clock() - start
        self._due = start + (1 + REST) * self._took
