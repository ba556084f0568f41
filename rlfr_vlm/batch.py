"""What flows between the stages of a step after the rollout: graded groups, samples, their scores
and credit, and what is put on record.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlfr_vlm.types import Outcome, Rollout, RolloutGroup

MIN_STD = 1e-6  # below it, differences are rounding noise of equal rewards

# (position of the group, sample index) -> the field `attention` of the response's row
AttentionRecord = dict[tuple[int, int], dict[str, Any]]


@dataclass(frozen=True)
class GradedGroup:
    """The responses to one prompt and what each earned."""

    group: RolloutGroup
    outcomes: tuple[Outcome, ...]
    position: int = 0  # among all groups of the step, whichever rank has them

    @property
    def informative(self) -> bool:
        """Whether its rewards differ by more than rounding: equal ones give no advantage."""
        return _differ([o.reward for o in self.outcomes if o.graded])

    @property
    def mixed(self) -> bool:
        """Whether some of its graded answers are right and some wrong, 0 < right < G (DAPO,
        arXiv:2503.14476, eq. 11).

        With `reward.function`, which may know more than right and wrong, whether its scores differ.
        Format and length do not count.
        """
        return _differ(
            [o.parts.get("function", float(o.correct)) for o in self.outcomes if o.graded]
        )


def _differ(values: Sequence[float]) -> bool:
    return len(values) > 1 and statistics.stdev(values) > MIN_STD


@dataclass(frozen=True)
class Collected:
    """A step's groups: this rank's share of them."""

    kept: tuple[GradedGroup, ...]  # what the update learns from
    sampled: tuple[GradedGroup, ...]  # everything, for unbiased figures
    rounds: int

    @property
    def groups(self) -> list[RolloutGroup]:
        """Groups of the update."""
        return [g.group for g in self.kept]

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of the update's responses, in order."""
        return [o for g in self.kept for o in g.outcomes]

    @property
    def positions(self) -> list[int]:
        """Places of these groups in the whole step."""
        return [g.position for g in self.kept]


@dataclass(frozen=True)
class Scores:
    """What tokens were worth to the policy that sampled them, to the reference, and to the field
    and value head as they were then. [N] each.
    """

    logprobs: Tensor
    entropy: Tensor
    deviations: Tensor | None = None
    contrast: Tensor | None = None  # deviations from the field's contrast, under the same noise
    valid: Tensor | None = None  # bool: whether there is a deviation
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None

    @property
    def straying(self) -> Tensor | None:
        """What the flow charges for: the deviation, less that from the contrast where there is
        one.
        """
        return (
            self.deviations
            if self.deviations is None or self.contrast is None
            else self.deviations - self.contrast
        )


@dataclass(frozen=True)
class Credit:
    """What tokens get. [N] each."""

    advantages: Tensor
    # of the flow, or of likelihood shaping; where they are advantages of their own token, centred
    # in the group
    token_rewards: Tensor
    returns: Tensor | None = None  # what the value head should have said


Columns = TypeVar("Columns", Scores, Credit)


def join(parts: Sequence[Columns]) -> Columns:
    """Responses end to end."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
    joined: dict[str, Any] = {
        name: None if values[0] is None else torch.cat(values) for name, values in columns.items()
    }
    return type(parts[0])(**joined)


def split(whole: Columns, lengths: Sequence[int]) -> list[Columns]:
    """One part per response."""
    present = {
        f.name: getattr(whole, f.name).split(list(lengths))
        for f in fields(whole)
        if getattr(whole, f.name) is not None
    }
    return [
        type(whole)(**{name: parts[i] for name, parts in present.items()})
        for i in range(len(lengths))
    ]


@dataclass(frozen=True)
class Sample:
    """One graded response, ready for the update."""

    rollout: Rollout
    outcome: Outcome
    # at the last token: relative to its group, or the reward itself where advantages are taken over
    # the batch
    outcome_credit: float
    seed: int  # of its flow noise
    position: int = 0  # of its group among all groups of the step, whichever rank has them
    # None: taken from the update's own forward, which for one on-policy step is the same
    scores: Scores | None = None
    credit: Credit | None = None

    @property
    def length(self) -> int:
        """Response tokens."""
        return len(self.rollout.token_ids)


@dataclass(frozen=True)
class UpdateSize:
    """Of the whole update, whatever its micro-batches."""

    num_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class TokenRecord:
    """What became of a response's tokens, for the page of rollouts."""

    advantages: list[float]
    flow_rewards: list[float] | None  # or those of likelihood shaping
    deviations: list[float] | None  # with a contrast, less those from it: what is charged for
    entropy: list[float]
    latent: list[float] | None = None  # [64], of the whole response: see flow/sketch.py
