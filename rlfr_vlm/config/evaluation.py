"""Held-out problems, benchmarks, and the servers that are asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlfr_vlm.config.base import Section


class EndpointConfig(Section):
    """An OpenAI-compatible server."""

    model: str | None = Field(
        None, description="name that the server knows it by; with `serve`, chosen by itself"
    )
    api_base: str | None = Field(
        None, description="http(s)://HOST:PORT/v1; default: the environment's OPENAI_API_BASE"
    )
    key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; never its value"
    )
    serve: str | None = Field(
        None,
        description="folder or hub name of a model that a vLLM server is started for, on loopback, "
        "and stopped",
    )
    concurrency: int = Field(8, ge=1, description="requests at a time")
    retries: int = Field(
        6,
        ge=0,
        description="further attempts after 429, 5xx, a timeout or a broken reply, with backoff",
    )
    timeout: float = Field(120.0, gt=0, description="seconds of one attempt")


class JudgeConfig(EndpointConfig):
    """The model that decides whether a response is right where rules cannot."""

    temperature: float = Field(0.0, ge=0, description="of the judge")
    max_tokens: int = Field(256, ge=16, description="of its reply")
    prompt: Literal["equivalence-1"] = Field(
        "equivalence-1", description="name and version of what it is asked"
    )


class EvalConfig(Section):
    """Evaluation: on `data.eval`, and on benchmarks."""

    benchmarks: tuple[str, ...] = Field(
        (), description="names as math500, or paths of YAML files; none: data.eval"
    )
    data_dir: str | None = Field(
        None, description="folder with the benchmarks' files; default: the hub"
    )
    every: int = Field(0, ge=0, description="steps between evaluations during training; 0: none")
    num_samples: int | None = Field(
        None, ge=1, description="sampled responses per problem; default: 8, or the benchmark's"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        description="of the sampled responses; 0: greedy; default: 1, or the benchmark's",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="nucleus that is sampled from; default: 1, or the benchmark's"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="response budget; default: rollout.max_new_tokens, or the benchmark's",
    )
    limit: int | None = Field(None, ge=1, description="problems; default all")
    pictures: Literal["as_is", "blank", "swapped"] = Field(
        "as_is", description="blank, or another problem's: are the pictures used at all?"
    )
    grading: Literal["rule", "judge", "rule_then_judge", "both"] = Field(
        "rule",
        description="rules alone, the judge alone, the judge where rules find nothing right, or "
        "both and how often they agree",
    )
    judge: JudgeConfig | None = Field(
        None, description="a model that decides whether an answer is right"
    )
    endpoint: EndpointConfig | None = Field(
        None, description="evaluate this server instead of loading model.path"
    )
    max_failed_frac: float = Field(
        0.01,
        ge=0,
        le=1,
        description="above this share of answers without a verdict no score is given",
    )

    @property
    def heldout_samples(self) -> int:
        """Sampled responses per row of `data.eval`."""
        return self.num_samples or 8

    @property
    def heldout_temperature(self) -> float:
        """Of the sampled responses to `data.eval`."""
        return 1.0 if self.temperature is None else self.temperature
