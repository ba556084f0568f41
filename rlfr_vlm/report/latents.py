"""Where responses lie among each other: their latents in two dimensions, whether right and wrong
ones lie apart, and how far all have moved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from rlfr_vlm.flow.separation import wins
from rlfr_vlm.report.flow_health import Remark, against_chance, in_words
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.rollout_data import short
from rlfr_vlm.report.run_files import Group, Metrics

MAX_ROWS = 100_000  # responses that are kept, evenly from all steps; 64 numbers each
MAX_POINTS = 4000  # on the page
MAX_QUESTION, MAX_PREDICTION = 100, 40  # letters under the pointer
LEAST_OF_EACH = 5  # right and wrong responses of a step, for an AUC on it
LEAST_TO_FIT = 20  # right and wrong responses of the other steps
FIRST_STEPS = 0.1  # share of the steps that drift is measured from

Matrix = NDArray[np.float64]
RIGHT, WRONG, ERROR = 0, 1, 2
CODES = {"correct": RIGHT, "wrong": WRONG}


@dataclass(frozen=True)
class Row:
    """One response, without its latent."""

    step: int
    group: int  # of the step
    response: int  # of the group, by sample_index
    verdict: int  # RIGHT, WRONG or ERROR
    on_page: bool  # the rollout browser has it
    question: str
    prediction: str
    reward: float | None


class LatentCensus:
    """Collects latents, a step at a time, in any order of steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.most_per_step = max(1, MAX_ROWS // max(1, len(steps)))
        self.rows: list[Row] = []
        self.latents: list[NDArray[np.float32]] = []
        self.num_unusable = 0

    def add(self, step: int, groups: Sequence[Group], num_on_page: int) -> None:
        """Keep a step's latents. The first `num_on_page` groups are those that the rollout browser
        has.
        """
        found = [
            (number, at)
            for number, group in enumerate(groups)
            for at, r in enumerate(group.responses)
            if r.latent is not None
        ]
        usable = [
            (number, at) for number, at in found if _usable(groups[number].responses[at].latent)
        ]
        self.num_unusable += len(found) - len(usable)
        for number, at in evenly(usable, self.most_per_step):
            group, response = groups[number], groups[number].responses[at]
            if response.latent is None:
                continue
            question, prediction = (
                group.question[:MAX_QUESTION],
                response.prediction[:MAX_PREDICTION],
            )
            code = CODES.get(response.verdict, ERROR)
            self.rows.append(
                Row(
                    step,
                    number,
                    at,
                    code,
                    number < num_on_page,
                    question,
                    prediction,
                    response.reward,
                )
            )
            self.latents.append(response.latent)

    def matrix(self, problems: list[FileNote]) -> tuple[list[Row], Matrix]:
        """Rows by step and place, and their latents [N, D]: those of the commonest length. Centred
        and scaled to a size near 1.
        """
        sizes = Counter(len(latent) for latent in self.latents)
        size = max(sizes, key=lambda length: (sizes[length], length), default=0)
        kept = [at for at, latent in enumerate(self.latents) if len(latent) == size]
        unusable = self.num_unusable + len(self.latents) - len(kept)
        if unusable:
            problems.append(
                FileNote(
                    "damaged",
                    "rollouts",
                    f"{unusable} latents are not numbers of one length; left out",
                )
            )
        kept.sort(key=lambda at: (self.rows[at].step, self.rows[at].group, self.rows[at].response))
        x = np.array([self.latents[at] for at in kept], dtype=np.float64).reshape(len(kept), size)
        x -= x.mean(axis=0) if len(kept) else 0.0
        scale = np.abs(x).max(initial=0.0)
        return [self.rows[at] for at in kept], x / scale if scale > 0 else x


def _usable(latent: NDArray[np.float32] | None) -> bool:
    return latent is not None and len(latent) > 0 and bool(np.isfinite(latent).all())


class LatentPoints(TypedDict):
    """Responses as columns, as the page reads them."""

    x: list[float]
    y: list[float]
    step: list[int]
    verdict: list[int]  # RIGHT, WRONG or ERROR
    group: list[int | None]  # None: not on the page
    response: list[int]
    reward: list[float | None]
    prediction: list[str]
    question: list[int]  # place in `questions`
    questions: list[str]


class LatentData(TypedDict):
    """The view of latents without its points, as the page reads it."""

    explained: tuple[float, float]
    numResponses: int
    numPoints: int
    verdicts: list[Remark]


class NoLatents(TypedDict):
    """Why there are none."""

    missing: str


@dataclass(frozen=True)
class LatentView:
    """What the page draws."""

    points: LatentPoints
    explained: tuple[float, float]  # shares of the variance
    curves: Metrics  # auc, auc_in_group, drift, drift_chance by step
    num_responses: int
    verdicts: tuple[Remark, ...]

    def for_page(self) -> LatentData:
        """As JSON, without points and curves."""
        return {
            "explained": self.explained,
            "numResponses": self.num_responses,
            "numPoints": len(self.points["x"]),
            "verdicts": list(self.verdicts),
        }


def latent_view(census: LatentCensus, problems: list[FileNote]) -> LatentView | None:
    """Project, compare and measure; None where the rollouts hold no latents that differ."""
    rows, x = census.matrix(problems)
    if not len(rows) or not x.any():
        return None
    verdict = np.array([row.verdict for row in rows])
    plane, explained = principal_plane(x, verdict)
    steps = sorted({row.step for row in rows})
    number = {step: at for at, step in enumerate(steps)}
    step = np.array([number[row.step] for row in rows])
    keys = {key: at for at, key in enumerate(dict.fromkeys((row.step, row.group) for row in rows))}
    group = np.array([keys[row.step, row.group] for row in rows])
    drift, chance = centroid_drift(x, step, group)
    curves = {
        "auc": separability(x, verdict, step),
        "auc_in_group": separability(x, verdict, step, group),
        "drift": drift,
        "drift_chance": chance,
    }
    verdicts = (_apart(curves["auc"], curves["auc_in_group"]), _moved(drift, chance))
    return LatentView(
        _points(rows, plane, step), explained, Metrics(tuple(steps), curves), len(rows), verdicts
    )


def _apart(auc: tuple[float | None, ...], in_group: tuple[float | None, ...]) -> Remark:
    """Whether a line separates right from wrong."""
    pairs, siblings = against_chance(auc), against_chance(in_group)
    if pairs is None:
        least = (
            f"a step counts with {LEAST_OF_EACH} right and {LEAST_OF_EACH} wrong responses, "
            f"and the others need {LEAST_TO_FIT} of each"
        )
        return Remark("none", f"No verdict on right and wrong: too few responses ({least}).")
    over = in_words(pairs, siblings, f"over {pairs.count} steps")
    if pairs.sign <= 0:
        return Remark(
            "plain",
            "No line fitted on other steps separates right from wrong answers better than chance: "
            f"{over}.",
        )
    apart = "Right and wrong answers lie apart, along a line fitted on other steps"
    if siblings and siblings.sign <= 0:
        return Remark(
            "plain",
            f"{apart}, but not clearly among siblings: {over}. The line may tell hard questions "
            "from easy ones.",
        )
    return Remark("good", f"{apart}: {over}.")


def _moved(drift: tuple[float | None, ...], chance: tuple[float | None, ...]) -> Remark:
    """How far the last responses are from the first ones."""
    last, floor = (
        [value for value in values[-10:] if value is not None] for values in (drift, chance)
    )
    if len(drift) < 2 or not last:
        return Remark("none", "No verdict on drift: there is one step.")
    text = f"The last responses lie {fmean(last):.2f} spreads from the first ones"
    if not floor:
        return Remark("plain", f"{text}.")
    than = "more than" if fmean(last) > 1.5 * fmean(floor) else "not clearly more than"
    return Remark(
        "plain",
        f"{text}, {than} the {fmean(floor):.2f} that the draw of questions alone would give.",
    )


def principal_plane(x: Matrix, verdict: NDArray[np.int_]) -> tuple[Matrix, tuple[float, float]]:
    """Centred x [N, D] on the two directions of most variance [N, 2], and the share of the variance
    along each.

    A direction's sign is free: right answers (verdict 0) are on average further right and further
    up than wrong ones.
    """
    _, sizes, directions = np.linalg.svd(x, full_matrices=False)
    plane = np.zeros((len(x), 2))
    plane[:, : len(directions[:2])] = x @ directions[:2].T
    if (verdict == RIGHT).any() and (verdict == WRONG).any():
        plane *= np.where(
            plane[verdict == RIGHT].mean(axis=0) < plane[verdict == WRONG].mean(axis=0), -1.0, 1.0
        )
    shares = [*(sizes**2 / (sizes**2).sum()), 0.0]
    return plane, (float(shares[0]), float(shares[1]))


def separability(
    x: Matrix,
    verdict: NDArray[np.int_],
    step: NDArray[np.int_],
    group: NDArray[np.int_] | None = None,
) -> tuple[float | None, ...]:
    """AUC per step of the best linear direction between right and wrong responses, which is fitted
    on all other steps.

    Linear discriminant with shrinkage: w = S^-1 (m_right - m_wrong), S the covariance within the
        classes of the n responses of the other steps,
    drawn to a multiple of the identity by D / (n + D). With `group`: only siblings are compared,
    after each group's mean is taken off, so that a direction which tells hard questions from easy
    ones gains nothing. None where a step has fewer than LEAST_OF_EACH right or wrong responses
    (with `group`: in groups that have both), or the others fewer than LEAST_TO_FIT.

    x: [N, D]; verdict: [N] of RIGHT, WRONG, ERROR; step: [N] numbered from 0; group: [N] numbered
        from 0. Returns a value per step.
    """
    use = verdict != ERROR
    if group is not None:
        x, both = _among_siblings(x, verdict, group)
        use &= both
    count = int(step.max()) + 1
    members = [np.flatnonzero(use & (step == at)) for at in range(count)]
    right = [at[verdict[at] == RIGHT] for at in members]
    wrong = [at[verdict[at] == WRONG] for at in members]
    everything = _Moments.of(x[np.concatenate(right)]), _Moments.of(x[np.concatenate(wrong)])
    aucs: list[float | None] = []
    for here_right, here_wrong in zip(right, wrong, strict=True):
        fit = [
            whole.without(_Moments.of(x[here]))
            for whole, here in zip(everything, (here_right, here_wrong), strict=True)
        ]
        if (
            min(len(here_right), len(here_wrong)) < LEAST_OF_EACH
            or min(fit[0].count, fit[1].count) < LEAST_TO_FIT
        ):
            aucs.append(None)
            continue
        to_wrong = -_discriminant(fit[0], fit[1])
        here = np.concatenate((here_right, here_wrong))
        parts = (
            [here] if group is None else [here[group[here] == g] for g in np.unique(group[here])]
        )
        counted = [wins(x[part] @ to_wrong, verdict[part] == RIGHT) for part in parts]
        aucs.append(round(sum(won for won, _ in counted) / sum(pairs for _, pairs in counted), 4))
    return tuple(aucs)


@dataclass(frozen=True)
class _Moments:
    count: int
    sum: Matrix  # [D]
    squares: Matrix  # [D, D]

    @staticmethod
    def of(x: Matrix) -> _Moments:
        return _Moments(len(x), x.sum(axis=0), x.T @ x)

    def without(self, other: _Moments) -> _Moments:
        return _Moments(
            self.count - other.count, self.sum - other.sum, self.squares - other.squares
        )

    @property
    def scatter(self) -> Matrix:
        return self.squares - np.outer(self.sum, self.sum) / self.count


def _discriminant(right: _Moments, wrong: _Moments) -> Matrix:
    """The direction [D] that separates the classes best."""
    count, size = right.count + wrong.count, len(right.sum)
    within = (right.scatter + wrong.scatter) / (count - 2)
    shrink = size / (count + size)
    # x is near 1 in size: 1e-12 only keeps equal latents solvable
    level = max(float(np.trace(within)) / size, 1e-12)
    difference: Matrix = right.sum / right.count - wrong.sum / wrong.count
    shrunk = (1 - shrink) * within + (shrink * level + 1e-12) * np.eye(size)
    return np.asarray(np.linalg.solve(shrunk, difference), dtype=np.float64)


def _among_siblings(
    x: Matrix, verdict: NDArray[np.int_], group: NDArray[np.int_]
) -> tuple[Matrix, NDArray[np.bool_]]:
    """x without the mean of each group's graded responses, and whether a response's group has right
    and wrong ones.
    """
    graded = verdict != ERROR
    count = int(group.max()) + 1
    sums = np.zeros((count, x.shape[1]))
    np.add.at(sums, group[graded], x[graded])
    sizes = np.bincount(group[graded], minlength=count)
    right = np.bincount(group[verdict == RIGHT], minlength=count)
    both = (right > 0) & (right < sizes)
    return x - (sums / np.maximum(1, sizes)[:, None])[group], both[group]


def centroid_drift(
    x: Matrix, step: NDArray[np.int_], group: NDArray[np.int_]
) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """How far each step's centroid is from that of the first steps, in units of the spread of the
    first steps' responses.

    The second is what chance alone would give: centroids of as many questions as the step and the
    first steps have, drawn from one distribution, differ by sqrt(v (1 / g_step + 1 / g_first)), v
    the variance of the first steps' group means. None without a spread.

    x: [N, D]; step, group: [N] numbered from 0. Returns two values per step, each [steps].
    """
    count = int(step.max()) + 1
    early = step < max(1, min(10, round(FIRST_STEPS * count)))
    start = x[early].mean(axis=0)
    spread = math.sqrt(np.square(x[early] - start).sum(axis=1).mean())
    if spread == 0:
        return (None,) * count, (None,) * count
    means = np.array([x[early & (group == g)].mean(axis=0) for g in np.unique(group[early])])
    between = np.square(means - start).sum() / (len(means) - 1) if len(means) > 1 else None
    drift, chance = [], []
    for at in range(count):
        here = step == at
        drift.append(round(float(np.linalg.norm(x[here].mean(axis=0) - start)) / spread, 4))
        groups = len(np.unique(group[here]))
        chance.append(
            None
            if between is None
            else round(math.sqrt(between * (1 / groups + 1 / len(means))) / spread, 4)
        )
    return tuple(drift), tuple(chance)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread."""
    return (
        list(items)
        if len(items) <= count
        else [items[at] for at in np.linspace(0, len(items) - 1, count).round().astype(int)]
    )


def _points(rows: Sequence[Row], plane: Matrix, step: NDArray[np.int_]) -> LatentPoints:
    """Columns of at most MAX_POINTS responses, as many from each step; those that the rollout
    browser has first.
    """
    by_step = [np.flatnonzero(step == at).tolist() for at in range(int(step.max()) + 1)]
    share = max(1, MAX_POINTS // len(by_step))
    chosen: list[int] = []
    for members in evenly(by_step, MAX_POINTS):
        here = [at for at in members if rows[at].on_page]
        elsewhere = [at for at in members if not rows[at].on_page]
        chosen += sorted(evenly(here, share) + evenly(elsewhere, share - min(share, len(here))))
    size = float(np.abs(plane).max()) or 1.0
    questions = list(dict.fromkeys(rows[at].question for at in chosen))
    places = {question: at for at, question in enumerate(questions)}
    return {
        "x": [round(float(plane[at, 0]) / size, 4) for at in chosen],
        "y": [round(float(plane[at, 1]) / size, 4) for at in chosen],
        "step": [rows[at].step for at in chosen],
        "verdict": [rows[at].verdict for at in chosen],
        "group": [rows[at].group if rows[at].on_page else None for at in chosen],
        "response": [rows[at].response for at in chosen],
        "reward": [short(rows[at].reward) for at in chosen],
        "prediction": [rows[at].prediction for at in chosen],
        "question": [places[rows[at].question] for at in chosen],
        "questions": questions,
    }
