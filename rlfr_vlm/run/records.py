"""What a step leaves on record: its metrics, and its responses as JSON lines."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlfr_vlm.batch import MIN_STD, GradedGroup, TokenRecord
from rlfr_vlm.types import EncodedPrompt, Outcome, Rollout

NGRAM = 4  # tokens
MIN_PAIRED = 16  # responses that have siblings like them


def rollout_line(
    step: int,
    rollout: Rollout,
    outcome: Outcome,
    pictures: Sequence[str],
    record: TokenRecord | None,
    attention: dict[str, Any] | None,
    decode: Callable[[int], str],
) -> dict[str, Any]:
    """One response as a JSON object: the contract of the report."""
    prompt = rollout.prompt.prompt
    return {
        "step": step,
        "prompt_id": prompt.id,
        "sample_index": rollout.sample_index,
        "data_source": prompt.data_source,
        "question": prompt.question,
        "images": list(pictures),
        "answer": prompt.answer,
        "response": rollout.text,
        "prediction": outcome.prediction,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "reward": outcome.reward,
        "parts": outcome.parts,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "tokens": [decode(t) for t in rollout.token_ids],
        "logprobs": [round(p, 4) for p in rollout.logprobs],
        "advantages": [round(a, 4) for a in record.advantages] if record else None,
        "flow_rewards": [round(r, 5) for r in record.flow_rewards]
        if record and record.flow_rewards is not None
        else None,
        "deviations": [round(d, 4) for d in record.deviations]
        if record and record.deviations is not None
        else None,
        "entropy": [round(e, 4) for e in record.entropy] if record else None,
        "latent": [float(f"{x:.4g}") for x in record.latent]
        if record and record.latent is not None
        else None,
        "attention": attention,
    }


def save_pictures(prompt: EncodedPrompt, folder: Path) -> list[str]:
    """Write a prompt's pictures once each, named by content. Returns their paths relative to
    rollouts/.
    """
    names = []
    for image in prompt.images:
        name = f"{hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()[:16]}.png"
        if not (folder / name).exists():
            image.save(folder / name)
        names.append(f"images/{name}")
    return names


def over_updates(results: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Metrics of a step's updates, with the number of samples of each: means weighted by it, but
    the largest of `_max`, standard errors of all together, the whole way of the weights, and where
    the field is in the end.
    """
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for figures, _ in results for name in figures):
        found = [(figures[name], count) for figures, count in results if name in figures]
        if name.endswith("_max"):
            merged[name] = max(value for value, _ in found)
        elif name == "actor/update_ratio":
            merged[name] = sum(value for value, _ in found)
        elif name == "flow/drift":
            merged[name] = found[-1][0]
        elif name.endswith("_z"):
            merged[name] = sum(value for value, _ in found) / len(found) ** 0.5
        else:
            merged[name] = sum(value * count for value, count in found) / max(
                1, sum(count for _, count in found)
            )
    return merged


@dataclass(frozen=True)
class GroupFigures:
    """What a rank tells the first one of a group."""

    position: int
    informative: bool
    prompt_length: int  # tokens
    lengths: tuple[int, ...]  # response tokens
    truncated: tuple[bool, ...]
    outcomes: tuple[Outcome, ...]
    repetition: tuple[float, ...]  # share of each response's 4-grams that occur in it before
    refrain: tuple[
        tuple[int, ...], int
        # the 4-gram that repeats most in one response, and how often it occurs there; () where none
        # does
    ]


def group_figures(graded: GradedGroup) -> GroupFigures:
    """Without texts and pictures."""
    rollouts = graded.group.rollouts
    grams = [ngrams(r.token_ids) for r in rollouts]
    most = max(
        (max(found.items(), key=lambda item: item[1]) for found in grams if found),
        key=lambda item: item[1],
        default=((), 0),
    )
    return GroupFigures(
        graded.position,
        graded.informative,
        len(graded.group.prompt.token_ids),
        tuple(len(r.token_ids) for r in rollouts),
        tuple(r.finish_reason == "length" for r in rollouts),
        graded.outcomes,
        tuple(1 - len(found) / found.total() if found else 0.0 for found in grams),
        most if most[1] > 1 else ((), 0),
    )


def ngrams(tokens: Sequence[int]) -> Counter[tuple[int, ...]]:
    """How often each run of four tokens occurs."""
    return Counter(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))


def length_correlation(groups: Sequence[GroupFigures]) -> float | None:
    """Correlation of reward and length among siblings of the same verdict and format: whether the
    reward pays for length itself.

    Both are taken relative to their mean over such siblings. 0 where rewards then do not differ;
    None with fewer than MIN_PAIRED of them.
    """
    alike: defaultdict[tuple[int, str, float], list[tuple[float, int]]] = defaultdict(list)
    for group in groups:
        for outcome, length in zip(group.outcomes, group.lengths, strict=True):
            if outcome.graded:
                alike[group.position, outcome.verdict, outcome.parts.get("format", 0.0)].append(
                    (outcome.reward, length)
                )
    pairs = [np.array(found) - np.mean(found, axis=0) for found in alike.values() if len(found) > 1]
    if sum(map(len, pairs)) < MIN_PAIRED:
        return None
    reward, length = np.concatenate(pairs).T
    size = float(np.sqrt((reward**2).sum() * (length**2).sum()))
    return (
        float((reward * length).sum()) / size
        if np.abs(reward).max() > MIN_STD and size > 0
        else 0.0
    )


def batch_metrics(groups: Sequence[GroupFigures]) -> dict[str, float]:
    """What everything that was sampled in a step earned, and how long it is."""
    outcomes = [o for g in groups for o in g.outcomes]
    graded = [o for o in outcomes if o.graded]
    rewards = [o.reward for o in graded]
    lengths = [length for g in groups for length in g.lengths]
    metrics = {
        "reward/mean": sum(rewards) / max(1, len(rewards)),
        "reward/accuracy": sum(o.correct for o in graded) / max(1, len(graded)),
        "reward/error_frac": 1 - len(graded) / len(outcomes),
        "reward/frac_zero_std": sum(not g.informative for g in groups) / len(groups),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "response_length/min": min(lengths),
        "response_length/clip_ratio": sum(cut for g in groups for cut in g.truncated)
        / len(lengths),
        "prompt_length/mean": sum(g.prompt_length for g in groups) / len(groups),
        "response/repetition": sum(share for g in groups for share in g.repetition) / len(lengths),
    }
    if (correlation := length_correlation(groups)) is not None:
        metrics["reward/length_corr"] = correlation
    for part in sorted({name for o in graded for name in o.parts}):
        metrics[f"reward/{part}"] = sum(o.parts.get(part, 0.0) for o in graded) / len(graded)
    return metrics
