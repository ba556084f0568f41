"""What the flow field did for a run, in words that follow from its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal, TypedDict

from rlfr_vlm.flow.reference import unfit_loss
from rlfr_vlm.report.reading import as_number
from rlfr_vlm.report.run_files import Metrics
from rlfr_vlm.report.yardstick import FIELD, KNOWS_NOTHING, Yardstick, YardstickData
from rlfr_vlm.shares import percent

LAST_STEPS = 20  # what a verdict looks at
LEAST_STEPS = 5  # with a value among them; fewer give no verdict
ABSURD = 1e100  # of a damaged file; sums of such values overflow
ENDS = 0.1  # share of the steps at each end that a trend compares


@dataclass(frozen=True)
class Remark:
    """One line about the flow."""

    level: Literal["good", "bad", "plain", "none"]  # none: the data do not say
    text: str


class FlowHealthData(TypedDict):
    """The flow's lines, as the page reads them."""

    verdicts: list[Remark]
    readings: dict[str, str]
    missing: str
    reference: float | None
    yardstick: YardstickData | None


@dataclass(frozen=True)
class FlowHealth:
    """Lines for the top of the view, and a sentence for each chart, by metric."""

    verdicts: tuple[Remark, ...]
    readings: dict[str, str]
    missing: str  # why there is nothing to see; empty where there is something
    reference: float | None = None  # loss of a field that knows nothing
    yardstick: Yardstick | None = None  # of its fit

    def for_page(self) -> FlowHealthData:
        """As JSON."""
        return {
            "verdicts": list(self.verdicts),
            "readings": self.readings,
            "missing": self.missing,
            "reference": self.reference,
            "yardstick": self.yardstick.for_page() if self.yardstick else None,
        }


def flow_health(
    metrics: Metrics, config: dict[str, Any], yardstick: Yardstick | None = None
) -> FlowHealth:
    """Read the `flow/` metrics. `config`: the resolved one, empty where there is none; `yardstick`:
    what the fit found.
    """
    series = {
        name: values
        for name, values in (metrics.series or {}).items()
        if name.startswith("flow/") and _present(values)
    }
    reference, fitted = _reference(config), _fitted(yardstick)
    if not series:
        return FlowHealth(
            (fitted,) if fitted else (), {}, _why_nothing(metrics, config), None, yardstick
        )
    verdicts = [
        _separation(series),
        _charged(series),
        _weight(series),
        _place(series),
        _field(series, reference),
        fitted,
    ]
    return FlowHealth(
        tuple(verdict for verdict in verdicts if verdict),
        _readings(series, reference),
        "",
        reference,
        yardstick,
    )


def _reference(config: dict[str, Any]) -> float | None:
    """Loss of v = x_t / t at the times that the field learns at; None where the config does not
    name them.
    """
    flow = config.get("flow")
    times = flow.get("times") if isinstance(flow, dict) else None
    online = flow.get("online") if isinstance(flow, dict) else None
    drawn = online.get("times") if isinstance(online, dict) else "reward"
    known = [
        time
        for time in map(as_number, times if isinstance(times, list) else ())
        if time is not None and 1e-6 < time < 1
    ]
    if drawn not in ("reward", "logit_normal", None) or not known or len(known) < len(times or ()):
        return None
    return unfit_loss(known, drawn or "reward")


def _why_nothing(metrics: Metrics, config: dict[str, Any]) -> str:
    if not metrics.steps:
        return "No metrics yet: metrics.jsonl is missing or empty."
    if config and not config.get("flow"):
        return "This run has no flow section: it was trained without flow rewards."
    return "No flow figures: the run's metrics.jsonl names none."


def _present(values: tuple[float | None, ...]) -> list[float]:
    return [value for value in values if value is not None and abs(value) < ABSURD]


def _separation(series: dict[str, tuple[float | None, ...]]) -> Remark:
    """Do wrong answers stray further from the field than right ones?"""
    if "flow/auc" not in series and "flow/auc_in_group" not in series:
        return Remark(
            "none",
            "No verdict on right and wrong: flow/auc was not logged (a run of an earlier version).",
        )
    pairs, siblings = (
        against_chance(series.get(name, ())[-LAST_STEPS:])
        for name in ("flow/auc", "flow/auc_in_group")
    )
    known = pairs or siblings
    if known is None:
        return Remark(
            "none",
            f"No verdict on right and wrong yet: of the last {LAST_STEPS} steps, {LEAST_STEPS} "
            "need a value of flow/auc.",
        )
    over = in_words(pairs, siblings, f"over the last {_steps(known.count)}")
    all_pairs, in_groups = (found.sign if found else 0 for found in (pairs, siblings))
    if siblings and all_pairs > 0 >= in_groups:
        return Remark(
            "plain",
            f"Wrong answers stray further, but not clearly among siblings: {over}. The field may "
            "tell hard questions from easy ones.",
        )
    if siblings and in_groups > 0 >= all_pairs:
        return Remark("good", f"Among siblings, wrong answers stray further: {over}.")
    if all_pairs > 0:
        return Remark("good", f"Wrong answers stray further: {over}.")
    if all_pairs < 0 or in_groups < 0:
        return Remark(
            "bad",
            f"Right answers stray further than wrong ones: {over}. The flow reward works against "
            "the outcome.",
        )
    return Remark("plain", f"The field tells right from wrong no better than chance: {over}.")


