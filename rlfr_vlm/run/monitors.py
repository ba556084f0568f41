"""Watching a run: what looks wrong, since when, why, and what to do. Each monitor is a function of
the steps' figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.flow.reference import unfit_loss
from rlfr_vlm.run.mismatch import SURPRISE_NATS, likely_cause, not_from_policy, tolerance
from rlfr_vlm.shares import points

Figures = Mapping[str, float]  # of a step; `step` among them

WINDOW = 5  # steps that are averaged where single ones are noisy
CLIFF = 2.0  # responses so many times longer or shorter than before
PAID_LENGTH = 0.5  # correlation of reward and length, verdict and format being equal
FALL = 0.5  # of the best accuracy
LEAST_ACCURACY = 0.1  # below this best there is nothing to fall from
LEAST_GROUPS = 20  # that a share of groups is taken of
HOT = 2.0  # times the entropy that the run began with
LAST_STEPS = 20  # that an AUC is judged over
TAMED = 0.1  # share by which deviations fall where the policy has learnt to be easy to predict
LEVEL_LOST = ("minmax", "bilateral", "mean")  # flow.reward.normalise, within a response


@dataclass(frozen=True)
class Sign:
    """Something that looks wrong in the last step."""

    value: float
    limit: float
    what: str
    cause: str
    do: str


@dataclass(frozen=True)
class Event:
    """What a monitor says; a line of events.jsonl."""

    step: int
    since: int  # first step that looked wrong
    monitor: str
    action: str
    value: float
    limit: float
    what: str
    cause: str
    do: str
    to: int | None = None  # step that a roll-back went back to

    @property
    def line(self) -> str:
        """For the terminal."""
        since = f", since step {self.since}" if self.since < self.step else ""
        cause = f". Likely cause: {self.cause}" if self.cause else ""
        return f"step {self.step}{since}: {self.monitor}: {self.what}{cause}. {self.do}"


# config, steps so far, commonest refrain
Check = Callable[[Config, Sequence[Figures], str], Sign | None]


def check_non_finite(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A figure that is no number."""
    bad = [name for name, value in rows[-1].items() if not math.isfinite(value)]
    if not bad:
        return None
    do = "Lower optim.lr and flow.online.lr; look at the responses of this step"
    return Sign(
        math.nan,
        0.0,
        f"{', '.join(bad[:3])} {'is' if len(bad) == 1 else 'are'} no finite number",
        "",
        do,
    )


