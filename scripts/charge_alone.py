"""What a policy becomes that is paid for a token reward alone, with no outcome: whatever the reward
likes, right or wrong.

    python scripts/charge_alone.py vision [--steps N] [--only NAME ...] [a.b=c ...]

Trains the demo's policy on each token reward of scripts/rl_gain.py at 256 responses a step while
every answer earns the same, and tells held-out accuracy on the way, the commonest responses at the
end, and which monitors spoke. The table goes to standard output and runs/charge_alone/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rlfr_vlm import commands
from rlfr_vlm.demo.verb import prepare

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rl_gain import BASE, DEFAULTS, METHODS, method_config

FOLDER = Path("runs/charge_alone")
SHOWN = 3  # of the commonest responses


def run_alone(task: str, name: str, steps: int, extra: tuple[str, ...]) -> dict[str, Any]:
    """Train on one reward alone. Returns its figures."""
    folder = FOLDER / f"{task}-{name.replace(', ', '_').replace(' ', '_')}"
    cfg, _ = method_config(
        task, name, "initial", max(DEFAULTS[task].items())[1], steps, 0, folder, extra
    )
    # beyond what a config allows: then every group is without an outcome's advantage
    reward = cfg.reward.model_copy(update={"wrong": 1.0})
    commands.train(cfg.model_copy(update={"reward": reward}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # of the first rollouts
    held = [next(line["reward/accuracy"] for line in lines if "reward/accuracy" in line)]
    held += [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    said = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    answers = [
        json.loads(line)["response"]
        for line in (folder / "eval" / f"step_{steps:06d}.jsonl").read_text().splitlines()
    ]
    common = [
        (text.strip(), count / len(answers)) for text, count in Counter(answers).most_common(SHOWN)
    ]
    return {
        "name": name,
        "held": held,
        "monitors": [f"{e['monitor']} ({e['step']})" for e in said],
        "common": common,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| paid for | accuracy at the start | half-way | at the end | responses at the end | "
        "monitors (step) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        common = ", ".join(f"`{text}` {share:.0%}" for text, share in row["common"])
        cells = [
            row["name"],
            *(f"{value:.1%}" for value in row["held"]),
            common,
            ", ".join(row["monitors"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    names = [name for name in METHODS if name != BASE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=sorted(DEFAULTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    prepare(arguments.task)
    rows = []
    for name in arguments.only or names:
        rows.append(run_alone(arguments.task, name, arguments.steps, tuple(arguments.overrides)))
        commands.say(f"== {json.dumps(rows[-1])}")
    text = table(rows)
    (FOLDER / f"{arguments.task}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
