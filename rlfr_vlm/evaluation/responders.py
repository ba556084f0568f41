"""Models under test: each answers requests, a bounded number at a time, so that what is done is
stored before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from rlfr_vlm.data.bad_rows import RowError
from rlfr_vlm.data.images import open_image
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.benchmarks import Benchmark, Problem
from rlfr_vlm.evaluation.ledger import Answer, SampleKey
from rlfr_vlm.evaluation.server.endpoint import ChatRequest, Endpoint, Failure, data_url
from rlfr_vlm.rollout.engine import Sampler, SamplingConfig
from rlfr_vlm.types import EncodedPrompt, FinishReason, request_seed

CHUNK = 64  # responses between two writes of the ledger


@dataclass(frozen=True)
class Unanswered:
    """A request that the server did not answer; asked again when the evaluation is resumed."""

    problem: str
    sample: int
    reason: str


class Responder(Protocol):
    """A model under test."""

    identity: dict[str, Any]  # what of it decides the numbers

    def respond(
        self, samples: Sequence[SampleKey], problems: dict[str, Problem], benchmark: Benchmark
    ) -> Iterator[list[Answer | Unanswered]]:
        """Answers to these samples, part by part as they are ready."""
        ...


class EngineResponder:
    """The policy through a rollout engine: exactly the tokens and pictures of training."""

    def __init__(
        self, engine: Sampler, renderer: Renderer, seed: int, identity: dict[str, Any]
    ) -> None:
        self.engine, self.renderer, self.seed, self.identity = engine, renderer, seed, identity

    def respond(
        self, samples: Sequence[SampleKey], problems: dict[str, Problem], benchmark: Benchmark
    ) -> Iterator[list[Answer | Unanswered]]:
        """Problems with all their samples missing together, the remaining samples one by one; seeds
        do not depend on that.
        """
        missing: dict[str, list[int]] = {}
        for problem, sample in samples:
            missing.setdefault(problem, []).append(sample)
        whole = [p for p, found in missing.items() if len(found) == benchmark.num_samples]
        size = max(1, CHUNK // benchmark.num_samples)
        for start in range(0, len(whole), size):
            yield self._ask(
                whole[start : start + size], problems, benchmark, benchmark.num_samples, 0
            )
        for problem, found in missing.items():
            if len(found) < benchmark.num_samples:
                for sample in found:
                    yield self._ask([problem], problems, benchmark, 1, sample)

    def _ask(
        self,
        names: Sequence[str],
        problems: dict[str, Problem],
        benchmark: Benchmark,
        group_size: int,
        first: int,
    ) -> list[Answer | Unanswered]:
        sampling = SamplingConfig(
            group_size=group_size,
            temperature=benchmark.temperature,
            top_p=benchmark.top_p,
            max_new_tokens=benchmark.max_new_tokens,
            first_sample=first,
            seed_key=(self.seed, "benchmark", benchmark.name),
        )
        start = time.perf_counter()
        groups = self.engine.sample([self._encode(problems[name]) for name in names], sampling)
        seconds = round((time.perf_counter() - start) / (len(names) * group_size), 4)
        return [
            Answer(
                group.prompt.prompt.id,
                r.sample_index,
                r.text,
                r.finish_reason,
                len(group.prompt.token_ids),
                len(r.token_ids),
                seconds,
            )
            for group in groups
            for r in group.rollouts
        ]

    def _encode(self, problem: Problem) -> EncodedPrompt:
        try:
            return self.renderer.encode(problem.prompt)
        except RowError as error:
            raise UserError(str(error)) from None


class EndpointResponder:
    """An OpenAI-compatible server; pictures travel as data URLs."""

    def __init__(
        self,
        endpoint: Endpoint,
        roots: Sequence[Path],
        seed: int,
        identity: dict[str, Any],
        blank: bool = False,
    ) -> None:
        """roots: folders that pictures may lie in. blank: every picture is a grey one of its
        size.
        """
        self.endpoint, self.roots, self.seed, self.identity, self.blank = (
            endpoint,
            roots,
            seed,
            identity,
            blank,
        )

    def respond(
        self, samples: Sequence[SampleKey], problems: dict[str, Problem], benchmark: Benchmark
    ) -> Iterator[list[Answer | Unanswered]]:
        """One request per sample, many at a time; each answer is handed out when it arrives."""
        requests = (
            self._request(problem, sample, problems[problem], benchmark)
            for problem, sample in samples
        )
        for index, reply in self.endpoint.chat(requests):
            problem, sample = samples[index]
            if isinstance(reply, Failure):
                yield [Unanswered(problem, sample, f"{reply.kind}: {reply.message}")]
                continue
            finish: FinishReason = "length" if reply.finish_reason == "length" else "stop"
            yield [
                Answer(
                    problem,
                    sample,
                    reply.text,
                    finish,
                    reply.prompt_tokens or 0,
                    reply.response_tokens or 0,
                    round(reply.seconds, 4),
                )
            ]

    def _request(
        self, name: str, sample: int, problem: Problem, benchmark: Benchmark
    ) -> ChatRequest:
        return ChatRequest(
            messages=chat_messages(problem, self.roots, self.blank),
            temperature=benchmark.temperature,
            top_p=benchmark.top_p,
            max_tokens=benchmark.max_new_tokens,
            seed=request_seed(self.seed, "benchmark", benchmark.name, name, sample) % 2**31,
        )


def chat_messages(problem: Problem, roots: Sequence[Path], blank: bool) -> list[dict[str, Any]]:
    """OpenAI chat messages of a problem, its pictures in their places as data URLs."""
    pictures = iter(problem.prompt.images)
    messages = []
    for message in problem.prompt.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                image = open_image(next(pictures), roots, False)
                shown = Image.new("RGB", image.size, (128, 128, 128)) if blank else image
                parts.append({"type": "image_url", "image_url": {"url": data_url(shown)}})
        plain = all(part["type"] == "text" for part in parts)
        messages.append(
            {
                "role": message["role"],
                "content": "".join(p["text"] for p in parts) if plain else parts,
            }
        )
    return messages