def check_update(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Weights that change by more than a few percent in a step."""
    value, limit = rows[-1].get("actor/update_ratio", 0.0), update_limit(cfg)
    if value <= limit:
        return None
    now = rows[-1].get("actor/lr", cfg.optim.lr)
    what = (
        f"the step changed the weights by {points(value)}% of their size, more than "
        f"{points(limit)}%"
    )
    cause = f"the learning rate, optim.lr={cfg.optim.lr:g} (now {now:.2g})"
    return Sign(
        value,
        limit,
        what,
        cause,
        f"Try optim.lr={now * limit / value / 10:.0e}, in another output_dir",
    )


def check_accuracy(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Accuracy that falls to half of its best."""
    values = _column(rows, "reward/accuracy")
    if len(values) < 2 * WINDOW:
        return None
    best = max(fmean(values[at : at + WINDOW]) for at in range(len(values) - WINDOW))
    now = fmean(values[-3:])
    if best < LEAST_ACCURACY or now >= FALL * best or not _beyond_noise(values, best - now):
        return None
    what = f"accuracy fell to {points(now)}%, from {points(best)}% at its best"
    return Sign(
        now,
        FALL * best,
        what,
        _cause_of_fall(cfg, rows),
        "Go back to an older checkpoint; read the responses since then",
    )


def _cause_of_fall(cfg: Config, rows: Sequence[Figures]) -> str:
    now = rows[-1]
    if rate := _broken_by_rate(cfg, rows):
        return rate
    if now.get("flow/advantage_share", 0.0) > cfg.monitors.max_flow_share / 2:
        return "flow rewards outweigh the answers"
    if now.get("response/repetition", 0.0) > cfg.monitors.max_repetition / 2:
        return "responses repeat themselves"
    if now["response_length/clip_ratio"] > 0.5:
        return "responses are cut off before their answer"
    return ""


def _broken_by_rate(cfg: Config, rows: Sequence[Figures]) -> str:
    """The learning rate, where it moved the weights too far in one of the steps before: whatever
    else looks wrong comes from that.
    """
    moved = max(_column(rows[-3 * WINDOW :], "actor/update_ratio"), default=0.0)
    return (
        f"the learning rate, optim.lr={cfg.optim.lr:g}: it broke the policy"
        if moved > update_limit(cfg)
        else ""
    )


def update_limit(cfg: Config) -> float:
    """Of a step's change of the trained weights over their size; adapters start from nearly nothing
    and may move ten times as far.
    """
    return cfg.monitors.max_update * (10 if cfg.model.lora is not None else 1)


def _beyond_noise(values: Sequence[float], change: float) -> bool:
    """Whether a change of the mean of three steps is more than four standard errors; the noise of a
    step is taken from its successor.
    """
    noise = fmean((b - a) ** 2 for a, b in pairwise(values)) / 2
    return abs(change) > 4 * math.sqrt(noise / 3)


def check_entropy(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A policy that no longer explores, or one that has become noise."""
    values = _column(rows, "actor/entropy")
    if not values:
        return None
    now, floor = values[-1], cfg.monitors.entropy_floor
    if now < floor:
        what = f"entropy is {now:.3g} nats per token, below {floor:g}: the policy explores no more"
        return Sign(
            now,
            floor,
            what,
            "",
            "Raise algorithm.clip_high, add shaping.entropy or kl, or lower optim.lr",
        )
    begin = median(values[:WINDOW])
    if len(values) > WINDOW and now > HOT * begin and now > begin + 1.0:
        what = (
            f"entropy rose to {now:.3g} nats per token from {begin:.3g}: the policy dissolves "
            "into noise"
        )
        cause = _cause_of_fall(cfg, rows)
        return Sign(now, HOT * begin, what, cause, "Lower optim.lr; go back to an older checkpoint")
    return None


def check_length(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A reward that pays for length, or responses that get much longer or shorter without getting
    better.
    """
    paid = rows[-1].get("reward/length_corr", 0.0)
    if paid > PAID_LENGTH:
        what = (
            f"the reward rises with length (correlation {paid:.2f}) among siblings whose "
            "verdict and format are the same"
        )
        cause = (
            f"the reward pays for length: {cfg.reward.function}"
            if cfg.reward.function
            else "the reward pays for length"
        )
        return Sign(
            paid,
            PAID_LENGTH,
            what,
            cause,
            "Take length out of the reward, or charge for it (reward.overlong_buffer)",
        )
    lengths, accuracy = _column(rows, "response_length/mean"), _column(rows, "reward/accuracy")
    if len(lengths) < 2 * WINDOW:
        return None
    before, now = median(lengths[-4 * WINDOW : -WINDOW]), fmean(lengths[-3:])
    better = fmean(accuracy[-3:]) - median(accuracy[-4 * WINDOW : -WINDOW])
    if (
        1 / CLIFF < now / max(before, 1e-9) < CLIFF
        or better > 0.02
        or not _beyond_noise(lengths[-4 * WINDOW :], now - before)
    ):
        return None
    longer = now > before
    what = f"responses went from {before:.0f} to {now:.0f} tokens while accuracy did not rise"
    do = (
        "Read them; set reward.overlong_buffer"
        if longer
        else "Use algorithm.loss_aggregation=token or method=dr_grpo; read them"
    )
    per_response = cfg.algorithm.loss_aggregation == "sequence" and not longer
    cause = _broken_by_rate(cfg, rows) or (
        "per-response means of the loss favour short answers" if per_response else ""
    )
    return Sign(now, before * CLIFF if longer else before / CLIFF, what, cause, do)


def check_truncation(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Responses that are cut off before they can answer."""
    value, limit = rows[-1].get("response_length/clip_ratio", 0.0), cfg.monitors.max_truncated
    if value <= limit or cfg.rollout.ignore_eos:
        return None
    budget = cfg.rollout.max_new_tokens
    grown = rows[0].get("response_length/clip_ratio", 0.0) < limit / 2
    cause = (
        _broken_by_rate(cfg, rows) or "the policy has unlearnt to stop"
        if grown
        else f"the budget, rollout.max_new_tokens={budget}, is too small"
    )
    do = (
        "Set reward.overlong_buffer, or lower optim.lr"
        if grown
        else f"Try rollout.max_new_tokens={2 * budget}"
    )
    return Sign(
        value,
        limit,
        f"{points(value, 0)}% of the responses are cut off at {budget} tokens",
        cause,
        do,
    )


def check_repetition(cfg: Config, rows: Sequence[Figures], refrain: str) -> Sign | None:
    """Responses that go round in circles."""
    value, limit = rows[-1].get("response/repetition", 0.0), cfg.monitors.max_repetition
    if value <= limit:
        return None
    most = f", most of all {refrain!r}" if refrain else ""
    grown = rows[0].get("response/repetition", 0.0) < limit / 2
    cause = (
        _broken_by_rate(cfg, rows) or "training broke the policy"
        if grown
        else "the model itself repeats tokens, from the first step on"
    )
    do = (
        "Go back to an older checkpoint and lower optim.lr"
        if grown
        else "Look at model.path, its chat template and its stop tokens"
    )
    return Sign(
        value, limit, f"{points(value, 0)}% of the 4-grams of responses repeat{most}", cause, do
    )


def check_format(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Format that is learnt in place of answers."""
    form, accuracy = _column(rows, "reward/format"), _column(rows, "reward/accuracy")
    if len(form) < 4 * WINDOW:
        return None
    was, now = (slice(-4 * WINDOW, -3 * WINDOW), slice(-WINDOW, None))
    rise, better = fmean(form[now]) - fmean(form[was]), fmean(accuracy[now]) - fmean(accuracy[was])
    if rise < 0.1 or better > 0.01 or not _beyond_noise(form[-4 * WINDOW :], rise):
        return None
    what = (
        f"in {3 * WINDOW} steps the format rose by {points(rise, 0)}% while accuracy went "
        f"{points(better, 1, '+')}%"
    )
    return Sign(
        rise,
        0.1,
        what,
        f"reward.format_weight={cfg.reward.format_weight:g} is earned without solving anything",
        "Lower it",
    )


def check_zero_variance(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Groups that teach nothing, since all siblings earn the same."""
    steps = math.ceil(LEAST_GROUPS / cfg.rollout.num_prompts)
    shares, limit = _column(rows, "reward/frac_zero_std"), cfg.monitors.max_zero_variance
    if (
        len(shares) < steps
        or cfg.algorithm.advantage in ("whitened", "gae")
        or (value := fmean(shares[-steps:])) <= limit
    ):
        return None
    easy = rows[-1]["reward/accuracy"] > 0.5
    what = (
        f"in {points(value, 0)}% of the groups all siblings earn the same: they give no advantage"
    )
    hard = (
        _broken_by_rate(cfg, rows)
        or "the problems are too hard for this policy, or no answer is recognised"
    )
    cause = "the problems are too easy for this policy" if easy else hard
    do = "Use harder data" if easy else "Use easier data; read responses; check reward.answer"
    anew = "rollout.max_rounds=3 samples such groups anew; " if cfg.rollout.max_rounds == 1 else ""
    return Sign(value, limit, what, cause, f"{do}; {anew}a larger rollout.group_size helps")


def check_mismatch(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Tokens that were not drawn from the policy which is trained. Not judged where rollouts are
    older than the weights by design, nor by their surprisal where groups are selected by their
    answers.
    """
    now, limit = rows[-1], tolerance(cfg)
    gap = now.get("rollout/logprob_diff_mean")
    if gap is None or cfg.rollout.staleness or cfg.rollout.ignore_eos:
        return None
    if gap > limit:
        what = (
            f"the engine's log-probs are {gap:.3g} nats from the trainer's on average, more "
            f"than {limit:g}"
        )
    elif not_from_policy(now) and cfg.rollout.max_rounds == 1:
        gap, limit = now["rollout/surprisal_gap"], SURPRISE_NATS
        what = (
            f"sampled tokens are {gap:+.3g} nats off the policy's entropy, "
            f"{abs(now['rollout/surprisal_z']):.0f} standard errors"
        )
    else:
        return None
    return Sign(
        gap,
        limit,
        what,
        likely_cause(cfg, rows),
        "Until it is mended, training is off-policy; algorithm.importance_cap=2 corrects some of "
        "it",
    )


def check_flow_share(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Flow rewards that drown the answers."""
    value, limit = rows[-1].get("flow/advantage_share", 0.0), cfg.monitors.max_flow_share
    if value <= limit or cfg.flow is None:
        return None
    coef, flat = cfg.flow.reward.coef, rows[-1].get("reward/frac_zero_std", 0.0)
    what = f"{points(value, 0)}% of the advantages' size comes from the flow"
    if flat > cfg.monitors.max_zero_variance / 1.5:
        cause = (
            f"answers give little: in {points(flat, 0)}% of the groups all siblings earn the same "
            f"(flow.reward.coef={coef:g})"
        )
    else:
        cause = f"the weight of the flow reward, flow.reward.coef={coef:g}"
    return Sign(
        value,
        limit,
        what,
        cause,
        f"Try flow.reward.coef={coef * 0.05 / value:.0e}; published: 0.01",
    )


def check_flow_collapse(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A field that tells tokens apart no longer, or whose loss runs away."""
    now = rows[-1]
    spread, rewarded = (
        now.get("flow/deviation_spread", math.inf),
        now.get("flow/num_reward_tokens", math.inf),
    )
    if spread < 0.01:
        what = (
            f"deviations differ by {points(spread, 2)}% of their mean within a response: flow "
            "rewards are noise"
        )
        return Sign(
            spread,
            0.01,
            what,
            "the field or the policy's latents have collapsed",
            "Lower flow.online.lr; fit the field anew",
        )
    if rewarded == 0 and cfg.flow is not None and cfg.flow.reward.coef > 0:
        cause = f"flow.reward.threshold={cfg.flow.reward.threshold:g} keeps nothing"
        return Sign(0.0, 0.0, "no token has a flow reward", cause, "Lower it")
    selected = _column(rows[-2 * WINDOW :], "flow/selected_frac")
    if (
        len(selected) == 2 * WINDOW
        and not any(selected)
        and cfg.flow is not None
        and cfg.flow.online.soft_weight == 0
    ):
        what = (
            f"the flow field has learnt nothing for {2 * WINDOW} steps: no response is verified as "
            "correct"
        )
        cause = _broken_by_rate(cfg, rows)
        return Sign(
            0.0,
            0.0,
            what,
            cause,
            "flow.online.select=[] follows all of them; a reward function may report its accuracy",
        )
    losses = _column(rows, "flow/loss")
    if len(losses) > WINDOW and losses[-1] > 3 * (begin := median(losses[:WINDOW])):
        what = f"the flow loss rose to {losses[-1]:.3g} from {begin:.3g}"
        cause = (
            "the policy's latents move faster than the field can follow, or flow.online.lr is "
            "too high"
        )
        return Sign(losses[-1], 3 * begin, what, cause, "Lower optim.lr or flow.online.lr")
    return None


def check_flow_inverted(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A charge that falls on right answers although deviations tell them from wrong ones: what
    makes rewards of deviations loses it.
    """
    charged, straying = (
        _mean_and_margin(rows[-LAST_STEPS:], f"flow/{name}_in_group")
        for name in ("charged_auc", "auc")
    )
    if cfg.flow is None or cfg.flow.reward.coef <= 0 or charged is None or straying is None:
        return None
    if charged[0] + charged[1] >= 0.5 or straying[0] - straying[1] <= 0.5:
        return None
    reward, informed = (
        cfg.flow.reward,
        "" if cfg.flow.profile == "informed" else ", or flow.profile=informed",
    )
    what = (
        f"right answers are charged more than their wrong siblings (AUC {charged[0]:.2f}), "
        f"though wrong ones stray further ({straying[0]:.2f})"
    )
    if reward.normalise in LEVEL_LOST:
        cause = (
            f"flow.reward.normalise={reward.normalise} takes each response by itself: one that "
            "strays everywhere is charged no more"
        )
        return Sign(
            charged[0], 0.5, what, cause, f"flow.reward.normalise=group_z keeps the level{informed}"
        )
    cause = (
        f"flow.reward.normalise={reward.normalise} with threshold={reward.threshold:g}, "
        f"top_k={reward.top_k}: what is kept is not what strays"
    )
    return Sign(
        charged[0],
        0.5,
        what,
        cause,
        f"Keep all scores (flow.reward.threshold=0, top_k=0){informed}",
    )


def _mean_and_margin(rows: Sequence[Figures], name: str) -> tuple[float, float] | None:
    """Mean and two standard errors of a figure over the steps that have it; None where they are too
    few.
    """
    values = _column(rows, name)
    return (
        None
        if len(values) < 2 * WINDOW
        else (fmean(values), 2 * stdev(values) / math.sqrt(len(values)))
    )


def check_flow_hacked(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Deviations that fall together with accuracy. Steps in which only the field learns tell
    nothing of the policy.
    """
    if cfg.flow is None or cfg.flow.reward.coef <= 0:
        return None
    taught = rows[cfg.flow.online.warmup_steps :]
    accuracy, straying = _column(taught, "reward/accuracy"), _column(taught, "flow/deviation_mean")
    if min(len(accuracy), len(straying)) < 4 * WINDOW:
        return None
    (right, right_now), (far, far_now) = (
        (fmean(values[:WINDOW]), fmean(values[-3:])) for values in (accuracy, straying)
    )
    if right_now >= right or far_now > (1 - TAMED) * far:
        return None
    if not _beyond_noise(accuracy, right - right_now) or not _beyond_noise(straying, far - far_now):
        return None
    what = (
        f"accuracy fell to {points(right_now)}% from {points(right)}% while deviations fell to "
        f"{far_now:.3g} from {far:.3g}"
    )
    cause = (
        "a policy that is paid for small deviations learns to be easy to predict: short, "
        "common, repeated phrases, right or wrong"
    )
    do = (
        f"Read the responses; lower flow.reward.coef={cfg.flow.reward.coef:g}, or go back to an "
        "older checkpoint"
    )
    return Sign(far_now, (1 - TAMED) * far, what, _broken_by_rate(cfg, rows) or cause, do)


def check_flow_unfit(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A field that is worse than one that knows nothing."""
    losses = _column(rows, "flow/loss")
    if cfg.flow is None or len(losses) <= WINDOW:
        return None
    now, limit = fmean(losses[-WINDOW:]), unfit_loss(cfg.flow.times, cfg.flow.online.times)
    if now <= limit:
        return None
    what = (
        f"the flow loss, {now:.3g}, is above the {limit:.3g} of v = x_t / t, which knows "
        "nothing of any latent: flow rewards are noise"
    )
    cause = (
        "a new field: flow.checkpoint is not set"
        if cfg.flow.checkpoint is None
        else "the field was fitted too little, or on other latents"
    )
    return Sign(
        now,
        limit,
        what,
        cause,
        "Fit a field (rlfr-vlm flow) with more flow.fit.steps, then set flow.checkpoint, or raise "
        "flow.online.lr",
    )


CHECKS: dict[str, Check] = {
    "non_finite": check_non_finite,
    "update": check_update,
    "mismatch": check_mismatch,
    "accuracy": check_accuracy,
    "entropy": check_entropy,
    "length": check_length,
    "truncation": check_truncation,
    "repetition": check_repetition,
    "format": check_format,
    "zero_variance": check_zero_variance,
    "flow_share": check_flow_share,
    "flow_collapse": check_flow_collapse,
    "flow_inverted": check_flow_inverted,
    "flow_hacked": check_flow_hacked,
    "flow_unfit": check_flow_unfit,
}


class Monitors:
    """All of them, with the steps that they have seen."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.rows: list[Figures] = []
        # steps in a row that look wrong, or minus those that do not
        self.streaks: dict[str, int] = dict.fromkeys(CHECKS, 0)
        # it has spoken, and speaks again after as many good steps
        self.quiet: dict[str, bool] = dict.fromkeys(CHECKS, False)

    def replay(self, rows: Sequence[Mapping[str, Any]], said: Collection[str] = ()) -> None:
        """See the steps before a resumed run's first. said: monitors that have warned of them;
        others may have been off, or had other limits.
        """
        for row in rows:
            self.see(
                {
                    name: float(value)
                    for name, value in row.items()
                    if isinstance(value, int | float)
                }
            )
        for name in CHECKS:
            self.quiet[name] &= name in said and getattr(self.cfg.monitors, name) == "warn"

    def see(self, figures: Figures, refrain: str = "") -> list[Event]:
        """What a further step gives rise to. figures: its metrics, `step` among them; refrain: text
        of the commonest repeated 4-gram.
        """
        self.rows.append(figures)
        found = []
        for name, check in CHECKS.items():
            action = getattr(self.cfg.monitors, name)
            sign = None if action == "off" else check(self.cfg, self.rows, refrain)
            patience = 1 if name == "non_finite" else self.cfg.monitors.patience
            if sign is None:
                self.streaks[name] = min(0, self.streaks[name]) - 1
                self.quiet[name] &= -self.streaks[name] < patience
                continue
            self.streaks[name] = max(0, self.streaks[name]) + 1
            if self.streaks[name] >= patience and not self.quiet[name]:
                self.quiet[name] = True
                step = int(figures["step"])
                since = int(self.rows[-self.streaks[name]]["step"])
                found.append(
                    Event(
                        step,
                        since,
                        name,
                        action,
                        sign.value,
                        sign.limit,
                        sign.what,
                        sign.cause,
                        sign.do,
                    )
                )
        return found


def _column(rows: Sequence[Figures], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]
