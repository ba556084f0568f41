"""What an update says of itself: token means, what the field knows of right and wrong, and whether the tokens came from the policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from rlfr_vlm.advantages import MIN_STD, rewards_to_go
from rlfr_vlm.config import Config
from rlfr_vlm.losses import kl_estimate
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.training.credit import Credit, Sample, Scores
from rlfr_vlm.training.objective import UpdateSize, rollout_logprobs


@dataclass(frozen=True)
class ResponseFigures:
    """What the flow says of one response."""

    position: int  # of its group
    correct: bool
    advantage: float  # of the outcome
    rewarded: bool  # whether a token of it has a flow reward
    deviation: float  # mean over its tokens that have one; nan without such a token
    spread: float  # standard deviation of them over their mean; nan with fewer than two


class Figures:
    """Metrics of an update, summed over its micro-batches: token means, unless named otherwise."""

    def __init__(self, cfg: Config, size: UpdateSize) -> None:
        self.cfg, self.size = cfg, size
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.largest = 0.0
        self.responses: list[ResponseFigures] = []

    def add(self, values: dict[str, float]) -> None:
        """Shares that add up to the whole."""
        for name, value in values.items():
            self.sums[name] += value

    def add_tokens(self, samples: Sequence[Sample], scores: Scores, credit: Credit) -> None:
        """What the tokens were worth, and how far the engine's log-probs are from the trainer's."""
        share, device = 1.0 / self.size.num_tokens, scores.logprobs.device
        sampled = rollout_logprobs(samples, device)
        difference = (scores.logprobs - sampled).abs()
        self.largest = max(self.largest, difference.max().item())
        surprise = -scores.logprobs - scores.entropy
        columns = {
            "actor/entropy": scores.entropy,
            "actor/advantage_size": credit.advantages.abs(),
            "rollout/logprob_diff_mean": difference,
            "rollout/kl": kl_estimate(sampled, scores.logprobs, "k3"),
            "rollout/ratio_mean": (scores.logprobs - sampled).exp(),
            "rollout/surprisal_gap": surprise,
            "rollout/surprisal_square": surprise.square(),
        }
        if (cap := self.cfg.algorithm.importance_cap) is not None:
            ratio = (scores.logprobs - sampled).exp()
            columns |= {"rollout/importance_mean": ratio.clamp(max=cap), "rollout/importance_capped": (ratio > cap).float()}
        if scores.deviations is not None and scores.valid is not None:
            self.sums["flow/deviation_sum"] += scores.deviations.sum().item()
            self.sums["flow/num_valid"] += scores.valid.sum().item()
            self.responses += response_figures(samples, scores.deviations, scores.valid, credit.token_rewards)
        self._add_by_pictures(samples, difference)
        self.add({name: column.sum().item() * share for name, column in columns.items()})
        if scores.deviations is not None or self.cfg.shaping.likelihood is not None:
            self._add_token_rewards("flow" if scores.deviations is not None else "shaping", samples, credit, share)

    def _add_by_pictures(self, samples: Sequence[Sample], difference: Tensor) -> None:
        """Sums of the log-prob gap over tokens that answer pictures and over those that do not: where they differ, pictures are read wrongly."""
        for sample, part in zip(samples, difference.split([s.length for s in samples]), strict=True):
            kind = "pictures" if sample.rollout.prompt.vision else "text"
            self.sums[f"gap/{kind}"] += part.sum().item()
            self.sums[f"tokens/{kind}"] += len(part)

    def _add_token_rewards(self, name: str, samples: Sequence[Sample], credit: Credit, share: float) -> None:
        """Rewards are sums per response; sizes are absolute values: what token rewards and outcomes each add to the advantages."""
        lengths = torch.tensor([s.length for s in samples], device=credit.advantages.device)
        added = rewards_to_go(credit.token_rewards, lengths, self.cfg.algorithm.gamma)
        self.add(
            {
                f"{name}/reward_mean": credit.token_rewards.sum().item() / self.size.num_sequences,
                f"{name}/num_reward_tokens": (credit.token_rewards != 0).sum().item() / self.size.num_sequences,
            }
        )
        if self.cfg.algorithm.advantage not in ("whitened", "gae"):  # there the two are mixed
            outcome = sum(abs(s.advantage) * s.length for s in samples)
            self.add({f"{name}/advantage_size": added.abs().sum().item() * share, f"{name}/outcome_size": outcome * share})

    def result(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The finished metrics, of all ranks."""
        figures = ranks.sum(dict(self.sums), "metrics of the update")
        figures["rollout/logprob_diff_max"] = max(ranks.gather(self.largest, "metrics of the update"))
        responses = ranks.merge(self.responses, "metrics of the update")
        if "rollout/surprisal_square" in figures:
            figures["rollout/surprisal_z"] = standard_errors(
                figures["rollout/surprisal_gap"], figures.pop("rollout/surprisal_square"), self.size.num_tokens, figures["actor/entropy"]
            )
        gaps = {
            kind: figures.pop(f"gap/{kind}") / figures.pop(f"tokens/{kind}") for kind in ("pictures", "text") if f"gap/{kind}" in figures
        }
        if len(gaps) > 1:
            figures |= {f"rollout/logprob_diff_{kind}": gap for kind, gap in gaps.items()}
        if "flow/num_valid" in figures:
            figures["flow/deviation_mean"] = figures.pop("flow/deviation_sum") / max(1.0, figures.pop("flow/num_valid"))
        for name in ("flow", "shaping"):
            if f"{name}/outcome_size" in figures:
                size, outcome = figures.pop(f"{name}/advantage_size"), figures.pop(f"{name}/outcome_size")
                figures[f"{name}/advantage_share"] = size / max(size + outcome, 1e-12)
        if responses:
            figures |= flow_health(responses)
            if self.cfg.algorithm.advantage in ("whitened", "gae"):  # there a group has no advantage of its own
                del figures["flow/only_groups_frac"]
        return figures


