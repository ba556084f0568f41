"""What a step leaves on record: its metrics, and its responses as JSON lines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.training.collect import GradedGroup
from rlfr_vlm.training.update import TokenRecord
from rlfr_vlm.types import EncodedPrompt, Outcome, Rollout


def rollout_line(
    step: int, rollout: Rollout, outcome: Outcome, pictures: Sequence[str], record: TokenRecord | None, token_text: Any
) -> dict[str, Any]:
    """One response as a JSON object: the contract of the report."""
    prompt = rollout.prompt.prompt
    question = "".join(
        "<image>" if p["type"] == "image" else p["text"] for m in prompt.messages if m["role"] == "user" for p in m["content"]
    )
    return {
        "step": step,
        "prompt_id": prompt.id,
        "sample_index": rollout.sample_index,
        "data_source": prompt.data_source,
        "question": question,
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
        "tokens": [token_text(t) for t in rollout.token_ids],
        "logprobs": [round(p, 4) for p in rollout.logprobs],
        "advantages": [round(a, 4) for a in record.advantages] if record else None,
        "flow_rewards": [round(r, 5) for r in record.flow_rewards] if record and record.flow_rewards is not None else None,
        "deviations": [round(d, 4) for d in record.deviations] if record and record.deviations is not None else None,
        "entropy": [round(e, 4) for e in record.entropy] if record else None,
    }


def save_pictures(prompt: EncodedPrompt, folder: Path) -> list[str]:
    """Write a prompt's pictures once each, named by content. Returns their paths relative to rollouts/."""
    names = []
    for image in prompt.images:
        name = f"{hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()[:16]}.png"
        if not (folder / name).exists():
            image.save(folder / name)
        names.append(f"images/{name}")
    return names


def over_updates(results: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Metrics of a step's updates, with the number of samples of each: means weighted by it, and the largest of `_max`."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for figures, _ in results for name in figures):
        found = [(figures[name], count) for figures, count in results if name in figures]
        if name.endswith("_max"):
            merged[name] = max(value for value, _ in found)
        else:
            merged[name] = sum(value * count for value, count in found) / max(1, sum(count for _, count in found))
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


def group_figures(graded: GradedGroup) -> GroupFigures:
    """Without texts and pictures."""
    rollouts = graded.group.rollouts
    lengths, truncated = tuple(len(r.token_ids) for r in rollouts), tuple(r.finish_reason == "length" for r in rollouts)
    return GroupFigures(graded.position, graded.informative, len(graded.group.prompt.token_ids), lengths, truncated, graded.outcomes)


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
        "response_length/clip_ratio": sum(cut for g in groups for cut in g.truncated) / len(lengths),
        "prompt_length/mean": sum(g.prompt_length for g in groups) / len(groups),
    }
    for part in sorted({name for o in graded for name in o.parts}):
        metrics[f"reward/{part}"] = sum(o.parts.get(part, 0.0) for o in graded) / len(graded)
    return metrics
