"""What an update says of itself: token means, what the field knows of right and wrong, and whether
the tokens came from the policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from rlfr_vlm.algorithm.advantages import rewards_to_go
from rlfr_vlm.algorithm.credit import credits_tokens
from rlfr_vlm.algorithm.losses import kl_estimate
from rlfr_vlm.algorithm.objective import rollout_logprobs
from rlfr_vlm.batch import MIN_STD, Credit, Sample, Scores, UpdateSize
from rlfr_vlm.config import Config
from rlfr_vlm.flow.separation import wins
from rlfr_vlm.ranks import ALONE, Ranks

LAST_PLACE = 63  # of a response, beyond which tokens count as one place


@dataclass(frozen=True)
class ResponseMetrics:
    """What the flow says of one response."""

    position: int  # of its group
    correct: bool
    outcome_credit: float  # see Sample
    rewarded: bool  # whether a token of it has a flow reward
    charge: float  # its flow rewards, summed and with their sign turned
    # where in the response they stand, 0 at its start and 1 at its end, weighed by size; nan
    # without any
    charge_place: float
    deviation: float  # mean over its tokens that have one; nan without such a token
    spread: float  # standard deviation of them over their mean; nan with fewer than two


class UpdateMetrics:
    """Metrics of an update, summed over its micro-batches: token means, unless named otherwise."""

    def __init__(self, cfg: Config, size: UpdateSize) -> None:
        self.cfg, self.size = cfg, size
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.largest = 0.0
        self.responses: list[ResponseMetrics] = []
        # count, sum of token rewards, by token id and by place
        self.by_token: defaultdict[str, float] = defaultdict(float)

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
            columns |= {
                "rollout/importance_mean": ratio.clamp(max=cap),
                "rollout/importance_capped": (ratio > cap).float(),
            }
        if scores.deviations is not None and scores.valid is not None:
            self.sums["flow/deviation_sum"] += scores.deviations.sum().item()
            self.sums["flow/num_valid"] += scores.valid.sum().item()
            self.responses += response_metrics(
                samples, scores.deviations, scores.valid, credit.token_rewards
            )
            self._add_by_token(samples, scores.valid, credit.token_rewards)
        self._add_by_pictures(samples, difference)
        self.add({name: column.sum().item() * share for name, column in columns.items()})
        if scores.deviations is not None or self.cfg.shaping.likelihood is not None:
            self._add_token_rewards(
                "flow" if scores.deviations is not None else "shaping", samples, credit, share
            )

    def _add_by_token(self, samples: Sequence[Sample], valid: Tensor, rewards: Tensor) -> None:
        """What a variance of token rewards between token ids, and between places in the response,
        is computed from.
        """
        kept = valid.cpu()
        ids = torch.tensor([token for s in samples for token in s.rollout.token_ids])[kept]
        places = torch.cat([torch.arange(s.length) for s in samples])[kept].clamp(max=LAST_PLACE)
        values = rewards.double().cpu()[kept]
        self.by_token["square"] += values.square().sum().item()
        for kind, keys in (("id", ids), ("place", places)):
            found, index = keys.unique(return_inverse=True)
            zeros = torch.zeros(len(found), dtype=torch.float64)
            counts, sums = (
                zeros.index_add(0, index, torch.ones_like(values)),
                zeros.index_add(0, index, values),
            )
            for key, count, total in zip(
                found.tolist(), counts.tolist(), sums.tolist(), strict=True
            ):
                self.by_token[f"{kind}/{key}/n"] += count
                self.by_token[f"{kind}/{key}/sum"] += total

    def _add_by_pictures(self, samples: Sequence[Sample], difference: Tensor) -> None:
        """Sums of the log-prob gap over tokens that answer pictures and over those that do not:
        where they differ, pictures are read wrongly.
        """
        for sample, part in zip(
            samples, difference.split([s.length for s in samples]), strict=True
        ):
            kind = "pictures" if sample.rollout.prompt.vision else "text"
            self.sums[f"gap/{kind}"] += part.sum().item()
            self.sums[f"tokens/{kind}"] += len(part)

    def _add_token_rewards(
        self, name: str, samples: Sequence[Sample], credit: Credit, share: float
    ) -> None:
        """Rewards are sums per response; sizes are absolute values: what token rewards and outcomes
        each add to the advantages.
        """
        lengths = torch.tensor([s.length for s in samples], device=credit.advantages.device)
        alone = credits_tokens(self.cfg)
        added = (
            credit.token_rewards
            if alone
            else rewards_to_go(credit.token_rewards, lengths, self.cfg.algorithm.gamma)
        )
        self.add(
            {
                f"{name}/reward_mean": credit.token_rewards.sum().item() / self.size.num_sequences,
                f"{name}/num_reward_tokens": (credit.token_rewards != 0).sum().item()
                / self.size.num_sequences,
            }
        )
        if self.cfg.algorithm.advantage not in ("whitened", "gae"):  # there the two are mixed
            outcome = sum(abs(s.outcome_credit) * s.length for s in samples)
            self.add(
                {
                    f"{name}/advantage_size": added.abs().sum().item() * share,
                    f"{name}/outcome_size": outcome * share,
                }
            )

    def result(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The finished metrics, of all ranks."""
        metrics = ranks.sum(dict(self.sums), "metrics of the update")
        metrics["rollout/logprob_diff_max"] = max(
            ranks.gather(self.largest, "metrics of the update")
        )
        responses = ranks.merge(self.responses, "metrics of the update")
        if "rollout/surprisal_square" in metrics:
            metrics["rollout/surprisal_z"] = standard_errors(
                metrics["rollout/surprisal_gap"],
                metrics.pop("rollout/surprisal_square"),
                self.size.num_tokens,
                metrics["actor/entropy"],
            )
        gaps = {
            kind: metrics.pop(f"gap/{kind}") / metrics.pop(f"tokens/{kind}")
            for kind in ("pictures", "text")
            if f"gap/{kind}" in metrics
        }
        if len(gaps) > 1:
            metrics |= {f"rollout/logprob_diff_{kind}": gap for kind, gap in gaps.items()}
        if "flow/num_valid" in metrics:
            metrics["flow/deviation_mean"] = metrics.pop("flow/deviation_sum") / max(
                1.0, metrics.pop("flow/num_valid")
            )
        for name in ("flow", "shaping"):
            if f"{name}/outcome_size" in metrics:
                size, outcome = (
                    metrics.pop(f"{name}/advantage_size"),
                    metrics.pop(f"{name}/outcome_size"),
                )
                metrics[f"{name}/advantage_share"] = size / max(size + outcome, 1e-12)
        if responses:
            metrics |= flow_health(responses) | explained(
                ranks.sum(dict(self.by_token), "metrics of the update")
            )
            if self.cfg.algorithm.advantage in (
                "whitened",
                "gae",
            ):  # there a group has no advantage of its own
                del metrics["flow/only_groups_frac"]
        return metrics


