"""What a monitor finds in the steps' metrics, and the helpers of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from rlfr_vlm.config import Config
from rlfr_vlm.run.mismatch import Figures

WINDOW = 5  # steps that are averaged where single ones are noisy


@dataclass(frozen=True)
class Sign:
    """Something that looks wrong in the last step."""

    value: float
    limit: float
    what: str
    cause: str
    do: str


# config, steps so far, commonest refrain
Check = Callable[[Config, Sequence[Figures], str], Sign | None]


def mean_and_margin(rows: Sequence[Figures], name: str) -> tuple[float, float] | None:
    """Mean and two standard errors of a figure over the steps that have it; None where they are too
    few.
    """
    values = column(rows, name)
    return (
        None
        if len(values) < 2 * WINDOW
        else (fmean(values), 2 * stdev(values) / math.sqrt(len(values)))
    )


def beyond_noise(values: Sequence[float], change: float) -> bool:
    """Whether a change of the mean of three steps is more than four standard errors; the noise of a
    step is taken from its successor.
    """
    noise = fmean((b - a) ** 2 for a, b in pairwise(values)) / 2
    return abs(change) > 4 * math.sqrt(noise / 3)


def column(rows: Sequence[Figures], name: str) -> list[float]:
    """A metric in the steps that have it."""
    return [row[name] for row in rows if name in row]
