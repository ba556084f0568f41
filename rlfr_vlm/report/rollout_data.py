"""Rollouts as the page carries them: compressed per step, pictures once, and no more of them than
the page's size allows.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

import numpy as np

from rlfr_vlm.report.attention import AttentionBudget, AttentionData
from rlfr_vlm.report.pictures import PictureData, load_picture
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.run_files import QUANTITIES, Group, Response, RolloutFile, read_rollouts
from rlfr_vlm.report.template import compress

PICTURE_BYTES = 32_768  # pictures above are made smaller
PICTURE_SIDE = 512  # pixels, of pictures made smaller
MIN_STEPS = 32  # when there is too much, no step takes more than this share of the budget


@dataclass(frozen=True)
class ColourRange:
    """Range of a per-token quantity over the whole run, which fixes its colours."""

    kind: Literal["signed", "penalty", "bonus", "magnitude"]
    low: float
    high: float


class ResponseTokens(TypedDict):
    """Tokens of a response with their traces, as the page reads them: a value per token of each of
    QUANTITIES that was recorded.
    """

    tokens: tuple[str, ...]
    flow_rewards: NotRequired[list[float | None]]
    deviations: NotRequired[list[float | None]]
    logprobs: NotRequired[list[float | None]]
    advantages: NotRequired[list[float | None]]
    entropy: NotRequired[list[float | None]]
    attention: NotRequired[AttentionData]


class ResponseHead(TypedDict):
    """A response without its tokens, as the page reads it."""

    index: int | None
    text: str
    prediction: str
    verdict: str
    reason: str
    reward: float | None
    parts: dict[str, float | None]
    finish: str
    version: int | None
    numTokens: int
    advantage: float | None
    flowReward: float | None
    numFlowTokens: int


class GroupHead(TypedDict):
    """A group without its tokens, as the page reads it."""

    step: int
    id: str
    question: str
    answer: str
    source: str
    images: list[PictureData]
    responses: list[ResponseHead]


@dataclass(frozen=True)
class RolloutData:
    """What the rollout browser reads."""

    index: str  # all groups without their tokens: base64 of gzipped JSON
    steps: dict[int, str]  # tokens and traces of a step's groups, likewise
    pictures: dict[str, str]  # key -> data URL
    scales: dict[str, ColourRange]
    num_groups: int
    num_responses: int
    num_groups_left_out: int  # of the steps shown
    num_steps_left_out: int
    num_attention: int  # responses that come with where their tokens looked
    num_attention_left_out: int  # more of them, for want of room


# is told of each step, its groups, and how many of the first of them are on the page
Census = Callable[[int, Sequence[Group], int], None]


def pack_rollouts(
    folder: Path,
    files: tuple[RolloutFile, ...],
    budget: int,
    problems: list[FileNote],
    censuses: Sequence[Census] = (),
) -> RolloutData:
    """Pack steps until `budget` bytes are used: first and last step first, then the middles of the
    gaps, so that any part spans the run.

    Every file is read once, and one at a time; `censuses` see all of them.
    """
    share = budget // min(len(files), MIN_STEPS) if files else budget
    pictures = _Pictures(folder)
    attention = AttentionBudget(min(len(files), MIN_STEPS))
    ranges = {name: _Range() for name in QUANTITIES}
    shown: dict[int, tuple[Group, ...]] = {}
    steps: dict[int, str] = {}
    used = groups_left_out = steps_left_out = 0
    for at in _spread(len(files)):
        if used >= budget:
            steps_left_out += 1
            for census in censuses:
                census(files[at].step, read_rollouts(files[at], problems), 0)
            continue
        groups = read_rollouts(files[at], problems)
        kept, packed = _pack_step(attention.keep(groups), pictures, min(share, budget - used))
        for census in censuses:
            census(files[at].step, groups, len(kept))
        groups_left_out += len(groups) - len(kept)
        if not kept:
            continue
        step = files[at].step
        shown[step], steps[step] = kept, packed
        used += len(steps[step]) + sum(
            pictures.keep(image) for group in kept for image in group.images
        )
        for group in kept:
            for response in group.responses:
                for name, values in response.traces.items():
                    ranges[name].add(values)
    ordered = [group for step in sorted(shown) for group in shown[step]]
    problems.extend(pictures.problems() + attention.problems())
    return RolloutData(
        index=compress(
            [json.dumps(_head(group, pictures), separators=(",", ":")) for group in ordered]
        ),
        steps=dict(sorted(steps.items())),
        pictures=pictures.urls,
        scales={
            name: scale
            for name, values in ranges.items()
            if (scale := values.scale(name)) is not None
        },
        num_groups=len(ordered),
        num_responses=sum(len(group.responses) for group in ordered),
        num_groups_left_out=groups_left_out,
        num_steps_left_out=steps_left_out,
        num_attention=sum(
            response.attention is not None for group in ordered for response in group.responses
        ),
        num_attention_left_out=attention.num_left_out,
    )


def _pack_step(
    groups: tuple[Group, ...], pictures: _Pictures, room: int
) -> tuple[tuple[Group, ...], str]:
    """The tokens of a step's first groups, as many of them (at least one) as take up no more than
    `room` bytes with their pictures.
    """
    texts = [json.dumps(_tokens(group), separators=(",", ":")) for group in groups]
    packed = compress(texts)
    bytes_per_letter = len(packed) / max(1, sum(map(len, texts)))
    used = 0.0
    seen: set[str] = set()
    for number, (group, text) in enumerate(zip(groups, texts, strict=True)):
        new = dict.fromkeys(image for image in group.images if image not in seen)
        used += bytes_per_letter * len(text) + sum(pictures.cost(image) for image in new)
        seen.update(new)
        if used > room + 1 and number > 0:  # + 1: rounding
            return groups[:number], compress(texts[:number])
    return groups, packed


def _tokens(group: Group) -> list[ResponseTokens]:
    return [
        cast(
            ResponseTokens,
            {
                "tokens": response.tokens,
                **{
                    name: [short(value) for value in values]
                    for name, values in response.traces.items()
                },
                **({"attention": response.attention} if response.attention is not None else {}),
            },
        )
        for response in group.responses
    ]


def _head(group: Group, pictures: _Pictures) -> GroupHead:
    return {
        "step": group.step,
        "id": group.prompt_id,
        "question": group.question,
        "answer": group.answer,
        "source": group.data_source,
        "images": [{"path": image, "key": pictures.key(image)} for image in group.images],
        "responses": [_response_head(response) for response in group.responses],
    }


def _response_head(response: Response) -> ResponseHead:
    rewards = [value for value in response.traces.get("flow_rewards", ()) if value]
    advantages = [value for value in response.traces.get("advantages", ()) if value is not None]
    return {
        "index": response.sample_index,
        "text": response.text,
        "prediction": response.prediction,
        "verdict": response.verdict,
        "reason": response.reason,
        "reward": short(response.reward),
        "parts": {name: short(value) for name, value in response.parts.items()},
        "finish": response.finish_reason,
        "version": response.policy_version,
        "numTokens": len(response.tokens),
        "advantage": short(sum(advantages) / len(advantages)) if advantages else None,
        "flowReward": short(sum(rewards)) if "flow_rewards" in response.traces else None,
        "numFlowTokens": len(rewards),
    }


def short(value: float | None) -> float | None:
    """Four significant digits, as many as the page shows; nothing for sums that overflowed, which
    JSON has no word for.
    """
    if value is None:
        return None
    rounded = float(f"{value:.4g}")
    return rounded if math.isfinite(rounded) else None


def _spread(count: int) -> list[int]:
    """0 .. count-1, ordered so that every prefix is spread over the whole: the ends, then the
    middles of the gaps.
    """
    order, gaps = ([0, count - 1] if count else []), deque([(0, count - 1)])
    while gaps:
        left, right = gaps.popleft()
        middle = (left + right) // 2
        if left < middle < right:
            order.append(middle)
            gaps += [(left, middle), (middle, right)]
    return list(dict.fromkeys(order))


class _Range:
    """Collects the values of one quantity."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, values: tuple[float | None, ...]) -> None:
        with np.errstate(over="ignore"):  # numbers too large for float32 become inf
            # None becomes nan
            self.parts.append(np.array(values, dtype=np.float64).astype(np.float32))

    def scale(self, name: str) -> ColourRange | None:
        """The range that holds all but the outermost percent; None without values."""
        values = np.concatenate(self.parts) if self.parts else np.empty(0, dtype=np.float32)
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        if name == "flow_rewards":  # mostly zeros: few tokens are rewarded
            return _around_zero(float(values.min()), float(values.max()))
        low, high = (float(bound) for bound in np.percentile(values, (1, 99)))
        if name == "advantages":
            return _around_zero(low, high)
        if name == "logprobs":
            return ColourRange("magnitude", low, 0.0)
        return ColourRange("magnitude", 0.0 if name == "entropy" else low, high)


