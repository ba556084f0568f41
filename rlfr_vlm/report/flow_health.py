"""What the flow field did for a run, in words that follow from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from rlfr_vlm.report.run_files import Metrics

LAST_STEPS = 20  # what a verdict looks at
LEAST_STEPS = 5  # with a value among them; fewer give no verdict
ABSURD = 1e100  # of a damaged file; sums of such values overflow
ENDS = 0.1  # share of the steps at each end that a trend compares


@dataclass(frozen=True)
class Verdict:
    """One line about the flow."""

    level: Literal["good", "bad", "plain", "none"]  # none: the data do not say
    text: str


@dataclass(frozen=True)
class FlowHealth:
    """Lines for the top of the view, and a sentence for each chart, by metric."""

    verdicts: tuple[Verdict, ...]
    readings: dict[str, str]
    missing: str  # why there is nothing to see; empty where there is something

    def for_page(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def flow_health(metrics: Metrics, config: dict[str, Any]) -> FlowHealth:
    """Read the `flow/` metrics. `config`: the resolved one, empty where there is none."""
    series = {name: values for name, values in (metrics.series or {}).items() if name.startswith("flow/") and _present(values)}
    if not series:
        return FlowHealth((), {}, _why_nothing(metrics, config))
    verdicts = [_separation(series), _weight(series), _field(series)]
    return FlowHealth(tuple(verdict for verdict in verdicts if verdict), _readings(series), "")


def _why_nothing(metrics: Metrics, config: dict[str, Any]) -> str:
    if not metrics.steps:
        return "No metrics yet: metrics.jsonl is missing or empty."
    if config and not config.get("flow"):
        return "This run has no flow section: it was trained without flow rewards."
    return "No flow figures: the run's metrics.jsonl names none."


def _present(values: tuple[float | None, ...]) -> list[float]:
    return [value for value in values if value is not None and abs(value) < ABSURD]


def _separation(series: dict[str, tuple[float | None, ...]]) -> Verdict:
    """Do wrong answers stray further from the field than right ones?"""
    if "flow/auc" not in series and "flow/auc_in_group" not in series:
        return Verdict("none", "No verdict on right and wrong: flow/auc was not logged (a run of an earlier version).")
    pairs, siblings = (against_chance(series.get(name, ())[-LAST_STEPS:]) for name in ("flow/auc", "flow/auc_in_group"))
    known = pairs or siblings
    if known is None:
        return Verdict(
            "none", f"No verdict on right and wrong yet: of the last {LAST_STEPS} steps, {LEAST_STEPS} need a value of flow/auc."
        )
    over = in_words(pairs, siblings, f"over the last {_steps(known.count)}")
    all_pairs, in_groups = (found.sign if found else 0 for found in (pairs, siblings))
    if siblings and all_pairs > 0 >= in_groups:
        return Verdict(
            "plain",
            f"Wrong answers stray further, but not clearly among siblings: {over}. The field may tell hard questions from easy ones.",
        )
    if siblings and in_groups > 0 >= all_pairs:
        return Verdict("good", f"Among siblings, wrong answers stray further: {over}.")
    if all_pairs > 0:
        return Verdict("good", f"Wrong answers stray further: {over}.")
    if all_pairs < 0 or in_groups < 0:
        return Verdict("bad", f"Right answers stray further than wrong ones: {over}. The flow reward works against the outcome.")
    return Verdict("plain", f"The field tells right from wrong no better than chance: {over}.")


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


def _weight(series: dict[str, tuple[float | None, ...]]) -> Verdict | None:
    """How much of the training signal is the flow's?"""
    share, alone = (_last(series.get(name, ())) for name in ("flow/advantage_share", "flow/only_groups_frac"))
    if len(share) < LEAST_STEPS:
        return None
    text = f"{_percent(fmean(share))} of the size of the advantages comes from the flow"
    if len(alone) >= LEAST_STEPS:
        text += f"; in {_percent(fmean(alone))} of the groups it alone moves the policy"
    return Verdict("plain", f"{text} (last {_steps(len(share))}).")


def _field(series: dict[str, tuple[float | None, ...]]) -> Verdict | None:
    """Does the field follow what it learns from?"""
    ends = _ends(series.get("flow/loss", ()))
    if ends is None:
        return None
    first, last = ends
    went = "fell" if last < 0.95 * first else "rose" if last > 1.05 * first else "stayed"
    text = f"The field's loss {went} {'near' if went == 'stayed' else f'from {first:.3g} to'} {last:.3g}"
    drift = _present(series.get("flow/drift", ()))
    if drift:
        text += f", and its weights moved {_percent(drift[-1])} from where the run began"
    return Verdict("bad" if last > 1.5 * first else "plain", f"{text}.")


def _readings(series: dict[str, tuple[float | None, ...]]) -> dict[str, str]:
    """One sentence per chart: how to read it, with this run's figures where there are enough."""
    meanings = {
        "flow/loss": ("Error of the velocities on right responses", "lower is a closer fit", "{:.3g}"),
        "flow/auc": ("How often a wrong response strays further than a right one", "0.5: no better than chance", "{:.2f}"),
        "flow/advantage_share": ("Share of the advantages' size that is the flow's", "0: the outcome alone", "{:.1%}"),
        "flow/only_groups_frac": ("Groups without a signal from outcomes", "only the flow moves the policy there", "{:.1%}"),
        "flow/drift": ("How far the field's weights are from the start", "relative to their size", "{:.2%}"),
        "flow/deviation_spread": ("Spread of deviations within a response", "near 0: every token deviates alike", "{:.2f}"),
        "flow/grad_norm": ("Size of the field's gradient, before clipping", "0: no right response to learn from", "{:.3g}"),
        "flow/selected_frac": ("Responses that the field learns from", "0: the field stands still", "{:.1%}"),
        "flow/deviation_mean": ("How far tokens stray from the field", "in the field's own units", "{:.3g}"),
        "flow/reward_mean": ("What a response is given or charged by the flow", "summed over its tokens", "{:.3g}"),
    }
    readings = {}
    for name, (meaning, scale, form) in meanings.items():
        if name not in series:
            continue
        ends = _ends(series[name])
        figures = "" if ends is None else f" This run: {form.format(ends[0])} → {form.format(ends[1])}."
        readings[name] = f"{meaning}; {scale}.{figures}".replace("%", " %")
    return readings


def _last(values: tuple[float | None, ...]) -> list[float]:
    """Values of the last steps; a step without the metric (no wrong answer, say) is passed over."""
    return _present(values[-LAST_STEPS:])


def _ends(values: tuple[float | None, ...]) -> tuple[float, float] | None:
    """Mean over the first and over the last tenth of the values (at least two each); None where they would overlap."""
    present = _present(values)
    size = max(2, round(ENDS * len(present)))
    return (fmean(present[:size]), fmean(present[-size:])) if len(present) >= 2 * size else None


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
