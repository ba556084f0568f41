"""Why an engine's log-probs are not the trainer's, from what the steps say: the commonest faults
leave different marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlfr_vlm.config import Config
from rlfr_vlm.shares import points

Figures = Mapping[str, float]  # of a step; `step` among them

TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.1,
}  # mean gap in nats; see rollout/probe.py for what was measured
SURPRISE_ERRORS, SURPRISE_NATS = (
    6.0,
    0.01,
)  # standard errors and nats from which the tokens are not the policy's
# mean of p_trainer / p_engine below which a part of the policy's tokens is never sampled
KEPT_MASS = 0.97
UNLIKE = 5.0  # a gap so many times larger with pictures than without is the pictures'

SAMPLING = (
    "sampling settings: {}; the engine must draw from the whole distribution at "
    "rollout.temperature (no top_p, top_k, min_p or penalty)"
)
STALE_WEIGHTS = (
    "stale weights or a stale prefix cache: the engine was right at step {} and falls "
    "behind with every update"
)
STALE_PICTURES = (
    "a stale cache of pictures: the gap grew with the updates, and it is {:.0f} times larger where "
    "there are pictures"
)
POSITIONS = (
    "position ids of pictures (M-RoPE), or how they are scaled: the gap is {:.0f} times "
    "larger where there are pictures, from the start"
)
DTYPE = "dtype: the engine computes in {}, the policy in {}"
OTHER = (
    "the engine computes something else with the same weights (position ids, attention, rope "
    "scaling, dtype); try rollout.engine=hf"
)


def tolerance(cfg: Config) -> float:
    """Largest mean gap between the log-probs of engine and trainer, nats."""
    if cfg.monitors.max_mismatch is not None:
        return cfg.monitors.max_mismatch
    return max(TOLERANCE[dtype] for dtype in _dtypes(cfg))


def not_from_policy(now: Figures) -> bool:
    """Whether the sampled tokens are not draws from the policy: then the mean of -log p - entropy
    is off 0 by more than chance.
    """
    return (
        abs(now.get("rollout/surprisal_z", 0.0)) > SURPRISE_ERRORS
        and abs(now.get("rollout/surprisal_gap", 0.0)) > SURPRISE_NATS
    )


def likely_cause(cfg: Config, rows: Sequence[Figures]) -> str:
    """Of a mismatch in the last of these steps.

    Log-probs agree, yet the tokens are not the policy's: the engine samples otherwise than it says.
    Its log-probs are too high on average (mean of p_trainer / p_engine below 1): they are of a part
    of the vocabulary. Tokens too likely under the policy: sharper sampling. Else the gap is the
    computation's: there from the start (positions, dtype), or grown (stale weights or caches), with
    pictures or without.
    """
    now, limit = rows[-1], tolerance(cfg)
    gap, surprise = now["rollout/logprob_diff_mean"], now.get("rollout/surprisal_gap", 0.0)
    kept, sharper = now.get("rollout/ratio_mean", 1.0), not_from_policy(now) and surprise < 0
    if gap <= limit:
        side = "less" if surprise < 0 else "more"
        return SAMPLING.format(
            f"log-probs agree, but the tokens are {abs(surprise):.3g} nats {side} surprising than "
            "the policy's own"
        )
    if kept < KEPT_MASS:
        return SAMPLING.format(
            f"the engine's log-probs are of only {points(kept, 0)}% of the distribution"
        )
    if sharper:
        return SAMPLING.format(
            f"the tokens are {-surprise:.3g} nats less surprising than the policy's own"
        )
    first = next((row for row in rows if "rollout/logprob_diff_mean" in row), now)
    pictures, text = now.get("rollout/logprob_diff_pictures"), now.get("rollout/logprob_diff_text")
    times = pictures / max(text, 1e-9) if pictures is not None and text is not None else 1.0
    if first["rollout/logprob_diff_mean"] <= limit:
        return (
            STALE_PICTURES.format(times)
            if times > UNLIKE
            else STALE_WEIGHTS.format(int(first.get("step", 1)))
        )
    if times > UNLIKE:
        return POSITIONS.format(times)
    policy, engine = _dtypes(cfg)
    return DTYPE.format(engine, policy) if engine != policy else OTHER


def _dtypes(cfg: Config) -> tuple[str, str]:
    """Of the policy and of the engine."""
    engine = cfg.rollout.vllm.dtype
    return (
        cfg.model.dtype,
        cfg.model.dtype if engine == "auto" or cfg.rollout.engine == "hf" else engine,
    )
