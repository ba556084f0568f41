"""Accuracy on held-out problems: several sampled responses each, and one greedy."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.statistics import mean_interval
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade
from rlfr_vlm.rollout.engine import Sampler, SamplingConfig
from rlfr_vlm.types import EncodedPrompt, Outcome, RolloutGroup


@dataclass(frozen=True)
class HeldoutResult:
    """Accuracies in [0, 1] over problems; answers that could not be graded are counted apart and in
    no accuracy.
    """

    step: int
    accuracy: float  # mean over problems of the share of right samples
    accuracy_ci: tuple[float, float]  # 95 %, clustered by problem
    greedy: float
    num_problems: int
    num_samples: int
    temperature: float
    pictures: str
    mean_length: float  # tokens of a sampled response
    truncated: float  # share of sampled responses cut at the limit
    num_errors: int
    by_source: dict[str, dict[str, float]]


def evaluate_heldout(
    cfg: Config,
    engine: Sampler,
    prompts: Sequence[EncodedPrompt],
    grader: Grader,
    step: int,
    folder: Path | None = None,
) -> HeldoutResult:
    """Sample, grade and count; with a folder, write step_N.json and every response to step_N.jsonl
    there.
    """
    if not prompts:
        raise UserError("data.eval: there is no held-out problem to evaluate on")
    sampling = SamplingConfig(
        group_size=cfg.eval.heldout_samples,
        temperature=cfg.eval.heldout_temperature,
        max_new_tokens=cfg.rollout.max_new_tokens,
        stop=cfg.rollout.stop,
        seed_key=(cfg.seed, "heldout"),
    )
    sampled = engine.sample(prompts, sampling)
    greedy = engine.sample(prompts, replace(sampling, group_size=1, temperature=0.0))
    sampled_outcomes = _by_group(
        sampled, grade(sampled, cfg.reward, grader, cfg.rollout.max_new_tokens)
    )
    greedy_outcomes = _by_group(
        greedy, grade(greedy, cfg.reward, grader, cfg.rollout.max_new_tokens)
    )
    shares = [share for outcomes in sampled_outcomes if (share := accuracy(outcomes)) is not None]
    rollouts = [r for group in sampled for r in group.rollouts]
    by_source: defaultdict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_source[prompt.prompt.data_source].append(i)
    result = HeldoutResult(
        step=step,
        accuracy=_mean(shares),
        accuracy_ci=mean_interval(shares),
        greedy=_mean(
            [share for outcomes in greedy_outcomes if (share := accuracy(outcomes)) is not None]
        ),
        num_problems=len(prompts),
        num_samples=cfg.eval.heldout_samples,
        temperature=cfg.eval.heldout_temperature,
        pictures=cfg.eval.pictures,
        mean_length=_mean([len(r.token_ids) for r in rollouts]),
        truncated=_mean([r.finish_reason == "length" for r in rollouts]),
        num_errors=sum(
            not o.graded for outcomes in (*sampled_outcomes, *greedy_outcomes) for o in outcomes
        ),
        by_source={
            source: {
                "accuracy": _mean(
                    [share for i in rows if (share := accuracy(sampled_outcomes[i])) is not None]
                ),
                "greedy": _mean(
                    [share for i in rows if (share := accuracy(greedy_outcomes[i])) is not None]
                ),
                "num_problems": len(rows),
            }
            for source, rows in sorted(by_source.items())
        },
    )
    if folder is not None:
        _write(folder, result, [(sampled, sampled_outcomes), (greedy, greedy_outcomes)])
    return result


def accuracy(outcomes: Sequence[Outcome]) -> float | None:
    """Share of right answers among the graded ones; None when none could be graded."""
    graded = [o.correct for o in outcomes if o.graded]
    return sum(graded) / len(graded) if graded else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _by_group(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    remaining = iter(outcomes)
    return [[next(remaining) for _ in group.rollouts] for group in groups]


def _write(
    folder: Path,
    result: HeldoutResult,
    answers: Sequence[tuple[Sequence[RolloutGroup], Sequence[Sequence[Outcome]]]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{result.step:06d}" + ("" if result.pictures == "as_is" else f"_{result.pictures}")
    with (folder / f"{name}.jsonl").open("w") as file:
        for greedy, (groups, outcomes) in enumerate(answers):
            for group, judged in zip(groups, outcomes, strict=True):
                for rollout, outcome in zip(group.rollouts, judged, strict=True):
                    line = {
                        "id": group.prompt.prompt.id,
                        "sample_index": -1 if greedy else rollout.sample_index,
                        "question": group.prompt.prompt.question,
                        "response": rollout.text,
                        "prediction": outcome.prediction,
                        "answer": group.prompt.prompt.answer,
                        "verdict": outcome.verdict,
                        "finish_reason": rollout.finish_reason,
                    }
                    file.write(json.dumps(line) + "\n")
    temporary = folder / f"{name}.json.tmp"
    temporary.write_text(json.dumps(asdict(result), indent=1))
    os.replace(temporary, folder / f"{name}.json")
