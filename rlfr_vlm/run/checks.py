"""Monitors of the policy, its answers and its engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from rlfr_vlm.config import Config
from rlfr_vlm.run.mismatch import SURPRISE_NATS, Figures, likely_cause, not_from_policy, tolerance
from rlfr_vlm.run.signs import WINDOW, Sign, beyond_noise, column
from rlfr_vlm.shares import points

CLIFF = 2.0  # responses so many times longer or shorter than before
PAID_LENGTH = 0.5  # correlation of reward and length, verdict and format being equal
FALL = 0.5  # of the best accuracy
LEAST_ACCURACY = 0.1  # below this best there is nothing to fall from
LEAST_GROUPS = 20  # that a share of groups is taken of
HOT = 2.0  # times the entropy that the run began with


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
    values = column(rows, "reward/accuracy")
    if len(values) < 2 * WINDOW:
        return None
    best = max(fmean(values[at : at + WINDOW]) for at in range(len(values) - WINDOW))
    now = fmean(values[-3:])
    if best < LEAST_ACCURACY or now >= FALL * best or not beyond_noise(values, best - now):
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
    moved = max(column(rows[-3 * WINDOW :], "actor/update_ratio"), default=0.0)
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


def check_entropy(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """A policy that no longer explores, or one that has become noise."""
    values = column(rows, "actor/entropy")
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
    lengths, accuracy = column(rows, "response_length/mean"), column(rows, "reward/accuracy")
    if len(lengths) < 2 * WINDOW:
        return None
    before, now = median(lengths[-4 * WINDOW : -WINDOW]), fmean(lengths[-3:])
    better = fmean(accuracy[-3:]) - median(accuracy[-4 * WINDOW : -WINDOW])
    if (
        1 / CLIFF < now / max(before, 1e-9) < CLIFF
        or better > 0.02
        or not beyond_noise(lengths[-4 * WINDOW :], now - before)
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
    form, accuracy = column(rows, "reward/format"), column(rows, "reward/accuracy")
    if len(form) < 4 * WINDOW:
        return None
    was, now = (slice(-4 * WINDOW, -3 * WINDOW), slice(-WINDOW, None))
    rise, better = fmean(form[now]) - fmean(form[was]), fmean(accuracy[now]) - fmean(accuracy[was])
    if rise < 0.1 or better > 0.01 or not beyond_noise(form[-4 * WINDOW :], rise):
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
    shares, limit = column(rows, "reward/frac_zero_std"), cfg.monitors.max_zero_variance
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
