"""What validate prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlfr_vlm.config import Config
from rlfr_vlm.preflight.facts import Role
from rlfr_vlm.preflight.figures import by_kind
from rlfr_vlm.preflight.kinds import KINDS
from rlfr_vlm.preflight.scan import FileScan, Finding
from rlfr_vlm.shares import percent

FIRST_ROWS = 4
BAR = 40  # characters of the longest
TITLES = {"train": "data.train", "eval": "data.eval", "expert": "data.expert"}


def place(found: Finding) -> str:
    """File and line, as short as it can be told apart."""
    name = found.file.rsplit("/", 1)[-1]
    if found.line is None:
        return name
    return f"{name}:{found.line}" if name.endswith(".jsonl") else f"{name}[{found.line}]"


def print_results(
    console: Console, cfg: Config, data: Mapping[str, Any], scans: Mapping[Role, FileScan]
) -> None:
    """The figures of each file, then what was found."""
    for role, figures in data["files"].items():
        print_figures(console, role, figures, data)
    findings = [found for scan in scans.values() for found in scan.findings]
    if findings:
        console.print(findings_table(findings))
    console.print(verdict(cfg, data), highlight=False, markup=False, soft_wrap=True)


def print_figures(
    console: Console, role: str, figures: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """One file."""
    lines = [f"{figures['rows']} rows, {figures['bad_rows']} of them bad"]
    if figures["pictures"]:
        sizes = [figures["picture_smallest"], figures["picture_largest"]]
        between = (
            " x ".join(map(str, sizes[0])) + " to " + " x ".join(map(str, sizes[1]))
            if sizes[0]
            else "none of them readable"
        )
        lines.append(f"{figures['pictures']} pictures, {between}")
    if figures["gold_parse_rate"] is not None:
        lines.append(f"gold answers that the grader reads: {percent(figures['gold_parse_rate'])}")
    if figures["commonest_answer"] and role != "expert":
        common = figures["commonest_answer"]
        lines.append(
            f"commonest answer: {common['answer'][:40]!r}, {percent(common['share'])}: what "
            "guessing it is worth"
        )
    lines.append(
        f"{figures['duplicates']} repeated rows, {figures['conflicts']} with another answer"
    )
    if role != "eval" and "eval" in data["files"]:
        lines.append(f"{figures['overlap_with_eval']} rows overlap with data.eval")
    if figures["tokens"]:
        tokens = figures["tokens"]
        quantiles = ", ".join(f"{name} {value}" for name, value in tokens.items())
        lines.append(
            f"tokens of a prompt, pictures included: {quantiles}; over the limit: "
            f"{percent(figures['overlong_share'])}"
        )
    elif data["model"] is None:
        lines.append("tokens were not counted: no model was given")
    console.print(
        f"[bold]{TITLES[role]}[/bold]  {escape(figures['file'])}", highlight=False, soft_wrap=True
    )
    for line in lines:
        console.print("  " + line, highlight=False, markup=False, soft_wrap=True)
    for line in histogram(figures["token_bins"] or [], data["max_prompt_tokens"]):
        console.print("    " + line, highlight=False, markup=False, soft_wrap=True)
    console.print()


def histogram(bins: list[list[int]], limit: int) -> list[str]:
    """Bars of lengths, with the limit between those that it parts, or below them all."""
    if not bins:
        return []
    most, lines, marked = max(count for *_, count in bins), list[str](), False
    mark = f"{'-' * 11} data.max_prompt_tokens={limit} {'-' * 20}"
    for low, high, count in bins:
        if not marked and low > limit:
            lines.append(mark)
            marked = True
        lines.append(f"{low:>6}-{high:<6} {'#' * (-(-BAR * count // most)):<{BAR}} {count}")
    return lines if marked else [*lines, mark]


def findings_table(findings: list[Finding]) -> Table:
    """Kind, severity, how many, where first, what it is and what to do."""
    table = Table(show_lines=False, pad_edge=False)
    for name, options in (
        ("kind", {"no_wrap": True}),
        ("", {}),
        ("rows", {"justify": "right"}),
        ("first rows", {}),
        ("what it is, what to do", {"ratio": 1}),
    ):
        table.add_column(name, **options)  # type: ignore[arg-type]
    for kind, found in by_kind(findings).items():
        first = first_rows(found)
        severity = (
            f"[red]{found[0].severity}[/red]"
            if found[0].severity == "error"
            else f"[yellow]{found[0].severity}[/yellow]"
        )
        what = f"{escape(KINDS[kind].meaning)}\n[dim]-> {escape(KINDS[kind].do)}[/dim]"
        table.add_row(kind, severity, str(len(found)), escape(first), what)
    return table


def first_rows(found: list[Finding]) -> str:
    """`train.jsonl:75, 1517, ...`, a line of text for each file."""
    lines: dict[str, list[str]] = {}
    for one in found[:FIRST_ROWS]:
        rows = lines.setdefault(one.file, [])
        rows.append(str(one.line) if rows and one.line is not None else place(one))
    return "\n".join(", ".join(rows) for rows in lines.values()) + (
        ", ..." if len(found) > FIRST_ROWS else ""
    )


def verdict(cfg: Config, data: Mapping[str, Any]) -> str:
    """What training would do with these files."""
    bad = sum(figures["bad_rows"] for figures in data["files"].values())
    warnings = sum(found["severity"] == "warning" for found in data["findings"])
    if data["ok"]:
        return f"no bad rows, {warnings} warnings"
    if not bad:
        return "training would not start"
    if all(
        KINDS[found["kind"]].severity == "warning"
        for found in data["findings"]
        if found["severity"] == "error"
    ):
        return f"{bad} rows quarantined, {warnings} warnings: training would take all of them"
    worst = max(
        figures["bad_rows"] / figures["rows"]
        for figures in data["files"].values()
        if figures["rows"]
    )
    if cfg.data.on_bad_row == "stop":
        does = "training would stop at the first (data.on_bad_row=skip leaves them out)"
    elif worst > cfg.data.max_bad_frac:
        does = (
            f"training would stop: {percent(worst)} of a file exceed "
            f"data.max_bad_frac={cfg.data.max_bad_frac:g}"
        )
    else:
        does = "training would leave them out (data.on_bad_row=skip)"
    return f"{bad} bad rows, {warnings} warnings: {does}"