@dataclass(frozen=True)
class MeanAuc:
    """AUCs of steps against one half."""

    mean: float
    margin: float  # two standard errors over the steps
    count: int

    @property
    def sign(self) -> int:
        """1: better than chance; -1: the wrong way round; 0: neither can be said."""
        return (self.mean - self.margin > 0.5) - (self.mean + self.margin < 0.5)

    def __str__(self) -> str:
        return f"AUC {self.mean:.2f} ± {self.margin:.2f}"


def against_chance(aucs: Sequence[float | None]) -> MeanAuc | None:
    """Mean over the steps that have a value; None where they are fewer than LEAST_STEPS."""
    known = [auc for auc in aucs if auc is not None and 0 <= auc <= 1]
    if len(known) < LEAST_STEPS:
        return None
    return MeanAuc(fmean(known), 2 * stdev(known) / math.sqrt(len(known)), len(known))


def in_words(pairs: MeanAuc | None, siblings: MeanAuc | None, where: str) -> str:
    """Both, as far as they are known."""
    if pairs is None:
        return f"{siblings} {where}, among siblings"
    return f"{pairs} {where}{f', {siblings} among siblings' if siblings else ''}"


def _charged(series: dict[str, tuple[float | None, ...]]) -> Remark | None:
    """Is what is charged the wrong responses, as the deviations are? The two side by side, among
    siblings where they are known there.
    """
    for suffix, where in (("_in_group", "Among siblings"), ("", "Over all pairs")):
        straying, charged = (
            against_chance(series.get(f"flow/{name}{suffix}", ())[-LAST_STEPS:])
            for name in ("auc", "charged_auc")
        )
        if charged is None:
            continue
        beside = f"{straying} of the deviation, " if straying else ""
        text = f"{where}: {beside}{charged} of what is charged"
        if charged.sign < 0:
            lost = (
                " What makes rewards of deviations turns them round."
                if straying and straying.sign > 0
                else ""
            )
            return Remark("bad", f"{text}: right answers are charged more than wrong ones.{lost}")
        if charged.sign > 0:
            return Remark("good", f"{text}: wrong answers are charged more.")
        lost = (
            ": what the deviations know is lost on the way"
            if straying and straying.sign > 0
            else ""
        )
        return Remark("plain", f"{text}, which is no better than chance{lost}.")
    return None


def _place(series: dict[str, tuple[float | None, ...]]) -> Remark | None:
    """Where the charge falls, and how much of it needs no latents to be told."""
    place, token, at = (
        _last(series.get(name, ()))
        for name in ("flow/charge_place", "flow/charge_by_token", "flow/charge_by_place")
    )
    parts = []
    if len(place) >= LEAST_STEPS:
        parts.append(
            f"falls at {fmean(place):.2f} of a response on average (0: its start, 1: its end)"
        )
    shares = [
        f"{percent(fmean(values))} by {name}"
        for values, name in ((token, "the token's identity"), (at, "its place"))
        if len(values) >= LEAST_STEPS
    ]
    if shares:
        parts.append(f"is explained to {' and to '.join(shares)}, which need no field")
    if not parts:
        return None
    most = max((fmean(values) for values in (token, at) if len(values) >= LEAST_STEPS), default=0.0)
    hint = (
        " Most of it says which tokens there are, or where, not what the policy thought."
        if most > 0.5
        else ""
    )
    return Remark("plain", f"The charge {'; it '.join(parts)}.{hint}")


def _weight(series: dict[str, tuple[float | None, ...]]) -> Remark | None:
    """How much of the training signal is the flow's?"""
    share, alone = (
        _last(series.get(name, ())) for name in ("flow/advantage_share", "flow/only_groups_frac")
    )
    if len(share) < LEAST_STEPS:
        return None
    text = f"{percent(fmean(share))} of the size of the advantages comes from the flow"
    if len(alone) >= LEAST_STEPS:
        text += f"; in {percent(fmean(alone))} of the groups it alone moves the policy"
    return Remark("plain", f"{text} (last {_steps(len(share))}).")


