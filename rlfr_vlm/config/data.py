"""Rows, and what their answers earn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlfr_vlm.config.base import Section


class DataConfig(Section):
    """Prompts, their pictures and their gold answers."""

    train: str | None = Field(
        None,
        description="JSONL, JSON or Parquet file, or `hub-name@split`, `hub-name:config@split`",
    )
    eval: str | None = Field(
        None, description="held-out rows for `eval` and for evaluation during training"
    )
    expert: str | None = Field(
        None, description="rows with a `response` (an expert solution): what the flow is fitted on"
    )
    media_dirs: tuple[str, ...] = Field(
        (), description="folders that picture paths may point into, besides the data file's own"
    )
    allow_urls: bool = Field(False, description="let rows name pictures by http(s) URL")
    system: str | None = Field(
        None, description="system message put before every prompt that has none"
    )
    suffix: str = Field("", description="text put after every user question")
    min_pixels: int = Field(4 * 28 * 28, description="pictures are scaled up to at least this area")
    max_pixels: int = Field(
        640 * 28 * 28, description="pictures are scaled down to at most this area"
    )
    max_prompt_tokens: int = Field(
        3000, ge=1, description="longer prompts are bad rows; nothing is ever truncated"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="stop with exit code 2, or skip, write bad_rows.jsonl and go on"
    )
    max_bad_frac: float = Field(
        0.01, ge=0, le=1, description="with `skip`: stop above this share of bad rows"
    )
    shuffle: bool = Field(True, description="a new seeded order in every epoch")
    limit: int | None = Field(None, ge=1, description="use only the first rows of the training set")


class GraderConfig(Section):
    """The answer checker's worker processes."""

    workers: int = Field(2, ge=1, description="processes")
    cpu_seconds: float = Field(
        2.0, gt=0, description="CPU time of one verdict; beyond it the verdict is `error`"
    )
    wall_seconds: float = Field(
        5.0,
        gt=0,
        description="wall time a worker may stand still over one verdict (12 times that in all): "
        "then `error`",
    )
    memory_mib: int = Field(1024, ge=128, description="address space of a worker above its start")


class RewardConfig(Section):
    """What a response earns."""

    answer: Literal["boxed", "tag", "text"] = Field(
        "boxed", description=r"where the answer stands: \boxed{}, <answer>..</answer>, or anywhere"
    )
    wrong: float = Field(
        0.0,
        lt=1,
        allow_inf_nan=False,
        description="what a wrong answer earns, where a right one earns 1 (DAPO: -1)",
    )
    format: Literal["tags", "boxed"] = Field(
        "tags",
        description=r"one <think>..</think><answer>..</answer>, or between one and four \boxed{} "
        r"(RLFR's recipes)",
    )
    format_weight: float = Field(
        0.0, ge=0, description="reward of the format beside the accuracy (RLFR's VLM recipe: 0.5)"
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before max_new_tokens over which a penalty grows to -1 (DAPO); 0: none",
    )
    function: str | None = Field(
        None, description="`file.py:function` whose score stands in for the accuracy"
    )
    max_error_frac: float = Field(
        0.1, ge=0, le=1, description="stop when more verdicts of a step than this are errors"
    )
    grader: GraderConfig = GraderConfig()

    @model_validator(mode="after")
    def _scores_as_they_are(self) -> RewardConfig:
        if self.function is not None and self.wrong != 0:
            raise ValueError(
                f"wrong={self.wrong:g} is not read with a function, whose scores are taken as they "
                "are: leave it out, or at 0"
            )
        return self
