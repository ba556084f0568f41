"""Benchmarks as small versioned definitions: where the problems come from, how they are asked, sampled and graded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from rlfr_vlm.config import Config, DataConfig, _Section
from rlfr_vlm.data.prompts import BadRows, load_prompts
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import Prompt

EVAL_FOLDER = Path(__file__).resolve().parents[2] / "eval"


class Benchmark(_Section):
    """One benchmark. What stands here is part of the protocol that its numbers are made under."""

    name: str = Field(description="also the folder of its results")
    version: int = Field(1, ge=1, description="raised with every change that changes numbers")
    title: str = Field("", description="what it is, for people")
    file: str = Field(description="JSONL, JSON, Parquet or TSV under `eval.data_dir`, or beside this definition")
    hub: str | None = Field(None, description="where the hub has it: `name@split`")
    num_problems: int | None = Field(None, ge=1, description="how many there must be")
    system: str | None = Field(None, description="system message")
    suffix: str = Field("", description="text after every question")
    answer: Literal["boxed", "tag", "text"] = Field("boxed", description="where the answer stands in a response")
    num_samples: int = Field(1, ge=1, description="responses per problem, k")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus")
    max_new_tokens: int = Field(8192, ge=1, description="response budget")
    note: str = Field("", description="what a reader of its numbers should know")


@dataclass(frozen=True)
class Problem:
    """A problem of a benchmark."""

    prompt: Prompt
    golds: tuple[str, ...]  # any of them is right


def find_benchmark(name: str) -> tuple[Benchmark, Path]:
    """The definition by name under eval/benchmarks, or by path of a YAML. Raises UserError naming the known ones, or the field."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else EVAL_FOLDER / "benchmarks" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (EVAL_FOLDER / "benchmarks").glob("*.yaml"))
        raise UserError(f"eval.benchmarks: there is no `{name}`; known: {', '.join(known)}; or give the path of a YAML that defines one")
    try:
        return Benchmark.model_validate(yaml.safe_load(path.read_text())), path.parent
    except yaml.YAMLError as error:
        raise UserError(f"benchmark {path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = "; ".join(f"`{'.'.join(map(str, p['loc']))}`: {p['msg']}" for p in error.errors())
        raise UserError(f"benchmark {path}: {problems}") from None


def resolve(cfg: Config, benchmark: Benchmark) -> Benchmark:
    """The benchmark as this config asks for it: prompts of training where it has any, and what `eval` overrides."""
    given: dict[str, Any] = {
        "num_samples": cfg.eval.num_samples,
        "temperature": cfg.eval.temperature,
        "top_p": cfg.eval.top_p,
        "max_new_tokens": cfg.eval.max_new_tokens,
        "system": cfg.data.system,
        "suffix": cfg.data.suffix or None,
        "answer": cfg.reward.answer if "answer" in cfg.reward.model_fields_set else None,
    }
    return benchmark.model_copy(update={key: value for key, value in given.items() if value is not None})


def load_problems(cfg: Config, benchmark: Benchmark, folder: Path) -> list[Problem]:
    """Its problems, the first `eval.limit` of them. Raises UserError for a missing file, a bad row, or another number than defined."""
    source = find_source(cfg, benchmark, folder)
    data = DataConfig(system=benchmark.system, suffix=benchmark.suffix)
    prompts = load_prompts(source, data, BadRows(data))
    if benchmark.num_problems is not None and len(prompts) != benchmark.num_problems:
        raise UserError(f"benchmark {benchmark.name}: {source} has {len(prompts)} problems, the definition says {benchmark.num_problems}")
    problems = [Problem(replace(p, data_source=p.data_source or benchmark.name), gold_answers(p)) for p in prompts]
    return problems[: cfg.eval.limit]


def find_source(cfg: Config, benchmark: Benchmark, folder: Path) -> str:
    """The benchmark's file under `eval.data_dir` or beside its definition, else its hub name."""
    for place in ([Path(cfg.eval.data_dir)] if cfg.eval.data_dir else []) + [folder]:
        if (place / benchmark.file).is_file():
            return str(place / benchmark.file)
    if cfg.eval.data_dir is not None or benchmark.hub is None:
        where = cfg.eval.data_dir or folder
        raise UserError(
            f"benchmark {benchmark.name}: {Path(where) / benchmark.file} does not exist; set eval.data_dir to the folder that has it"
        )
    return benchmark.hub


def gold_answers(prompt: Prompt) -> tuple[str, ...]:
    """Every gold answer of a row: its `answers` column where there is one, any of which is right (Minerva), else its answer."""
    several = prompt.extra.get("answers")
    return tuple(str(a) for a in several) if isinstance(several, list) and several else (prompt.answer,)