def _field(series: dict[str, tuple[float | None, ...]], reference: float | None) -> Remark | None:
    """Does the field follow what it learns from, and does it know anything?"""
    ends = _ends(series.get("flow/loss", ()))
    if ends is None:
        return None
    first, last = ends
    went = "fell" if last < 0.95 * first else "rose" if last > 1.05 * first else "stayed"
    text = (
        f"The field's loss {went} {'near' if went == 'stayed' else f'from {first:.3g} to'} "
        f"{last:.3g}"
    )
    drift = _present(series.get("flow/drift", ()))
    if drift:
        text += f", and its weights moved {percent(drift[-1])} from where the run began"
    unfit = reference is not None and last > reference
    if reference is not None:
        text += f"; v = x_t / t, which knows nothing, has {reference:.3g}"
        text += (
            ": the field is worse, and its deviations are noise. It needs a longer fit"
            if unfit
            else ""
        )
    return Remark("bad" if unfit or last > 1.5 * first else "plain", f"{text}.")


def _fitted(yardstick: Yardstick | None) -> Remark | None:
    """What the fit came to, before training."""
    known = yardstick.overall() if yardstick else {}
    others = {name: value for name, value in known.items() if name != FIELD}
    if FIELD not in known or KNOWS_NOTHING not in others:
        return None
    best = min(others, key=lambda name: others[name])
    text = (
        f"The fit's held-out deviation at the reward's times is {known[FIELD]:.3g}; "
        f"{KNOWS_NOTHING} has {others[KNOWS_NOTHING]:.3g}"
    )
    if best != KNOWS_NOTHING:
        text += f", the best that needs no field ({best}) {others[best]:.3g}"
    level: Literal["good", "bad", "plain"] = "good" if known[FIELD] < others[best] else "plain"
    return Remark("bad" if known[FIELD] > others[KNOWS_NOTHING] else level, f"{text}.")


def _readings(
    series: dict[str, tuple[float | None, ...]], reference: float | None
) -> dict[str, str]:
    """One sentence per chart: how to read it, with this run's figures where there are enough."""
    nothing = (
        ""
        if reference is None
        else f"; above {reference:.3g}, the dotted line, it knows less than v = x_t / t"
    )
    meanings: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "flow/loss": (
            "Error of the velocities on right responses",
            f"lower is a closer fit{nothing}",
            "{:.3g}".format,
        ),
        "flow/contrast_loss": (
            "Error of the contrast's velocities",
            "lower is a closer fit",
            "{:.3g}".format,
        ),
        "flow/charged_auc": (
            "How often a wrong response is charged more than a right one",
            "0.5: no better than chance",
            "{:.2f}".format,
        ),
        "flow/charged_auc_in_group": (
            "How often a wrong response is charged more than a right sibling",
            "0.5: chance",
            "{:.2f}".format,
        ),
        "flow/charge_place": (
            "Where in a response its flow rewards stand, by their size",
            "0: at its start, 1: at its end",
            "{:.2f}".format,
        ),
        "flow/charge_by_token": (
            "Share of the token rewards' variance between token ids",
            "100 %: a table of tokens would do",
            percent,
        ),
        "flow/charge_by_place": (
            "Share of the token rewards' variance between places",
            "100 %: they only count tokens",
            percent,
        ),
        "flow/auc": (
            "How often a wrong response strays further than a right one",
            "0.5: no better than chance",
            "{:.2f}".format,
        ),
        "flow/advantage_share": (
            "Share of the advantages' size that is the flow's",
            "0: the outcome alone",
            percent,
        ),
        "flow/only_groups_frac": (
            "Groups without a signal from outcomes",
            "only the flow moves the policy there",
            percent,
        ),
        "flow/drift": (
            "How far the field's weights are from the start",
            "relative to their size",
            partial(percent, digits=2),
        ),
        "flow/deviation_spread": (
            "Spread of deviations within a response",
            "near 0: every token deviates alike",
            "{:.2f}".format,
        ),
        "flow/grad_norm": (
            "Size of the field's gradient, before clipping",
            "0: no right response to learn from",
            "{:.3g}".format,
        ),
        "flow/selected_frac": (
            "Responses that the field learns from",
            "0: the field stands still",
            percent,
        ),
        "flow/deviation_mean": (
            "How far tokens stray from the field",
            "in the field's own units",
            "{:.3g}".format,
        ),
        "flow/reward_mean": (
            "What a response is given or charged by the flow",
            "summed over its tokens",
            "{:.3g}".format,
        ),
    }
    readings = {}
    for name, (meaning, scale, form) in meanings.items():
        if name not in series:
            continue
        ends = _ends(series[name])
        figures = "" if ends is None else f" This run: {form(ends[0])} → {form(ends[1])}."
        readings[name] = f"{meaning}; {scale}.{figures}"
    return readings


def _last(values: tuple[float | None, ...]) -> list[float]:
    """Values of the last steps; a step without the metric (no wrong answer, say) is passed over."""
    return _present(values[-LAST_STEPS:])


def _ends(values: tuple[float | None, ...]) -> tuple[float, float] | None:
    """Mean over the first and over the last tenth of the values (at least two each); None where
    they would overlap.
    """
    present = _present(values)
    size = max(2, round(ENDS * len(present)))
    return (fmean(present[:size]), fmean(present[-size:])) if len(present) >= 2 * size else None


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
