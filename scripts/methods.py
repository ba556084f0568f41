"""`make methods`: every method on the same data, seed, grader and settings, differing in nothing
but what defines it.

    python scripts/methods.py [vision|text ...] [--only NAME ...] [--seed S] [a.b=c ...]

Vision: 60 steps each on the demo's digits; does the mean reward of the last 15 steps exceed that of
    the first 15 by two standard errors?
Text: 5 steps each with SmolLM2; is every loss finite? Writes
    runs/methods/{summary.json,table.md,curves.html}. The last line on standard
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from rlfr_vlm import commands
from rlfr_vlm.config import load_config
from rlfr_vlm.demo import recipe
from rlfr_vlm.demo.verb import prepare
from rlfr_vlm.errors import UserError

FOLDER = Path("runs/methods")
PUBLISHED = (
    "flow.profile=published",
    "flow.fit={steps: 60, batch_size: 64, batch_mul: 2, lr: 1.0e-3}",
)
INFORMED = ("flow={profile: informed}",)
METHODS: dict[str, tuple[str, ...]] = {
    "GRPO": ("algorithm.method=grpo", "flow=null"),
    "Dr. GRPO": ("algorithm.method=dr_grpo", "flow=null"),
    "DAPO": ("algorithm.method=dapo", "flow=null"),
    "GSPO": ("algorithm.method=gspo", "flow=null"),
    "GMPO": ("algorithm.method=gmpo", "flow=null"),
    "CISPO": ("algorithm.method=cispo", "flow=null"),
    "RLOO": ("algorithm.method=rloo", "flow=null"),
    "REINFORCE++": ("algorithm.method=reinforce_pp", "flow=null"),
    "PPO": ("algorithm.method=ppo", "algorithm.value.lr=1e-3", "flow=null"),
    "FlowRL": ("algorithm.method=flowrl", "algorithm.flowrl.lr=1e-3", "flow=null"),
    "entropy shaping": ("shaping.entropy={}", "flow=null"),
    "likelihood shaping": ("shaping.likelihood={}", "flow=null"),
    "RLFR, penalty": (*PUBLISHED, "flow.reward.normalise=minmax"),
    "RLFR, bilateral": (*PUBLISHED, "flow.reward.normalise=bilateral"),
    "RLFR, informed": INFORMED,
}
# Two updates per batch: with one, ratios are 1 and several of the objectives are the same.
COMMON = (
    "rollout.engine=hf",
    "eval.every=0",
    "algorithm.updates_per_rollout=2",
    "train.log_rollouts=1",
)
STEPS = {"vision": 60, "text": 5}
EDGE = 15  # steps compared at either end


def run_method(
    task: str, name: str, field: str, seed: int, overrides: tuple[str, ...]
) -> list[dict[str, float]]:
    """Train from the start; returns the lines of metrics.jsonl."""
    folder = FOLDER / task / name.lower().replace(", ", "_").replace(". ", "_").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    steps = STEPS[task]
    settings = (
        *COMMON,
        f"output_dir={folder}",
        f"seed={seed}",
        f"train.steps={steps}",
        f"train.save_steps={steps}",
    )
    own = (
        METHODS[name]
        if "flow=null" in METHODS[name]
        else (*METHODS[name], f"flow.checkpoint={field}")
    )
    cfg = load_config(recipe(task), (*settings, *own, *overrides))
    commands.say(f"== {task}: {name}")
    commands.train(cfg)
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "checkpoints")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fit_field(task: str, kind: str, seed: int, overrides: tuple[str, ...]) -> str:
    """The field that RLFR variants of a profile start from."""
    settings = (
        f"output_dir={FOLDER / task / kind}",
        f"seed={seed}",
        *(INFORMED if kind == "informed" else PUBLISHED),
        *overrides,
    )
    cfg = load_config(recipe(task), settings)
    shutil.rmtree(Path(cfg.output_dir) / "flow", ignore_errors=True)  # of an earlier run
    return str(commands.flow(cfg))


def summarise(lines: list[dict[str, float]]) -> dict[str, Any]:
    """Rise of the mean reward between the first and the last steps, in standard errors of the
    difference; time per step; losses.
    """
    rewards = [line["reward/mean"] for line in lines]
    first, last = rewards[:EDGE], rewards[-EDGE:]
    summary: dict[str, Any] = {
        "steps": len(lines),
        "finite": all(math.isfinite(value) for line in lines for value in line.values()),
        "first": round(statistics.mean(first), 4),
        "last": round(statistics.mean(last), 4),
        "accuracy_last": round(
            statistics.mean(line["reward/accuracy"] for line in lines[-EDGE:]), 4
        ),
        "seconds_per_step": round(
            statistics.median(line["timing_s/step"] for line in lines[1:]), 3
        ),
        "update_seconds": round(
            statistics.median(
                line["timing_s/update"] + line.get("timing_s/score", 0.0) for line in lines[1:]
            ),
            3,
        ),
    }
    if len(rewards) >= 2 * EDGE:
        error = math.sqrt(statistics.variance(first) / EDGE + statistics.variance(last) / EDGE)
        summary["standard_errors"] = round(
            (summary["last"] - summary["first"]) / max(error, 1e-9), 1
        )
        summary["rises"] = summary["standard_errors"] > 2
    return summary


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, cost relative to the first method."""
    lines = [
        "| method | reward, first 15 | last 15 | rise in standard errors | s per step | relative "
        "to GRPO |",
        "|---|---|---|---|---|---|",
    ]
    base = next(iter(results.values()))["seconds_per_step"]
    for name, r in results.items():
        rise = r.get("standard_errors", "")
        lines.append(
            f"| {name} | {r['first']:.3f} | {r['last']:.3f} | {rise} | {r['seconds_per_step']:.2f} "
            f"| {r['seconds_per_step'] / base:.2f} |"
        )
    return "\n".join(lines)


