"""Monitors of the flow field and of what it charges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from rlfr_vlm.config import Config
from rlfr_vlm.flow.reference import unfit_loss
from rlfr_vlm.run.checks import _broken_by_rate
from rlfr_vlm.run.mismatch import Figures
from rlfr_vlm.run.signs import WINDOW, Sign, beyond_noise, column, mean_and_margin
from rlfr_vlm.shares import points

LAST_STEPS = 20  # that an AUC is judged over
TAMED = 0.1  # share by which deviations fall where the policy has learnt to be easy to predict
LEVEL_LOST = ("minmax", "bilateral", "mean")  # flow.reward.normalise, within a response


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
    selected = column(rows[-2 * WINDOW :], "flow/selected_frac")
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
    losses = column(rows, "flow/loss")
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
        mean_and_margin(rows[-LAST_STEPS:], f"flow/{name}_in_group")
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


def check_flow_hacked(cfg: Config, rows: Sequence[Figures], _refrain: str) -> Sign | None:
    """Deviations that fall together with accuracy. Steps in which only the field learns tell
    nothing of the policy.
    """
    if cfg.flow is None or cfg.flow.reward.coef <= 0:
        return None
    taught = rows[cfg.flow.online.warmup_steps :]
    accuracy, straying = column(taught, "reward/accuracy"), column(taught, "flow/deviation_mean")
    if min(len(accuracy), len(straying)) < 4 * WINDOW:
        return None
    (right, right_now), (far, far_now) = (
        (fmean(values[:WINDOW]), fmean(values[-3:])) for values in (accuracy, straying)
    )
    if right_now >= right or far_now > (1 - TAMED) * far:
        return None
    if not beyond_noise(accuracy, right - right_now) or not beyond_noise(straying, far - far_now):
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
    losses = column(rows, "flow/loss")
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
