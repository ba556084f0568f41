"""Benchmarks as small versioned definitions: where the problems come from, how they are asked,
sampled and graded.
"""

from __future__ import annotations

import ast
import csv
import re
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rlfr_vlm.config import Config, DataConfig, Section, parse_yaml
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.prompts import load_prompts, parse_row
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import Prompt

DEFINITIONS = Path(__file__).resolve().parent / "definitions" / "benchmarks"


class Benchmark(Section):
    """One benchmark. What stands here is part of the protocol that its numbers are made under."""

    name: str = Field(description="also the folder of its results")
    version: int = Field(1, ge=1, description="raised with every change that changes numbers")
    title: str = Field("", description="what it is, for people")
    file: str | None = Field(
        None,
        description="JSONL, JSON, Parquet or TSV under `eval.data_dir`, or beside this definition",
    )
    vlmeval: str | None = Field(
        None,
        description="a data set of VLMEvalKit, asked and graded as it does; its TSV is `file`, or "
        "NAME.tsv",
    )
    hub: str | None = Field(None, description="where the hub has it: `name@split`")
    num_problems: int | None = Field(None, ge=1, description="how many there must be")
    system: str | None = Field(None, description="system message")
    suffix: str = Field("", description="text after every question")
    answer: Literal["boxed", "tag", "text"] = Field(
        "boxed", description="where the answer stands in a response"
    )
    num_samples: int = Field(1, ge=1, description="responses per problem, k")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus")
    max_new_tokens: int = Field(8192, ge=1, description="response budget")
    note: str = Field("", description="what a reader of its numbers should know")

    @model_validator(mode="after")
    def _has_problems(self) -> Benchmark:
        if self.file is None and self.vlmeval is None:
            raise ValueError("`file` is missing (or `vlmeval`, a data set of VLMEvalKit)")
        return self


@dataclass(frozen=True)
class Problem:
    """A problem of a benchmark."""

    prompt: Prompt
    golds: tuple[str, ...]  # any of them is right


def find_benchmark(name: str) -> tuple[Benchmark, Path]:
    """The definition of the package by its name, or by path of a YAML. Raises UserError naming the
    known ones, or the field.
    """
    if name.startswith("vlmeval/"):
        kit_name = name.removeprefix("vlmeval/")
        if not re.fullmatch(r"[\w-][\w.+-]*", kit_name):
            raise UserError(
                f"eval.benchmarks: `{name}`: expected vlmeval/NAME with the name of a data set of "
                "VLMEvalKit"
            )
        return Benchmark(name=kit_name, vlmeval=kit_name), DEFINITIONS
    path = Path(name) if name.endswith((".yaml", ".yml")) else DEFINITIONS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in DEFINITIONS.glob("*.yaml"))
        raise UserError(
            f"eval.benchmarks: there is no `{name}`; known: {', '.join(known)}; vlmeval/NAME; or "
            "the path of a YAML"
        )
    try:
        return Benchmark.model_validate(parse_yaml(path.read_text())), path.parent
    except yaml.YAMLError as error:
        raise UserError(f"benchmark {path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"`{'.'.join(map(str, p['loc']))}`: {p['msg']}" for p in error.errors()
        )
        raise UserError(f"benchmark {path}: {problems}") from None


def resolve(cfg: Config, benchmark: Benchmark) -> Benchmark:
    """The benchmark as this config asks for it: prompts of training where it has any, and what
    `eval` overrides.
    """
    given: dict[str, Any] = {
        "num_samples": cfg.eval.num_samples,
        "temperature": cfg.eval.temperature,
        "top_p": cfg.eval.top_p,
        "max_new_tokens": cfg.eval.max_new_tokens,
        "system": cfg.data.system,
        "suffix": cfg.data.suffix or None,
        "answer": cfg.reward.answer if "answer" in cfg.reward.model_fields_set else None,
    }
    return benchmark.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )


def load_problems(benchmark: Benchmark, source: str) -> list[Problem]:
    """All its problems. Raises UserError for a missing file or a bad row."""
    data = DataConfig(system=benchmark.system, suffix=benchmark.suffix)
    prompts = (
        read_tsv(source, data)
        if source.endswith(".tsv")
        else load_prompts(source, data, BadRows(data))
    )
    return [
        Problem(replace(p, data_source=p.data_source or benchmark.name), gold_answers(p))
        for p in prompts
    ]