def response_metrics(
    samples: Sequence[Sample], deviations: Tensor, valid: Tensor, token_rewards: Tensor
) -> list[ResponseMetrics]:
    """Of each response. deviations, token_rewards: [N]; valid: [N] bool."""
    sizes = [s.length for s in samples]
    columns = zip(
        *(column.cpu().split(sizes) for column in (deviations, valid, token_rewards)), strict=True
    )
    found = []
    for sample, (own, mask, rewards) in zip(samples, columns, strict=True):
        own = own[mask]
        mean = own.mean().item() if len(own) else float("nan")
        spread = (
            own.std(correction=0).item() / max(abs(mean), 1e-12) if len(own) > 1 else float("nan")
        )
        size, place = rewards.abs().sum().item(), torch.linspace(0, 1, len(rewards))
        where = (rewards.abs() * place).sum().item() / size if size > 0 else float("nan")
        facts = (
            sample.position,
            sample.outcome.correct,
            sample.outcome_credit,
            bool(rewards.any()),
            -rewards.sum().item(),
            where,
        )
        found.append(ResponseMetrics(*facts, mean, spread))
    return found


def explained(sums: dict[str, float]) -> dict[str, float]:
    """Shares of the variance of token rewards that lie between token ids, and between places in the
    response: what needs no latents.
    """
    square, metrics = sums.pop("square", 0.0), {}
    for kind, name in (("id", "flow/charge_by_token"), ("place", "flow/charge_by_place")):
        counts = {
            key.rpartition("/")[0]: n
            for key, n in sums.items()
            if key.startswith(f"{kind}/") and key.endswith("/n")
        }
        count, total = sum(counts.values()), sum(sums[f"{key}/sum"] for key in counts)
        variance = square - total**2 / max(1.0, count)
        between = sum(sums[f"{key}/sum"] ** 2 / n for key, n in counts.items()) - total**2 / max(
            1.0, count
        )
        if variance > 1e-12 * max(1.0, square):
            metrics[name] = between / variance
    return metrics


def flow_health(responses: Sequence[ResponseMetrics]) -> dict[str, float]:
    """How well deviations tell right from wrong, among all responses and among siblings; where only
    the flow moves the policy.
    """
    ordered = sorted(responses, key=lambda found: found.position)
    groups = [list(group) for _, group in groupby(ordered, key=lambda found: found.position)]
    alone = [
        all(abs(r.outcome_credit) < MIN_STD for r in group) and any(r.rewarded for r in group)
        for group in groups
    ]
    metrics = {"flow/only_groups_frac": sum(alone) / len(groups)}
    known = [[r for r in group if np.isfinite(r.deviation)] for group in groups]
    if spreads := [r.spread for group in known for r in group if np.isfinite(r.spread)]:
        metrics["flow/deviation_spread"] = float(np.mean(spreads))
    if places := [r.charge_place for r in responses if np.isfinite(r.charge_place)]:
        metrics["flow/charge_place"] = float(np.mean(places))
    for name, value in (("auc", lambda r: r.deviation), ("charged_auc", lambda r: r.charge)):
        siblings = [wins([value(r) for r in group], [r.correct for r in group]) for group in known]
        everyone = [
            wins(
                [value(r) for group in known for r in group],
                [r.correct for group in known for r in group],
            )
        ]
        for suffix, counted in (("_in_group", siblings), ("", everyone)):
            if (pairs := sum(count for _, count in counted)) and (
                name == "auc" or any(r.rewarded for r in responses)
            ):
                metrics[f"flow/{name}{suffix}"] = sum(found for found, _ in counted) / pairs
    return metrics


def standard_errors(
    mean: float, mean_square: float, count: int, least_variance: float = 0.0
) -> float:
    """How many standard errors a mean of `count` uncorrelated values is from 0; 0 where they do not
    vary and are 0.

    least_variance: what the values are known to vary by at least, where rare large ones may be
        missing from a small sample; for surprisals
    their entropy, of the size of their variance where most tokens are certain.
    """
    error = (max(least_variance, mean_square - mean * mean) / max(1, count)) ** 0.5
    return (
        mean / error if error > 1e-12 else 0.0 if abs(mean) < 1e-9 else float(np.sign(mean)) * 1e6
    )