def curves(runs: dict[str, list[dict[str, float]]], window: int = 7) -> go.Figure:
    """Mean accuracy per step, smoothed by a running mean."""
    figure = go.Figure()
    dashes = ("solid", "dash", "dot")
    for number, (name, lines) in enumerate(runs.items()):
        values = [line["reward/accuracy"] for line in lines]
        smooth = [
            statistics.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))
        ]
        figure.add_scatter(
            x=[line["step"] for line in lines],
            y=smooth,
            name=name,
            line={"dash": dashes[number // 5 % 3], "width": 2},
        )
    figure.update_layout(
        template="plotly_white",
        width=1100,
        height=620,
        xaxis_title="step",
        yaxis_title=f"accuracy of sampled responses (mean of {window} steps)",
        legend={"x": 1.01, "y": 1.0},
        margin={"t": 20},
    )
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="vision|text|a.b=c",
        help="tasks (default: both) and settings for every run",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    overrides = tuple(a for a in arguments.rest if "=" in a)
    tasks = [a for a in arguments.rest if "=" not in a] or list(STEPS)
    if unknown := [task for task in tasks if task not in STEPS]:
        parser.error(f"unknown task {unknown[0]}; known: {', '.join(STEPS)}")
    result: dict[str, Any] = {}
    try:
        for task in tasks:
            prepare(task)
            names = arguments.only or list(METHODS)
            kinds = {
                name: "informed" if name == "RLFR, informed" else "published"
                for name in names
                if name.startswith("RLFR")
            }
            fields = {
                kind: fit_field(task, kind, arguments.seed, overrides)
                for kind in sorted(set(kinds.values()))
            }
            runs = {
                name: run_method(
                    task, name, fields.get(kinds.get(name, ""), ""), arguments.seed, overrides
                )
                for name in names
            }
            result[task] = {name: summarise(lines) for name, lines in runs.items()}
            (FOLDER / task / "table.md").write_text(table(result[task]) + "\n")
            curves(runs).write_html(FOLDER / task / "curves.html", include_plotlyjs=True)
            print(f"{task}\n\n{table(result[task])}\n", file=sys.stderr)
    except UserError as error:
        print(f"methods: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    (FOLDER / "summary.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    failed = [
        f"{task}: {n}"
        for task, part in result.items()
        for n, r in part.items()
        if not (r["finite"] and r.get("rises", True))
    ]
    if failed:
        print(
            f"methods: {', '.join(failed)}: a loss is not finite, or the reward does not rise",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
