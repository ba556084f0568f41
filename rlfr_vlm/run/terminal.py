"""What a run says to who watches it: lines, warnings, and on a terminal a bar of its steps."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Terminal:
    """Standard error; of several ranks only the first one's."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._progress: Progress | None = None  # on a terminal; elsewhere one line per step

    def start(self, done: int, steps: int) -> None:
        """From here on steps are shown."""
        if self.console.is_terminal:
            self._progress = progress_bar(self.console)
            self._progress.add_task("train", total=steps, completed=done, figures="")
            self._progress.start()

    def step(self, step: int, steps: int, figures: str, seconds: float) -> None:
        """A step's figures."""
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=step, figures=figures)
        else:
            self.say(f"step {step}/{steps}  {figures}  {seconds:.2f} s")

    def say(self, message: str) -> None:
        """A line for the user."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """A line that deserves attention."""
        self.console.print(
            f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()


def progress_bar(console: Console) -> Progress:
    """Steps done, the figures of the last one, time gone and left."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