def chosen(
    cfg: Config, benchmark: Benchmark, source: str, problems: list[Problem]
) -> list[Problem]:
    """The first `eval.limit` of them, with the pictures that `eval.pictures` asks for. Raises
    UserError for another number than defined.
    """
    if benchmark.num_problems is not None and len(problems) != benchmark.num_problems:
        raise UserError(
            f"benchmark {benchmark.name}: {source} has {len(problems)} problems, the definition "
            f"says {benchmark.num_problems}"
        )
    problems = problems[: cfg.eval.limit]
    return swap_pictures(problems, benchmark.name) if cfg.eval.pictures == "swapped" else problems


def swap_pictures(problems: list[Problem], name: str) -> list[Problem]:
    """Every problem with the pictures of the next one that has as many. Raises UserError where no
    problem could get others.
    """
    order: dict[int, list[int]] = {}
    for i, problem in enumerate(problems):
        order.setdefault(len(problem.prompt.images), []).append(i)
    swapped = list(problems)
    for count, places in order.items():
        if count and len(places) > 1:
            for place, other in zip(places, [*places[1:], places[0]], strict=True):
                swapped[place] = replace(
                    problems[place],
                    prompt=replace(problems[place].prompt, images=problems[other].prompt.images),
                )
    if all(a is b for a, b in zip(swapped, problems, strict=True)):
        raise UserError(
            f"benchmark {name}: eval.pictures=swapped finds no two problems with equally many "
            "pictures"
        )
    return swapped


def find_source(cfg: Config, benchmark: Benchmark, folder: Path) -> str:
    """The benchmark's file under `eval.data_dir` or beside its definition, else its hub name."""
    assert benchmark.file is not None
    for place in ([Path(cfg.eval.data_dir)] if cfg.eval.data_dir else []) + [folder]:
        if (place / benchmark.file).is_file():
            return str(place / benchmark.file)
    if cfg.eval.data_dir is not None or benchmark.hub is None:
        where = cfg.eval.data_dir or folder
        raise UserError(
            f"benchmark {benchmark.name}: {Path(where) / benchmark.file} does not exist; set "
            "eval.data_dir to the folder that has it"
        )
    return benchmark.hub


def read_tsv(source: str, data: DataConfig) -> list[Prompt]:
    """Rows of a TSV as VLMEvalKit has them: index, question, answer, image (base64, or the index of
    a row that has it) or image_path, A to Z.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, Any]] = [
                {k: v for k, v in row.items() if k and v}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} is not a readable TSV: {error}") from None
    pictures = {row.get("index"): row["image"] for row in rows if len(row.get("image", "")) > 64}
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 2):
        where = f"{Path(source).name}:{number}"
        missing = {"index", "question", "answer"} - row.keys()
        image = pictures.get(row.get("image"), row.get("image", row.get("image_path")))
        if missing or image is None or row["index"] in prompts:
            problem = (
                f"no {' and no '.join(sorted(missing))}"
                if missing
                else "no image"
                if image is None
                else f"index {row['index']} again"
            )
            raise UserError(
                f"{where}: {problem}; a TSV has index, question, answer, image or image_path, and "
                "perhaps A, B, ..."
            )
        options = {k: row.pop(k) for k in string.ascii_uppercase if k in row}
        row["question"] += "".join(f"\n{letter}. {text}" for letter, text in options.items())
        if row["answer"] in options:
            row["answers"] = [row["answer"], options[row["answer"]]]
        fields: dict[str, Any] = {k: v for k, v in row.items() if k not in ("image", "image_path")}
        try:
            fields["images"] = ast.literal_eval(image) if image.startswith("[") else image
            prompts[row["index"]] = parse_row(fields, where, data)
        except RowError as error:
            raise UserError(str(error)) from None
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: the image is neither a text nor a list of texts") from None
    if not prompts:
        raise UserError(f"{source}: no rows")
    return list(prompts.values())


def gold_answers(prompt: Prompt) -> tuple[str, ...]:
    """Every gold answer of a row: its `answers` column where there is one, any of which is right
    (Minerva), else its answer.
    """
    several = prompt.extra.get("answers")
    return (
        tuple(str(a) for a in several)
        if isinstance(several, list) and several
        else (prompt.answer,)
    )
