"""What a field knows of right and wrong: its deviations, and what would be charged for them, on
graded responses of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlfr_vlm.algorithm.credit import make_samples, token_rewards
from rlfr_vlm.batch import GradedGroup, Sample, Scores, join
from rlfr_vlm.config import Config
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.separation import Separation, separation
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.shares import points


@dataclass(frozen=True)
class Probe:
    """AUC among siblings of numbers that a response has, higher meaning wrong."""

    num_responses: int
    accuracy: float
    separation: dict[str, Separation | None]

    def as_json(self) -> dict[str, Any]:
        """For the field's folder."""
        found = {
            name: None if part is None else asdict(part) for name, part in self.separation.items()
        }
        return {"responses": self.num_responses, "accuracy": self.accuracy, "auc": found}

    @property
    def line(self) -> str:
        """For the terminal."""
        known = ",  ".join(
            f"{name} {part}" for name, part in self.separation.items() if part is not None
        )
        if not known:
            return (
                f"no group of the {self.num_responses} responses has right and wrong siblings: "
                "nothing can be said of what the field knows"
            )
        return (
            f"wrong siblings have more (AUC, 95 %; {self.num_responses} responses, "
            f"{points(self.accuracy, 0)}% right):  {known}"
        )


def probe(cfg: Config, policy: Policy, field: FlowField, groups: Sequence[GradedGroup]) -> Probe:
    """Mean deviation, mean of what is charged for (less the contrast's), what is charged, and
    surprisal, per response.
    """
    assert cfg.flow is not None
    samples = make_samples(
        [g.group for g in groups],
        [o for g in groups for o in g.outcomes],
        cfg.seed,
        0,
        cfg.algorithm,
    )
    if not samples:
        return Probe(0, 0.0, {})
    scores = score_responses(cfg, policy, field, samples)
    lengths = torch.tensor([s.length for s in samples], device=scores.logprobs.device)
    charges = -token_rewards(cfg, samples, scores, lengths, field.types)
    assert (
        scores.deviations is not None and scores.valid is not None and scores.straying is not None
    )
    means = {"deviation": per_response(scores.deviations, scores.valid, lengths)}
    if scores.contrast is not None:
        means["contrast"] = per_response(scores.straying, scores.valid, lengths)
    means["charged"] = [part.sum().item() for part in charges.split(lengths.tolist())]
    means["surprisal"] = per_response(-scores.logprobs, torch.ones_like(scores.valid), lengths)
    correct, group = [s.outcome.correct for s in samples], [s.position for s in samples]
    found = {name: separation(values, correct, group) for name, values in means.items()}
    return Probe(len(samples), sum(correct) / len(samples), found)


@torch.no_grad()
def score_responses(
    cfg: Config, policy: Policy, field: FlowField, samples: Sequence[Sample]
) -> Scores:
    """Scores of all of them, response by response."""
    assert cfg.flow is not None
    parts = []
    for indices in micro_batches([s.rollout for s in samples], cfg.train.tokens_per_microbatch):
        chosen = [samples[i] for i in indices]
        output = policy.forward(
            pack([s.rollout for s in chosen], policy.device),
            cfg.rollout.temperature,
            field.request,
            with_entropy=True,
        )
        assert output.latents is not None and output.entropy is not None
        sizes, seeds = [s.length for s in chosen], [s.seed for s in chosen]
        deviations, contrast = field.score_both(output.latents, sizes, seeds, cfg.flow.reward.draws)
        parts.append(
            Scores(output.logprobs, output.entropy, deviations, contrast, output.latents.scorable)
        )
    return join(parts)


def per_response(values: Tensor, valid: Tensor, lengths: Tensor) -> list[float]:
    """Mean over each response's valid tokens; nan without any. values, valid: [N]; lengths: [B]."""
    sizes = lengths.tolist()
    return [
        own[mask].mean().item() if bool(mask.any()) else float("nan")
        for own, mask in zip(values.split(sizes), valid.split(sizes), strict=True)
    ]
