"""`rlfr-vlm demo vision|text`: data, flow field, held-out accuracy, RL with flow rewards, held-out
accuracy again, and the page.

The last line on standard output is one JSON object with the figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlfr_vlm import commands
from rlfr_vlm.config import Config, load_config
from rlfr_vlm.demo import DATA, arithmetic, digits, recipe
from rlfr_vlm.evaluation.heldout import HeldoutResult
from rlfr_vlm.report.html import write_report
from rlfr_vlm.shares import points
from rlfr_vlm.types import Prompt

console = Console(stderr=True)


def demo(task: str, seed: int = 0, overrides: Sequence[str] = ()) -> None:
    """Run a demo, `vision` or `text`, in runs/ of this folder. Raises UserError where what it needs
    is not installed.
    """
    folder = f"runs/demo_{task}_{time.strftime('%Y%m%d-%H%M%S')}_seed{seed}"
    prepare(task)
    cfg = load_config(recipe(task), (f"output_dir={folder}", f"seed={seed}", *overrides))
    result = run(task, cfg)
    print(
        f"page: {result['report']}   curves: tensorboard --logdir {cfg.output_dir}/tb",
        file=sys.stderr,
    )
    print(json.dumps(result), flush=True)


def prepare(task: str) -> None:
    """Build the data set, and for text the model's folder, where they are missing."""
    recipes = {"vision": digits, "text": arithmetic}
    if not (DATA / task / "expert.jsonl").exists():
        commands.say(recipes[task].build(DATA / task))
    model = DATA / "smollm2"
    if task == "text" and not (model / "config.json").exists():
        commands.say(f"writing SmolLM2-135M-Instruct to {model}")
        arithmetic.save_model(model)


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
                name,
                f"{points(result.accuracy)}%",
                f"{points(low)}% to {points(high)}%",
                f"{points(result.greedy)}%",
            )
    table.add_row("each type's commonest answer", f"{points(commonest)}%", "", "")
    console.print(table)
    by_type = Table(title="by question type, sampled", title_justify="left")
    for column in ("", "before", "after"):
        by_type.add_column(column, justify="left" if not column else "right")
    for source, figures in before.by_source.items():
        by_type.add_row(
            source,
            f"{points(figures['accuracy'])}%",
            f"{points(after.by_source[source]['accuracy'])}%",
        )
    console.print(by_type)
