"""Runs that differ in their seed alone, as one line: mean over seeds, with a t-interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """Mean of several runs with its 95 % t-interval."""

    mean: float
    low: float
    high: float
    num_runs: int


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def band(values: Sequence[float]) -> Band:
    """mean -+ t s / sqrt(n) of n >= 2 runs, s their standard deviation with n - 1."""
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Band(mean, mean - half, mean + half, n)


def pooled(lines: Sequence[Mapping[int, float]]) -> dict[int, Band]:
    """Bands by step, at the steps at which every run has a value: a mean over other runs at each
    step would jump between them.
    """
    steps = set.intersection(*(set(line) for line in lines)) if len(lines) > 1 else set()
    return {step: band([line[step] for line in lines]) for step in sorted(steps)}
