"""Figures of a data file, and everything that was found as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.preflight.facts import Role
from rlfr_vlm.preflight.kinds import KINDS
from rlfr_vlm.preflight.scan import FileScan, Finding

BINS = 12
STEPS = (
    1,
    2,
    5,
    10,
    20,
    25,
    50,
    100,
    200,
    250,
    500,
    1000,
    2000,
    2500,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
)


def file_figures(scan: FileScan, limit: int) -> dict[str, Any]:
    """Figures of one file. limit: data.max_prompt_tokens."""
    tokens = sorted(scan.tokens)
    answer, times = next(iter(scan.answers.most_common(1)), ("", 0))
    kinds = Counter(found.kind for found in scan.findings)
    areas = sorted(((w * h, (w, h)) for w, h in scan.sizes), key=lambda pair: pair[0])
    return {
        "file": scan.file,
        "rows": scan.rows,
        "bad_rows": len(scan.bad),
        "pictures": scan.images,
        "picture_smallest": list(areas[0][1]) if areas else None,
        "picture_largest": list(areas[-1][1]) if areas else None,
        "gold_parse_rate": scan.readable / scan.graded if scan.graded else None,
        "tokens": quantiles(tokens) if tokens else None,
        "token_bins": bins(tokens, limit) if tokens else None,
        "overlong_share": sum(n > limit for n in tokens) / len(tokens) if tokens else None,
        "duplicates": kinds["duplicate_row"],
        "conflicts": kinds["answer_conflict"],
        "overlap_with_eval": kinds["overlap_problem"]
        + kinds["overlap_image"]
        + kinds["overlap_text"],
        "commonest_answer": {"answer": answer, "share": times / scan.answers.total()}
        if times
        else None,
        "kinds": dict(sorted(kinds.items())),
    }


def quantiles(ordered: list[int]) -> dict[str, int]:
    """Minimum, median, 90th and 99th percentile and maximum of sorted numbers."""
    last = len(ordered) - 1
    return {
        name: ordered[round(q * last)]
        for name, q in (("min", 0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1))
    }


def bins(ordered: list[int], limit: int) -> list[list[int]]:
    """[from, up to and with, rows] of sorted lengths: at most `BINS` equal spans up to the 99th
    percentile, then what lies beyond it.

    Where some exceed the limit, one span ends at it.
    """
    body, last = quantiles(ordered)["p99"], ordered[-1]
    low = ordered[0] - 1
    width = next((step for step in STEPS if body - step * (low // step) <= step * BINS), STEPS[-1])
    edges = set(range(width * (low // width), body + width, width))
    edges |= {limit} if low < limit < last else set()
    edges |= {last} if last > max(edges) else set()
    return [
        [low + 1, high, sum(low < n <= high for n in ordered)]
        for low, high in pairwise(sorted(edges))
    ]


def as_data(
    cfg: Config, scans: Mapping[Role, FileScan], counted: bool, lost: list[str], seconds: float
) -> dict[str, Any]:
    """validate.json."""
    findings = [found for scan in scans.values() for found in scan.findings]
    return {
        "ok": not any(found.severity == "error" for found in findings),
        "seconds": round(seconds, 1),
        "model": cfg.model.path if counted else None,
        "max_prompt_tokens": cfg.data.max_prompt_tokens,
        "files": {
            role: file_figures(scan, cfg.data.max_prompt_tokens) for role, scan in scans.items()
        },
        "kinds": {
            kind.id: asdict(kind)
            for kind in KINDS.values()
            if any(found.kind == kind.id for found in findings)
        },
        "findings": [asdict(found) for found in findings],
        "lost_processes": lost,
    }


def by_kind(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Findings by kind: errors first, then by how many."""
    grouped: dict[str, list[Finding]] = {}
    for found in findings:
        grouped.setdefault(found.kind, []).append(found)
    return dict(
        sorted(
            grouped.items(),
            key=lambda item: (item[1][0].severity != "error", -len(item[1]), item[0]),
        )
    )
