"""What a response earns: accuracy, format and length, or the score of a function in a file of the
user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlfr_vlm.errors import StoppedError
from rlfr_vlm.faults import poison
from rlfr_vlm.rewards.grader import Graded
from rlfr_vlm.types import Outcome

if TYPE_CHECKING:
    from rlfr_vlm.config import RewardConfig
    from rlfr_vlm.rewards.grader import Grader
    from rlfr_vlm.types import Rollout, RolloutGroup
from rlfr_vlm.rewards.custom import REASONS_SHOWN, CustomScore, load_reward_function

MAX_BOXES = 4


def grade(
    groups: Sequence[RolloutGroup], cfg: RewardConfig, grader: Grader, max_new_tokens: int
) -> list[Outcome]:
    """One outcome per response, group by group, siblings in order.

    reward = 1 if right, else `cfg.wrong`, + format_weight * format + overlong penalty. With
    `cfg.function` its score stands in for the first, while *correct* still comes from the grader
    and the gold answer unless the function tells. An `error` verdict earns 0.0, whatever a wrong
    answer does, and has to be left out of its group. Raises StoppedError above `cfg.max_error_frac`
    errors, and UserError where the user's function fails.
    """
    if grader.where != cfg.answer:
        raise ValueError(
            f"the grader looks for answers in {grader.where!r}, reward.answer is {cfg.answer!r}"
        )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    graded = grader.grade([(rollout.prompt.prompt.answer, rollout.text) for rollout in rollouts])
    if cfg.function is None:
        outcomes = [
            _outcome(rollout, result, None, cfg, max_new_tokens)
            for rollout, result in zip(rollouts, graded, strict=True)
        ]
    else:
        scores = load_reward_function(cfg.function)(rollouts)
        settled = [_settle(result, score) for result, score in zip(graded, scores, strict=True)]
        outcomes = [
            _outcome(*triple, cfg, max_new_tokens)
            for triple in zip(rollouts, settled, scores, strict=True)
        ]
    stop_on_errors(reasons(groups, outcomes), len(outcomes), cfg.max_error_frac)
    return outcomes


def _outcome(
    rollout: Rollout,
    graded: Graded,
    score: CustomScore | None,
    cfg: RewardConfig,
    max_new_tokens: int,
) -> Outcome:
    if graded.verdict == "error":
        return Outcome(0.0, "error", prediction=graded.prediction, reason=graded.reason)
    accuracy = float(graded.verdict == "correct")
    reward = (
        (1.0 if accuracy else cfg.wrong) if score is None or score.reward is None else score.reward
    )
    parts = (
        {"accuracy": accuracy}
        if score is None
        else {**score.parts, "function": reward, "accuracy": accuracy}
    )
    if cfg.format_weight:
        parts["format"] = (
            tags_reward(rollout.text) if cfg.format == "tags" else boxed_reward(rollout.text)
        )
        reward += cfg.format_weight * parts["format"]
    if cfg.overlong_buffer:
        parts["overlong"] = overlong_penalty(
            len(rollout.token_ids), max_new_tokens, cfg.overlong_buffer
        )
        reward += parts["overlong"]
    return Outcome(poison("outcome", reward), graded.verdict, parts, graded.prediction)


def tags_reward(text: str) -> float:
    """1.0 for exactly one <think>..</think> followed by exactly one <answer>..</answer> and nothing
    else, else 0.0 (RLFR's VLM recipe).
    """
    text = text.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    thought, _, answer = text.partition("</think>")
    return float(
        thought.startswith("<think>")
        and answer.lstrip().startswith("<answer>")
        and answer.endswith("</answer>")
    )


def boxed_reward(text: str) -> float:
    r"""1.0 for between one and four \boxed, else 0.0: what RLFR's language recipe pays half of its
    reward for, right or wrong.
    """
    return float(1 <= text.count("\\boxed") <= MAX_BOXES)


def overlong_penalty(num_tokens: int, max_new_tokens: int, buffer: int) -> float:
    """Soft overlong punishment: 0 up to L - C tokens, then (L - C - |y|) / C down to -1 at L
    (arXiv:2503.14476, eq. 13).

    L = max_new_tokens, C = buffer >= 1, |y| = num_tokens, all in tokens.
    """
    excess = num_tokens - (max_new_tokens - buffer)
    return -min(max(excess / buffer, 0.0), 1.0)


def reasons(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome]) -> list[str]:
    """Why responses could not be graded, one line for each of them."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [
        f"row {r.prompt.prompt.id}: {o.reason}"
        for r, o in zip(rollouts, outcomes, strict=True)
        if not o.graded
    ]


def stop_on_errors(failed: Sequence[str], num_responses: int, max_error_frac: float) -> None:
    """Raises StoppedError naming rows and reasons when more than this share could not be graded."""
    if len(failed) <= max_error_frac * num_responses:
        return
    raise StoppedError(
        f"{len(failed)} of {num_responses} responses could not be graded "
        f"(reward.max_error_frac={max_error_frac:g}): "
        + "; ".join(list(dict.fromkeys(failed))[:REASONS_SHOWN])
        + "; no reward was given. Check the gold answers of these rows, or the limits under "
        "reward.grader"
    )


# --- the user's own function ----------------------------------------------------------------------


def _settle(graded: Graded, score: CustomScore) -> Graded:
    """The verdict where grader and function have both spoken. A gold answer that only the function
    can read is no error.
    """
    if score.reward is None:
        return Graded("error", graded.prediction, score.reason)
    correct = graded.verdict == "correct" if score.correct is None else score.correct
    return Graded("correct" if correct else "wrong", graded.prediction)