def _around_zero(low: float, high: float) -> ColourRange:
    if low < 0 < high:
        size = max(-low, high)
        return ColourRange("signed", -size, size)
    return ColourRange("penalty", low, 0.0) if low < 0 else ColourRange("bonus", 0.0, high)


class _Pictures:
    """The page's pictures: each file read once, each content kept once."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve()
        self.urls: dict[str, str] = {}
        # path as written -> (key, data URL), None where there is no picture
        self._loaded: dict[str, tuple[str, str] | None] = {}

    def cost(self, image: str) -> int:
        """Bytes the page would grow by."""
        loaded = self._load(image)
        return len(loaded[1]) if loaded and loaded[0] not in self.urls else 0

    def keep(self, image: str) -> int:
        """Put a picture on the page. Returns the bytes it took."""
        cost = self.cost(image)
        if cost and (loaded := self._load(image)):
            self.urls[loaded[0]] = loaded[1]
        return cost

    def key(self, image: str) -> str | None:
        """The picture's key in `urls`."""
        loaded = self._load(image)
        return loaded[0] if loaded else None

    def problems(self) -> list[FileNote]:
        """One line for all pictures that could not be shown."""
        bad = [image for image, loaded in self._loaded.items() if loaded is None]
        if not bad:
            return []
        return [
            FileNote(
                "damaged",
                "rollouts",
                f"{len(bad)} pictures are missing, outside the run folder or not pictures, first "
                f"{bad[0]}",
            )
        ]

    def _load(self, image: str) -> tuple[str, str] | None:
        if image not in self._loaded:
            self._loaded[image] = load_picture(
                self.root / "rollouts" / image, self.root, PICTURE_BYTES, PICTURE_SIDE
            )
        return self._loaded[image]
