"""What flows between the stages, as frozen dataclasses.

Axes: B rollouts, G siblings of a group, T tokens of one response, P tokens of one prompt, L hooked
    layers, K flow times, D hidden size,
N response tokens of a packed batch, S all tokens of a packed batch. Flow time t = 0 is noise, t = 1
is data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from rlfr_vlm.flow.latents import Latents

FinishReason = Literal["stop", "length"]
Verdict = Literal["correct", "wrong", "error"]


@dataclass(frozen=True)
class Prompt:
    """One row of a data set: a question, its pictures and its gold answer."""

    id: str
    messages: tuple[
        dict[str, Any], ...
        # chat messages; content is a list of {"type": "text", "text": ...} and {"type": "image"}
        # parts
    ]
    images: tuple[
        Any, ...
        # in the order of the image parts: path, URL, bytes, base64 text or PIL image, opened when
        # rendered
    ]
    answer: str
    response: str | None = None  # an expert solution, where the row has one
    data_source: str = ""
    # columns that are none of ours, for custom reward functions
    extra: dict[str, Any] = field(default_factory=dict)
    origin: str = ""  # `file:line`, for error messages

    @property
    def question(self) -> str:
        """What the user asks, pictures as `<image>`; for a person to read."""
        parts = (
            part
            for message in self.messages
            if message["role"] == "user"
            for part in message["content"]
        )
        return "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    prompt: Prompt
    token_ids: tuple[int, ...]  # P tokens, every picture expanded to its image tokens
    engine_token_ids: tuple[int, ...]  # the same with one image token per picture, as vLLM wants it
    position_ids: Tensor  # [A, P]; A = 1 for text, 3 (time, height, width) for M-RoPE
    images: tuple[Image, ...] = ()  # resized to what the processor keeps
    vision: dict[str, Tensor] = field(default_factory=dict)  # the processor's tensors, opaque


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    prompt: EncodedPrompt
    sample_index: int  # within its group
    token_ids: tuple[int, ...]  # T tokens, the sampled EOS included, none unsampled
    logprobs: tuple[float, ...]  # [T], by the engine that sampled them, at the sampling temperature
    text: str  # decoded without special tokens
    finish_reason: FinishReason  # "length": truncated
    policy_version: int  # optimiser steps the sampling policy had seen


@dataclass(frozen=True)
class RolloutGroup:
    """The G responses to one prompt."""

    prompt: EncodedPrompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Outcome:
    """What a response earned. An `error` verdict is no reward: the response leaves its group's
    statistics.
    """

    reward: float
    verdict: Verdict
    parts: dict[str, float] = field(default_factory=dict)
    prediction: str = ""  # the answer as extracted
    reason: str = ""  # of an error

    @property
    def correct(self) -> bool:
        """Whether the answer was verified; kept apart from the reward."""
        return self.verdict == "correct"

    @property
    def graded(self) -> bool:
        """Whether the response could be judged at all."""
        return self.verdict != "error"


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward of a packed batch gives, for its N response tokens."""

    logprobs: Tensor  # [N] float32, at the batch's temperature, with gradient
    entropy: Tensor | None  # [N] float32, nats, no gradient
    # outputs of the hooked layers at the tokens and their contexts, detached
    latents: Latents | None
    hidden: Tensor  # [N, D] last states that predict the tokens, with gradient
    # [B, D] float32, mean last state of each response's prompt, with gradient
    prompt_means: Tensor | None = None


def request_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on nothing but its parts: (run seed, step, prompt id, sample
    index, ...).
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
