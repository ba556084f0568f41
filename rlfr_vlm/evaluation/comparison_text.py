"""A comparison of two evaluations as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlfr_vlm.evaluation.compare import Comparison, Report, some_of_names
from rlfr_vlm.evaluation.ledger import SampleKey
from rlfr_vlm.evaluation.statistics import DRAWS, Estimate
from rlfr_vlm.shares import points

LISTED = 50  # problem ids named in a text; CSV has all
COLUMNS = (
    "benchmark",
    "problems",
    "samples A, B",
    "accuracy A",
    "accuracy B",
    "B - A",
    "p",
    "right to wrong",
    "wrong to right",
    "unjudged A, B",
    "failed A, B",
    "errors A, B",
)


def render(report: Report, form: str) -> str:
    """The report as `md`, `csv` or `latex`."""
    return {"md": _markdown, "csv": _csv, "latex": _latex}[form](report)


def _row(c: Comparison) -> tuple[str, ...]:
    """The cells of COLUMNS; percentages and percentage points with their 95 % intervals."""
    shown = c.change is not None
    return (
        c.benchmark,
        str(c.num_problems),
        f"{c.a.num_samples}, {c.b.num_samples}",
        _percent(c.a.accuracy) if shown else "withheld",
        _percent(c.b.accuracy) if shown else "withheld",
        _percent(c.change.difference, "+") if c.change else "withheld",
        (f"{c.change.p_value:.3f}" if c.change.p_value >= 0.001 else "< 0.001")
        if c.change
        else "withheld",
        str(len(c.lost)),
        str(len(c.gained)),
        f"{c.a.unjudged}, {c.b.unjudged}",
        f"{c.a.failed}, {c.b.failed}",
        f"{c.a.errors}, {c.b.errors}",
    )


def _percent(e: Estimate | None, sign: str = "") -> str:
    return (
        "-"
        if e is None
        else f"{points(e.value, 1, sign)} [{points(e.low, 1, sign)}, {points(e.high, 1, sign)}]"
    )


def _remarks(c: Comparison) -> list[str]:
    """What a reader of the row should know."""
    remarks = [c.withheld] if c.withheld else []
    if c.left_out:
        remarks.append(f"{c.left_out} problems without a verdict in A or in B are left out")
    if c.change:
        draws = f" of up to {DRAWS:,} draws" if c.change.test.endswith("permutation") else ""
        remarks.append(f"p: {c.change.test}{draws}")
    remarks += [f"warning: {difference}" for difference in c.warnings]
    return remarks + [f"compared: {difference}" for difference in c.expected]


def _by_problem(samples: Sequence[SampleKey]) -> list[str]:
    """Problem ids, with the number of samples where it is more than one."""
    return [
        f"{problem} x{count}" if count > 1 else problem
        for problem, count in Counter(p for p, _ in samples).items()
    ]


def _markdown(report: Report) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(c) for c in report.comparisons)]
    lines = [f"A: {report.a}  ", f"B: {report.b}", ""]
    lines += [
        "| " + " | ".join(_plain(cell).replace("|", r"\|") for cell in row) + " |" for row in rows
    ]
    lines += [
        "",
        "Accuracy in %: mean over problems, [95 % interval, clustered by problem]; B - A in "
        "points, paired by problem.",
    ]
    lines += [f"- {note}" for note in report.notes]
    for c in report.comparisons:
        lines += ["", f"**{_plain(c.benchmark)}**", ""]
        lines += [f"- {_plain(remark)}" for remark in _remarks(c)]
        for title, samples in (("right to wrong", c.lost), ("wrong to right", c.gained)):
            if samples:
                named = some_of_names(_by_problem(samples), LISTED)
                lines.append(f"- {title}: {_plain(named)}")
    return "\n".join(lines) + "\n"


def _latex(report: Report) -> str:
    rows = [
        " & ".join(map(_tex, row)) + r" \\"
        for row in (COLUMNS, *(_row(c) for c in report.comparisons))
    ]
    remarks = [
        *report.notes,
        *(f"{c.benchmark}: {remark}" for c in report.comparisons for remark in _remarks(c)),
    ]
    lines = [
        r"% \usepackage{booktabs}",
        f"% A: {_plain(report.a)}",
        f"% B: {_plain(report.b)}",
        *(f"% {_plain(r)}" for r in remarks),
    ]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
    ]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _csv(report: Report) -> str:
    """Fractions in full precision; problem ids and remarks as JSON lists. What is withheld is
    empty.
    """
    rows: list[dict[str, Any]] = []
    for c in report.comparisons:
        row: dict[str, Any] = {
            "benchmark": c.benchmark,
            "num_problems": c.num_problems,
            "left_out": c.left_out,
        }
        change = c.change.difference if c.change else None
        for name, e in (
            ("accuracy_a", c.a.accuracy),
            ("accuracy_b", c.b.accuracy),
            ("difference", change),
        ):
            row |= (
                {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
                if c.change and e
                else dict.fromkeys(_three(name), "")
            )
        row |= {
            "p_value": c.change.p_value if c.change else "",
            "test": c.change.test if c.change else "",
        }
        for side, t in (("a", c.a), ("b", c.b)):
            row |= {
                f"samples_{side}": t.num_samples,
                f"unjudged_{side}": t.unjudged,
                f"failed_{side}": t.failed,
                f"errors_{side}": t.errors,
            }
        row |= {"right_to_wrong": len(c.lost), "wrong_to_right": len(c.gained)}
        row |= {
            "right_to_wrong_ids": json.dumps(_by_problem(c.lost)),
            "wrong_to_right_ids": json.dumps(_by_problem(c.gained)),
        }
        rows.append(row | {"remarks": json.dumps([*_remarks(c), *report.notes])})
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _three(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _tex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
    }
    return "".join(special.get(ch, "\\" + ch if ch in "&%$#_{}" else ch) for ch in _plain(text))