def response_figures(samples: Sequence[Sample], deviations: Tensor, valid: Tensor, token_rewards: Tensor) -> list[ResponseFigures]:
    """Of each response. deviations, token_rewards: [N]; valid: [N] bool."""
    sizes = [s.length for s in samples]
    columns = zip(*(column.cpu().split(sizes) for column in (deviations, valid, token_rewards)), strict=True)
    found = []
    for sample, (own, mask, rewards) in zip(samples, columns, strict=True):
        own = own[mask]
        mean = own.mean().item() if len(own) else float("nan")
        spread = own.std(correction=0).item() / max(abs(mean), 1e-12) if len(own) > 1 else float("nan")
        found.append(ResponseFigures(sample.position, sample.outcome.correct, sample.advantage, bool(rewards.any()), mean, spread))
    return found


def flow_health(responses: Sequence[ResponseFigures]) -> dict[str, float]:
    """How well deviations tell right from wrong, among all responses and among siblings; where only the flow moves the policy."""
    ordered = sorted(responses, key=lambda found: found.position)
    groups = [list(group) for _, group in groupby(ordered, key=lambda found: found.position)]
    alone = [all(abs(r.advantage) < MIN_STD for r in group) and any(r.rewarded for r in group) for group in groups]
    figures = {"flow/only_groups_frac": sum(alone) / len(groups)}
    known = [[r for r in group if np.isfinite(r.deviation)] for group in groups]
    if spreads := [r.spread for group in known for r in group if np.isfinite(r.spread)]:
        figures["flow/deviation_spread"] = float(np.mean(spreads))
    siblings = [_wins(group) for group in known]
    everyone = [_wins([r for group in known for r in group])]
    for name, counted in (("flow/auc_in_group", siblings), ("flow/auc", everyone)):
        if pairs := sum(count for _, count in counted):
            figures[name] = sum(wins for wins, _ in counted) / pairs
    return figures


def _wins(responses: Sequence[ResponseFigures]) -> tuple[float, int]:
    """Pairs of a wrong and a right response in which the wrong one strays further, a tie counting one half; and how many pairs there are."""
    right = np.sort([r.deviation for r in responses if r.correct])
    wrong = np.array([r.deviation for r in responses if not r.correct])
    below, upto = (np.searchsorted(right, wrong, side) for side in ("left", "right"))
    return float((below + upto).sum()) / 2, len(right) * len(wrong)


def standard_errors(mean: float, mean_square: float, count: int, least_variance: float = 0.0) -> float:
    """How many standard errors a mean of `count` uncorrelated values is from 0; 0 where they do not vary and are 0.

    least_variance: what the values are known to vary by at least, where rare large ones may be missing from a small sample; for surprisals
    their entropy, of the size of their variance where most tokens are certain.
    """
    error = (max(least_variance, mean_square - mean * mean) / max(1, count)) ** 0.5
    return mean / error if error > 1e-12 else 0.0 if abs(mean) < 1e-9 else float(np.sign(mean)) * 1e6
