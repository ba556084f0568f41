"""`make demo` and `make demo-text`: data, flow field, held-out accuracy, RL with flow rewards,
held-out accuracy again, and the page.

    python scripts/demo.py vision|text [--seed S] [a.b=c ...]

The last line on standard output is one JSON object with the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlfr_vlm import commands
from rlfr_vlm.config import Config, load_config
from rlfr_vlm.errors import Preempted, UserError
from rlfr_vlm.evaluation.heldout import HeldoutResult
from rlfr_vlm.report.html import write_report
from rlfr_vlm.types import Prompt

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"vision": "digits.py", "text": "arithmetic.py"}
console = Console(stderr=True)


def prepare(task: str) -> None:
    """Build the data set, and for text the model's folder, where they are missing."""
    data = Path("runs/demo_data") / task
    recipe = str(ROOT / "data" / RECIPES[task])
    if not (data / "expert.jsonl").exists():
        subprocess.run([sys.executable, recipe, "build", str(data)], check=True, stdout=sys.stderr)
    if task == "text" and not Path("runs/demo_data/smollm2/config.json").exists():
        subprocess.run(
            [sys.executable, recipe, "model", "runs/demo_data/smollm2"],
            check=True,
            stdout=sys.stderr,
        )


def commonest_answer_accuracy(train: list[Prompt], test: list[Prompt]) -> float:
    """Accuracy of always giving each question type's commonest answer in the training set."""
    answers: dict[str, Counter[str]] = {}
    for prompt in train:
        answers.setdefault(prompt.data_source, Counter())[prompt.answer] += 1
    return sum(answers[p.data_source].most_common(1)[0][0] == p.answer for p in test) / len(test)


def run(task: str, cfg: Config) -> dict[str, object]:
    """The demo, as the command line would do it verb by verb, with one policy and one engine
    throughout.
    """
    start = time.perf_counter()
    expert = commands.expert_prompts(cfg)
    # the field is fitted below
    train, _, bad = commands.rl_prompts(cfg.model_copy(update={"flow": None}))
    heldout = commands.heldout_prompts(cfg)
    assert cfg.flow is not None
    with commands.workbench(cfg) as bench:
        sampled = commands.sampled_for_fit(bench, train) if commands.needs_responses(cfg) else None
        field = commands.fit(cfg, bench.policy, expert, sampled)
        cfg = cfg.model_copy(
            update={"flow": cfg.flow.model_copy(update={"checkpoint": str(field)})}
        )
        bench = replace(bench, cfg=cfg)
        prompts = commands.encode_heldout(bench, heldout)
        before = commands.run_evaluation(bench, prompts, 0)
        commands.say(f"before: accuracy {before.accuracy:.3f}, greedy {before.greedy:.3f}")
        commands.run_training(bench, train, heldout, bad)
        after = commands.run_evaluation(bench, prompts, cfg.train.steps)
        blank = None
        if task == "vision":
            blank_cfg = cfg.model_copy(
                update={"eval": cfg.eval.model_copy(update={"pictures": "blank"})}
            )
            blank_bench = replace(bench, cfg=blank_cfg)
            blank = commands.run_evaluation(
                blank_bench, commands.encode_heldout(blank_bench, heldout), cfg.train.steps
            )
        engine = bench.engine.name
    report = write_report(Path(cfg.output_dir))
    commonest = commonest_answer_accuracy(train, heldout)
    show(before, after, blank, commonest)
    result: dict[str, object] = {
        "task": task,
        "seed": cfg.seed,
        "accuracy_before": round(before.accuracy, 4),
        "accuracy_after": round(after.accuracy, 4),
        "greedy_before": round(before.greedy, 4),
        "greedy_after": round(after.greedy, 4),
        "commonest_answer": round(commonest, 4),
    }
    result |= flow_figures(field)
    if blank is not None:
        result["accuracy_blank_pictures"] = round(blank.accuracy, 4)
    seconds = round(time.perf_counter() - start, 1)
    return {
        **result,
        "steps": cfg.train.steps,
        "seconds": seconds,
        "engine": engine,
        "report": str(report),
    }


def flow_figures(field: Path) -> dict[str, object]:
    """What the field knew of right and wrong before RL: AUC among siblings of the deviation and of
    what is charged, with 95 % intervals.
    """
    auc = (
        json.loads((field / "flow_yardstick.json").read_text()).get("separation", {}).get("auc", {})
    )
    found: dict[str, object] = {}
    for key, name in (("flow_auc", "deviation"), ("flow_charged_auc", "charged")):
        if part := auc.get(name):
            found |= {
                key: round(part["auc"], 4),
                f"{key}_ci": [round(part["low"], 4), round(part["high"], 4)],
            }
    return found


def show(
    before: HeldoutResult, after: HeldoutResult, blank: HeldoutResult | None, commonest: float
) -> None:
    """The table a user looks at."""
    table = Table(title="held-out problems", title_justify="left")
    for column in ("", "sampled at T = 1", "95 %", "greedy"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("before", before), ("after", after), ("after, blank pictures", blank)]
    for name, result in rows:
        if result is not None:
            low, high = result.accuracy_ci
            table.add_row(
                name, f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{result.greedy:.1%}"
            )
    table.add_row("each type's commonest answer", f"{commonest:.1%}", "", "")
    console.print(table)
    by_type = Table(title="by question type, sampled", title_justify="left")
    for column in ("", "before", "after"):
        by_type.add_column(column, justify="left" if not column else "right")
    for source, figures in before.by_source.items():
        by_type.add_row(
            source, f"{figures['accuracy']:.1%}", f"{after.by_source[source]['accuracy']:.1%}"
        )
    console.print(by_type)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    folder = f"runs/demo_{arguments.task}_{time.strftime('%Y%m%d-%H%M%S')}_seed{arguments.seed}"
    config = ROOT / "scripts" / f"demo_{arguments.task}.yaml"
    try:
        prepare(arguments.task)
        cfg = load_config(
            config, (f"output_dir={folder}", f"seed={arguments.seed}", *arguments.overrides)
        )
        result = run(arguments.task, cfg)
    except (UserError, Preempted) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"page: {result['report']}   curves: tensorboard --logdir {folder}/tb", file=sys.stderr)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
