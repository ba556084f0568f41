"""docs/configuration.md, from the classes of the config themselves.

python scripts/config_reference.py            # write it
python scripts/config_reference.py --check    # exit code 1 where it is not what would be written
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlfr_vlm.config import Config
from rlfr_vlm.config.methods import METHODS, PROFILES
from rlfr_vlm.evaluation.benchmarks import Benchmark

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting of every command is a field of one tree. A config file is YAML with the sections
below; on the command line any field is overridden as `a.b=c`. An unknown key is an error that names
the nearest known one, and `--dry-run` (`flow`, `train`) prints the tree with everything filled in.

This page is written by `python scripts/config_reference.py` from the classes that validate the
config; edit the descriptions there.

Defaults are those of `algorithm.method=grpo`. [Another method](#what-a-method-fills-in), or
[a flow profile](#what-a-flow-profile-fills-in), fills in what the config leaves open.
"""
PLURAL = {"text": "texts", "integer": "integers", "number": "numbers"}
BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
COLUMNS = "| field | type | default | allowed | what it is |\n|---|---|---|---|---|"


def parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, where it holds one."""
    return next(
        (p for p in parts(field.annotation) if inspect.isclass(p) and issubclass(p, BaseModel)),
        None,
    )


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel], bool]]:
    """Dotted path and class of every section below this one, parents first, and whether it may be
    left out altogether.
    """
    for name, field in model.model_fields.items():
        if (section := section_of(field)) is not None:
            where = f"{path}.{name}" if path else name
            yield where, section, type(None) in parts(field.annotation)
            yield from sections(section, where)


def value_text(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:g}"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def type_text(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if len(choices := parts(annotation)) > 1:
        return " or ".join("null" if c is type(None) else type_text(c) for c in choices)
    if origin is Literal:
        return ", ".join(f"`{value_text(a)}`" for a in arguments)
    if origin is tuple:
        inner = type_text(arguments[0])
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{PLURAL.get(inner, inner)}"
    return {str: "text", bool: "true or false", int: "integer", float: "number"}[annotation]


def allowed_text(field: FieldInfo) -> str:
    """The bounds of a number, or the least length of a text."""
    found = []
    for constraint in field.metadata:
        found += [
            f"{sign} {value_text(getattr(constraint, name))}"
            for name, sign in BOUNDS
            if getattr(constraint, name, None) is not None
        ]
        if getattr(constraint, "min_length", None) is not None:
            found.append(f"at least {constraint.min_length} characters")
    return ", ".join(found)


def prose(text: str) -> str:
    """A text of the code as Markdown: tags are shown, not swallowed, and pages become links."""
    pieces = text.split("`")  # every second one is code
    pieces[::2] = [
        re.sub(r"docs/(\w+\.md)", r"[\1](\1)", piece.replace("<", "\\<")) for piece in pieces[::2]
    ]
    return "`".join(pieces)


def row(name: str, field: FieldInfo) -> str:
    """One line of a table."""
    default = "**required**" if field.is_required() else f"`{value_text(field.default)}`"
    cells = (
        f"`{name}`",
        type_text(field.annotation),
        default,
        allowed_text(field),
        prose(field.description or ""),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(model: type[BaseModel]) -> str:
    """The fields of a section that are no sections themselves; empty where it has none."""
    rows = [row(name, f) for name, f in model.model_fields.items() if section_of(f) is None]
    return "\n".join([COLUMNS, *rows]) if rows else ""


def summary(model: type[BaseModel]) -> str:
    """A class's docstring as one paragraph."""
    return prose(" ".join(inspect.cleandoc(model.__doc__ or "").split()))


def chapter(path: str, model: type[BaseModel], optional: bool) -> str:
    """Heading, docstring and table of one section."""
    note = f"`{path}` is off unless the config has the section." if optional else ""
    notes = [note, summary(model), table(model)]
    return "\n\n".join([f"{'#' * (2 + path.count('.'))} {path}", *filter(None, notes)])


def filled(title: str, before: str, what: dict[str, dict[str, Any]]) -> str:
    """What each name of a table of settings sets."""
    lines = [f"## {title}", "", before, "", "| name | sets |", "|---|---|"]
    for name, settings in what.items():
        pairs = [f"`{key}: {value_text(value)}`" for key, value in settings.items()]
        lines.append(f"| `{name}` | {', '.join(pairs) or 'nothing: the defaults'} |")
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    dapo = "DAPO also sets `reward.overlong_buffer` to a fifth of `rollout.max_new_tokens`."
    entropy = "With PPO, `shaping.entropy.alpha` is 0.1."
    return (
        "\n\n".join(
            [
                HEAD.rstrip("\n"),
                "## The top",
                summary(Config),
                table(Config),
                *(chapter(*found) for found in sections(Config)),
                filled(
                    "What a method fills in",
                    f"`algorithm.method`, wherever the config is silent. {dapo} {entropy} "
                    "[methods.md](methods.md) has the equations.",
                    METHODS,
                ),
                filled(
                    "What a flow profile fills in",
                    "`flow.profile`, below `flow.`, wherever the config is silent; "
                    "[flow_signal.md](flow_signal.md) has the evidence.",
                    PROFILES,
                ),
                "## A benchmark's file",
                f"{summary(Benchmark)} No part of the config, but a file of its own: "
                "[add_a_benchmark.md](add_a_benchmark.md).",
                table(Benchmark),
            ]
        )
        + "\n"
    )


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if arguments == ["--check"]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != render())
    if arguments:
        print(__doc__)
        return 2
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
