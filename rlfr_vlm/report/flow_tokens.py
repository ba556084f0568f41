"""Which tokens the flow rewarded and penalised most in the course of a run, as Table 3 of
arXiv:2510.10201 asks; over all logged responses.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from rlfr_vlm.report.rollout_data import short
from rlfr_vlm.report.run_files import Group, Response

MAX_WINDOWS = 5
# different ones that a window keeps; beyond, those with the smallest rewards are forgotten
MAX_TOKENS = 100_000
MAX_ROWS = 150  # of a window and sign on the page, for its filter; it shows the first 15
MAX_LETTERS = 60  # of a token


@dataclass(frozen=True)
class Occurrence:
    """Where a token occurs: a response of the rollout files."""

    step: int
    group: int  # of the step
    response: int  # of the group, by sample_index
    token: int
    on_page: bool  # the rollout browser has it


@dataclass(frozen=True)
class TokenRow:
    """One token in one window of steps."""

    token: str
    reward: float  # summed over its occurrences
    count: int
    # share of the window's right responses that contain it; None without any
    in_right: float | None
    in_wrong: float | None
    place: Occurrence  # of its strongest reward of that sign, on the page where possible


class TokenWindow(TypedDict):
    """The tokens of one part of the run, as the page reads them."""

    first: int  # step
    last: int
    rewarded: list[TokenRow]
    penalised: list[TokenRow]


@dataclass
class _Window:
    first: int
    last: int
    num_right: int = 0
    num_wrong: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)  # responses
    wrong: Counter[str] = field(default_factory=Counter)
    rewards: dict[str, float] = field(default_factory=dict)
    # (token, rewarded) -> best so far
    places: dict[tuple[str, bool], tuple[tuple[bool, float], Occurrence]] = field(
        default_factory=dict
    )


class TokenCensus:
    """Adds up flow rewards by token and window of steps, a step at a time, in any order of
    steps.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        count = min(MAX_WINDOWS, len(steps))
        bounds = (
            [round(number * len(steps) / count) for number in range(count + 1)] if count else []
        )
        parts = [sorted(steps)[low:high] for low, high in itertools.pairwise(bounds)]
        self.windows = [_Window(part[0], part[-1]) for part in parts]
        self.window_of = {
            step: window for part, window in zip(parts, self.windows, strict=True) for step in part
        }
        self.approximate = False  # tokens were forgotten

    def add(self, step: int, groups: Sequence[Group], num_on_page: int) -> None:
        """Count a step's groups, the first `num_on_page` of which the rollout browser has."""
        window = self.window_of[step]
        for number, group in enumerate(groups):
            for at, response in enumerate(group.responses):
                self._count(window, response, Occurrence(step, number, at, 0, number < num_on_page))
        if len(window.counts) > MAX_TOKENS:
            self._forget(window)

    def _count(self, window: _Window, response: Response, place: Occurrence) -> None:
        rewards = response.traces.get("flow_rewards")
        if rewards is None:
            return
        tokens = [token[:MAX_LETTERS] for token in response.tokens]
        window.counts.update(tokens)
        if response.verdict == "correct":
            window.num_right += 1
            window.right.update(set(tokens))
        elif response.verdict == "wrong":
            window.num_wrong += 1
            window.wrong.update(set(tokens))
        for at, reward in enumerate(rewards):
            if not reward:
                continue
            token = tokens[at]
            window.rewards[token] = window.rewards.get(token, 0.0) + reward
            rank = (place.on_page, abs(reward))
            known = window.places.get((token, reward > 0))
            if known is None or rank > known[0]:
                window.places[token, reward > 0] = (
                    rank,
                    Occurrence(place.step, place.group, place.response, at, place.on_page),
                )

    def _forget(self, window: _Window) -> None:
        kept = set(
            sorted(window.counts, key=lambda token: -abs(window.rewards.get(token, 0.0)))[
                : MAX_TOKENS // 2
            ]
        )
        for counter in (window.counts, window.right, window.wrong, window.rewards):
            for token in [token for token in counter if token not in kept]:
                del counter[token]
        for key in [key for key in window.places if key[0] not in kept]:
            del window.places[key]
        self.approximate = True

    def for_page(self) -> list[TokenWindow]:
        """Windows in the order of steps, each with its most rewarded and most penalised tokens;
        none where no response has a flow reward.
        """
        windows: list[TokenWindow] = [
            {
                "first": w.first,
                "last": w.last,
                "rewarded": strongest(w, "rewarded"),
                "penalised": strongest(w, "penalised"),
            }
            for w in self.windows
        ]
        return windows if any(window.rewards for window in self.windows) else []


def strongest(window: _Window, sign: Literal["rewarded", "penalised"]) -> list[TokenRow]:
    """The tokens with the largest sums of that sign, the strongest first; equal ones by their
    text.
    """
    wanted = 1 if sign == "rewarded" else -1
    sums = [
        (-abs(total), token)
        for token, total in window.rewards.items()
        if math.isfinite(total) and total * wanted > 0
    ]
    return [
        TokenRow(
            token=token,
            reward=short(-wanted * size) or 0.0,
            count=window.counts[token],
            in_right=_share(window.right[token], window.num_right),
            in_wrong=_share(window.wrong[token], window.num_wrong),
            place=window.places[token, wanted > 0][1],
        )
        for size, token in sorted(sums)[:MAX_ROWS]
    ]


def _share(count: int, total: int) -> float | None:
    return round(count / total, 4) if total else None
