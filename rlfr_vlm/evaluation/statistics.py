"""What an evaluation's verdicts say: accuracy, pass@k, majority vote, their 95 % intervals, and the
paired comparison of two models.

Input is one list per problem of the samples that have a verdict; the lists may differ in length,
and a problem with none is left out.
Problems are the units of chance: samples of one problem are one cluster, whatever their number
    (arXiv:2411.00640, section 2.2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a two-sided 95 % interval
DRAWS = 10_000  # of the permutation test


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float
    num_problems: int


@dataclass(frozen=True)
class Scored:
    """One response as the statistics see it."""

    correct: bool | None  # None: no verdict; it is in no accuracy
    answer: str = ""  # as extracted, "" where there is none
    truncated: bool = False
    length: int = 0  # tokens


@dataclass(frozen=True)
class Summary:
    """An evaluation in numbers. Accuracies are over responses with a verdict, the rest over all
    responses.
    """

    accuracy: Estimate | None  # avg@k; None: no response has a verdict
    pass_at: dict[int, Estimate]
    majority: Estimate | None  # maj@k
    extracted: float  # share of responses that an answer was extracted from
    truncated: float  # share cut at the limit
    mean_length: float
    num_problems: int
    num_samples: int  # responses
    num_counted: int  # with a verdict


@dataclass(frozen=True)
class Paired:
    """How the second model does against the first on the same problems."""

    difference: Estimate
    p_value: float  # of no difference, two-sided
    test: str


def summarize(problems: Sequence[Sequence[Scored]]) -> Summary:
    """Every number of one evaluation; one list of responses per problem."""
    responses = [s for samples in problems for s in samples]
    counted = [
        [(s.answer, s.correct) for s in samples if s.correct is not None] for samples in problems
    ]
    correct = [[right for _, right in answers] for answers in counted]
    return Summary(
        accuracy=estimate(shares(correct)),
        pass_at=pass_curve(correct),
        majority=estimate([majority(answers) for answers in counted if answers]),
        extracted=_mean([s.answer != "" for s in responses]),
        truncated=_mean([s.truncated for s in responses]),
        mean_length=_mean([s.length for s in responses]),
        num_problems=len(problems),
        num_samples=len(responses),
        num_counted=sum(map(len, correct)),
    )


# --- one evaluation -------------------------------------------------------------------------------


def shares(correct: Sequence[Sequence[bool]]) -> list[float]:
    """Share of right samples of each problem that has any; their mean is avg@k."""
    return [sum(samples) / len(samples) for samples in correct if samples]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean over problems of values in [0, 1], with its interval; None without a problem."""
    return Estimate(_mean(values), *mean_interval(values), len(values)) if values else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased, from c right ones of n >= k
    (arXiv:2107.03374).

    pass@k = 1 - C(n - c, k) / C(n, k)
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_curve(correct: Sequence[Sequence[bool]]) -> dict[int, Estimate]:
    """pass@k for every k up to the largest number of samples; at each k over the problems that have
    k (see `num_problems`).
    """
    counts = [(len(samples), sum(samples)) for samples in correct if samples]
    curve = {}
    for k in range(1, max((n for n, _ in counts), default=0) + 1):
        found = estimate([pass_at_k(n, c, k) for n, c in counts if n >= k])
        assert found is not None
        curve[k] = found
    return curve


def majority(answers: Sequence[tuple[str, bool]]) -> float:
    """Whether the most frequent answer of one problem is right; (answer, right) of each sample.
    Equal strings are one answer.

    Tied answers count with their mean, what a fair draw among them would give; an answer that was
    judged both ways counts with its share of right verdicts. Empty answers have no vote; without a
    vote the problem is wrong.
    """
    votes: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, right in answers:
        if answer:
            votes[answer].append(right)
    most = max(map(len, votes.values()), default=0)
    return _mean([_mean(rights) for rights in votes.values() if len(rights) == most])


