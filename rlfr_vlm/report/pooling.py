"""Runs that differ in their seed alone, as one line: mean over seeds, with a t-interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlfr_vlm.evaluation.statistics import Z

# Quantiles of Student's t for a two-sided 95 % interval, by degrees of freedom from 1.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class Band:
    """Mean of several runs with its 95 % t-interval."""

    mean: float
    low: float
    high: float
    num_runs: int


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; beyond the table from the normal's, with the first terms of
    its expansion in 1 / degrees.
    """
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / degrees + second / degrees**2 + third / degrees**3


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
