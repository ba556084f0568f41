"""Write rlfr_vlm/report/web/data.d.ts: what Python hands to the page, as types of the page's
scripts.

Run it after a change of what the page is given: `.venv/bin/python scripts/page_types.py`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from textwrap import indent
from typing import (
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from rlfr_vlm.report.comparison_page import ComparisonData, Flip
from rlfr_vlm.report.evaluation_page import EvaluationData, ProblemData, SampleTexts
from rlfr_vlm.report.flow_tokens import TokenWindow
from rlfr_vlm.report.html import RunData
from rlfr_vlm.report.latents import LatentPoints
from rlfr_vlm.report.rollout_data import GroupHead, ResponseTokens

ROOTS = (  # what a page is given at once, and what it unpacks later
    RunData,
    GroupHead,
    ResponseTokens,
    TokenWindow,
    LatentPoints,
    ComparisonData,
    Flip,
    EvaluationData,
    ProblemData,
    SampleTexts,
)
FILE = Path(__file__).parents[1] / "rlfr_vlm/report/web/data.d.ts"
HEAD = "// What Python hands to the page. Written by scripts/page_types.py; not by hand.\n"
PLAIN = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def declarations(roots: Sequence[type]) -> str:
    """Interfaces of these TypedDicts and dataclasses, and of all that they name."""
    waiting, written = list(roots), dict[str, tuple[type, str]]()
    while waiting:
        kind = waiting.pop(0)
        known = written.get(kind.__name__)
        if known and known[0] is not kind:
            raise ValueError(f"two types are called {kind.__name__}")
        if not known:
            text, named = _interface(kind)
            written[kind.__name__] = (kind, text)
            waiting += named
    return "\n".join([HEAD, *(text for _, text in written.values())])


def _interface(kind: type) -> tuple[str, list[type]]:
    """One interface, and the types that it names."""
    hints = get_type_hints(kind, include_extras=True)
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else list(hints)
    named: list[type] = []
    lines = []
    for name in names:
        hint, optional = hints[name], ""
        if get_origin(hint) is NotRequired:
            (hint,), optional = get_args(hint), "?"
        lines.append(f"  {name}{optional}: {_type(hint, named)};\n")
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0]
    text = f"/** {summary} */" if "\n" not in summary else f"/**\n{indent(summary, ' * ')}\n */"
    return f"{text}\nexport interface {kind.__name__} {{\n{''.join(lines)}}}\n", named


def _type(hint: Any, named: list[type]) -> str:
    """A hint in TypeScript; the interfaces that it needs are added to `named`."""
    if hint in PLAIN:
        return PLAIN[hint]
    if is_dataclass(hint) or is_typeddict(hint):
        named.append(hint)
        return hint.__name__
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(f'"{value}"' for value in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(part, named) for part in parts))
    if origin is tuple and parts[-1] is not ...:
        return f"[{', '.join(_type(part, named) for part in parts)}]"
    if origin in (list, tuple, Sequence):
        inner = _type(parts[0], named)
        return f"({inner})[]" if "|" in inner else f"{inner}[]"
    if origin in (dict, Mapping):
        return f"Record<string, {_type(parts[1], named)}>"
    raise TypeError(f"{hint!r} has no word in TypeScript here")


if __name__ == "__main__":
    FILE.write_text(declarations(ROOTS), encoding="utf-8")