def wilson_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion p in n independent trials (statsmodels'
    `proportion_confint(method="wilson")`).

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean p over problems of n values in [0, 1], such as shares of right
    samples or pass@k.

    D = s^2 / (p (1 - p)) <= 1,   D' = (u D + 1) / (u + 1),   Wilson's interval of p in n / D'
    trials

    s^2: variance between problems, so that samples of one problem are one cluster. D: design effect
    against one right-or-wrong sample per problem, for which it is 1 and the interval is Wilson's
    own. Wilson's form with n / D keeps its coverage near 0 and 1, where normal and bootstrap
    intervals lose it (doi:10.1093/jssam/smy019). u: how many problems tell D from its largest
    value, the fewer of those with a value above 0 and of those below 1. One such problem more, at D
    = 1, is our addition: without it coverage falls to 85 % at 30 problems of 16 samples with 2 %
    right. Measured in tests/evaluation/test_statistics.py.
    """
    if not len(values):
        return 0.0, 1.0
    array = np.asarray(values, dtype=float)
    n, p = len(array), float(array.mean())
    effect = min(1.0, float(array.var(ddof=1)) / (p * (1 - p))) if n > 1 and 0 < p < 1 else 1.0
    telling = min(np.count_nonzero(array > 0), np.count_nonzero(array < 1))
    return wilson_interval(p, n * (telling + 1) / (telling * effect + 1))


# --- two evaluations on the same problems ---------------------------------------------------------


def paired(
    before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]], seed: int = 0
) -> Paired:
    """Accuracy of `after` minus that of `before`; the same problems in the same order, each with at
    least one sample in both.

    The p value is McNemar's, exact, where every problem has one sample in both, else that of a
    paired permutation test over problems.
    """
    if not before or any(not a or not b for a, b in zip(before, after, strict=True)):
        raise ValueError("a paired comparison needs problems with samples in both")
    differences = [b - a for a, b in zip(shares(before), shares(after), strict=True)]
    change = Estimate(_mean(differences), *difference_interval(differences), len(differences))
    if all(len(a) == len(b) == 1 for a, b in zip(before, after, strict=True)):
        return Paired(
            change,
            mcnemar(sum(d < 0 for d in differences), sum(d > 0 for d in differences)),
            "McNemar, exact",
        )
    return Paired(change, permutation(differences, seed), "paired permutation")


def difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of the n problems' differences d in [-1, 1].

    d' = d with +g and -g appended,   mean(d') -+ z sqrt(var(d') / (n + 2)),
    g^2 = (sum d^2 + 1) / (u + 1),   u: problems with d != 0

    With one sample per problem g = 1, and it is the interval of Bonett and Price
    (doi:10.3102/1076998611411915), which does not shrink to a point where no problem changed. With
    more, g is the size of a typical change, with one of size 1 added to those seen.
    """
    array = np.asarray(differences, dtype=float)
    changed = int(np.count_nonzero(array))
    size = math.sqrt((float(array @ array) + 1) / (changed + 1))
    array = np.append(array, (size, -size))
    half = Z * math.sqrt(float(array.var()) / len(array))
    return max(-1.0, float(array.mean()) - half), min(1.0, float(array.mean()) + half)


def mcnemar(lost: int, gained: int) -> float:
    """Exact McNemar test: two-sided binomial p value of this split of the problems that changed,
    each way being as likely.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0


def permutation(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p value of a paired permutation test: the labels of the two models are swapped, or
    not, at each problem.

    Exact where the problems that differ can be swapped in at most DRAWS ways; else (1 + extremes) /
    (1 + DRAWS) of seeded draws.
    """
    from scipy.stats import permutation_test

    changed = np.array([d for d in differences if d], dtype=float)
    if len(changed) < 2:  # swapped or not, one difference is of one size
        return 1.0

    def size(x: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(x.sum(axis).round(9))  # sums that are equal may differ by rounding

    found = permutation_test(
        (changed,),
        size,
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWS,
        batch=DRAWS // 10,
        alternative="greater",
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else 0.0
