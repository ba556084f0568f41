"""Image benchmarks through VLMEvalKit (ms-vlmeval): its data sets, prompts and scoring; our model,
ledger and judge endpoint.

A benchmark with `vlmeval: NAME` is asked with VLMEvalKit's own prompt (`dataset.build_prompt`;
    `system` and `suffix` of the definition come on
top where they are set) through the ordinary responder and ledger: one line a sample, nothing asked
twice. The responses then go, as the table that its `evaluate` expects, through its own scoring,
whose verdict on every row comes back into the ledger. Its score table is kept beside it.

VLMEvalKit runs in a process of its own (`vlm_process`), so that its environment, logging and
crashes stay there, and with its guards. Its data folder is one of ours, named after the content of
the TSV.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.evaluation import runner
from rlfr_vlm.evaluation.benchmarks import Benchmark, Problem
from rlfr_vlm.evaluation.ledger import Judgement, Ledger
from rlfr_vlm.evaluation.vlm.guards import GUARDS
from rlfr_vlm.types import Prompt

FOREIGN = re.compile(
    r"LOCAL_LLM|(OPENAI|AZURE|BOYUE)_.*|.*_API_(KEY|BASE)|BOYUE|VERBOSE|PRINT_VANILLA|EVAL_FORMAT|INTERNAL|SPLIT_THINK"
)
# what scoring reads, by the beginning of a data set's name, besides index, question and the picture
COLUMNS = {
    "MathVista": (
        "answer",
        "question_type",
        "answer_type",
        "choices",
        "answer_option",
        "task",
        "skills",
    ),
    "MathVision": ("answer", "choices", "category"),
    "MathVerse": ("answer", "question_for_eval", "metadata", "problem_version"),
    "LogicVista": ("answer", "skill"),
    "WeMath": ("answer", "A", "B", "ID", "key", "knowledge concept"),
    "DynaMath": ("answer", "answer_type", "subject", "knowledge_level", "varid", "qid"),
    "MMMU_DEV_VAL": ("answer", "A", "B", "split"),
    "VisuLogic": ("answer", "category"),
}


# -- problems --------------------------------------------------------------------------------------


def find_tsv(cfg: Config, benchmark: Benchmark, folder: Path) -> str:
    """NAME.tsv in a data folder of ours: a link to the file under `eval.data_dir` or beside the
    definition, else what VLMEvalKit downloads.

    Raises UserError for a file that is not there, naming it, or without a column that scoring
    reads.
    """
    name, wanted = str(benchmark.vlmeval), benchmark.file or f"{benchmark.vlmeval}.tsv"
    for place in ([Path(cfg.eval.data_dir)] if cfg.eval.data_dir else []) + [folder]:
        if (place / wanted).is_file():
            found = (place / wanted).resolve()
            check_columns(name, found)
            private = data_root() / f"{name}-{digest(found, found.stat().st_mtime_ns)}"
            private.mkdir(parents=True, exist_ok=True)
            link = private / f"{name}.tsv"
            if not (link.exists() and link.resolve() == found):
                link.unlink(missing_ok=True)
                link.symlink_to(found)
            return str(link)
    if cfg.eval.data_dir is not None or benchmark.file is not None:
        where = Path(cfg.eval.data_dir or folder) / wanted
        raise UserError(
            f"benchmark {benchmark.name}: {where} does not exist; put VLMEvalKit's {name}.tsv there"
        )
    (data_root() / "downloaded").mkdir(parents=True, exist_ok=True)
    return str(data_root() / "downloaded" / f"{name}.tsv")


def data_root() -> Path:
    """Where the data folders that VLMEvalKit is given lie, with the pictures that it unpacks."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlfr_vlm" / "vlmeval"
    )


@functools.cache
def digest(path: Path, changed: int) -> str:
    """Of a file's content, which last changed then."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_columns(name: str, path: Path) -> None:
    """Raises UserError naming the columns that the TSV of a known data set lacks."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header = next(csv.reader(file, delimiter="\t"), [])
    wanted = {"index", "question"}.union(
        *(columns for start, columns in COLUMNS.items() if name.startswith(start))
    )
    missing = sorted(wanted - set(header)) + (
        [] if {"image", "image_path"} & set(header) else ["image"]
    )
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(f'`{m}`' for m in missing)}; VLMEvalKit's {name} needs "
            "it"
        )


def load(benchmark: Benchmark, source: str) -> list[Problem]:
    """Its problems from what `find_tsv` found, asked as VLMEvalKit asks them."""
    tsv, problems = Path(source), []
    for row in kit().ask("load", name=benchmark.vlmeval, root=str(tsv.parent)):
        parts = [
            {"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["value"]}
            for p in row["parts"]
        ]
        parts += [{"type": "text", "text": benchmark.suffix}] if benchmark.suffix else []
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if benchmark.system:
            messages.insert(
                0, {"role": "system", "content": [{"type": "text", "text": benchmark.system}]}
            )
        images = tuple(p["value"] for p in row["parts"] if p["type"] == "image")
        prompt = Prompt(
            row["id"],
            tuple(messages),
            images,
            row["answer"],
            data_source=row["source"],
            origin=f"{tsv.name}:{row['id']}",
        )
        problems.append(Problem(prompt, (row["answer"],)))
    return problems


# -- a run -----------------------------------------------------------------------------------------


def run_vlm(run: runner.BenchmarkRun) -> dict[str, Any]:
    """As `run_benchmark`, graded by VLMEvalKit; also writes vlmeval_score.json and its tables.
    Returns the summary.
    """
    # those of training say nothing here
    no_rules = run.cfg.eval.model_copy(update={"grading": "judge"})
    asking = replace(run, cfg=run.cfg.model_copy(update={"eval": no_rules}))
    protocol = runner.protocol(run) | {"grading": grading(run)}
    ledger = Ledger(run.folder, protocol)
    try:
        runner.write_problems(run)
        runner.answer(asking, ledger)
        scores = [grade(run, ledger, k) for k in range(run.benchmark.num_samples)]
        summary = runner.summarise(run, ledger)
    finally:
        ledger.close()
    for name in ("agreement", "rule_accuracy"):
        summary.pop(name, None)
    summary |= {"judge": protocol["grading"]["judge"], "vlmeval": scores}
    path = run.folder / "summary.json.tmp"
    path.write_text(json.dumps(summary, indent=1))
    os.replace(path, run.folder / "summary.json")
    lost = summary["num_unanswered"] + sum(summary["verdicts"][v] for v in ("failed", "unjudged"))
    if summary["accuracy"] is None and not all(s["complete"] for s in scores):
        why = (
            "run the same command again to ask for them"
            if run.judge is not None
            else "VLMEvalKit needs a judge for them: --judge NAME"
        )
        errors = "".join(f"; {s['error']}" for s in scores if s["error"])
        raise StoppedError(
            f"{run.benchmark.name}: {lost} of {len(run.samples)} responses or verdicts are missing "
            f"(eval.max_failed_frac={run.cfg.eval.max_failed_frac:g}): no score; {why}{errors}"
        )
    return summary


def grading(run: runner.BenchmarkRun) -> dict[str, Any]:
    """How its answers are graded, for the protocol."""
    prompt = f"vlmeval {importlib.metadata.version('ms-vlmeval')} {run.benchmark.vlmeval}"
    judge = None if run.judge is None else {"model": run.judge.endpoint.model, "prompt": prompt}
    return {"mode": "vlmeval", "prompt": prompt, "guards": GUARDS, "judge": judge}


def grade(run: runner.BenchmarkRun, ledger: Ledger, k: int) -> dict[str, Any]:
    """VLMEvalKit's verdicts on the k-th sample of every problem into the ledger; returns its
    score.
    """
    answers = {
        p.prompt.id: ledger.answers[p.prompt.id, k]
        for p in run.problems
        if (p.prompt.id, k) in ledger.answers
    }
    waiting = ledger.ungraded([(name, k) for name in answers])
    path = run.folder / f"vlmeval_score{f'-{k}' if k else ''}.json"
    if not waiting and path.exists():
        return json.loads(path.read_text())
    judge, settings = run.judge, grading(run)
    if judge is not None and answers:
        run.say(
            f"{run.benchmark.name}  VLMEvalKit scores {len(answers)} responses with judge "
            f"{judge.endpoint.model}"
        )
    start = time.perf_counter()
    result = kit().ask(
        "score",
        name=run.benchmark.vlmeval,
        root=str(run.roots[0]),
        predictions={name: answer.response for name, answer in answers.items()},
        judge=None if judge is None else judge.endpoint.cfg.model_dump(mode="json"),
        key=None if judge is None else os.environ.get(judge.endpoint.cfg.key_env, ""),
        folder=str(run.folder.resolve() / f"vlmeval{f'-{k}' if k else ''}"),
    )
    seconds = round((time.perf_counter() - start) / max(1, len(answers)), 4)
    verdicts = []
    for name, _ in waiting:
        row = result["rows"][name]
        asked = (
            settings["judge"]
            and row["asked"]
            and {"verdict": row["verdict"], "reply": row["reply"], **settings["judge"]}
        )
        rule = (
            row["verdict"] if not row["asked"] and row["verdict"] in ("correct", "wrong") else None
        )
        verdicts.append(
            Judgement(
                name,
                k,
                row["verdict"],
                row["prediction"],
                row["reason"],
                rule,
                asked or None,
                seconds,
            )
        )
    ledger.append(verdicts)
    score = {
        "dataset": settings["prompt"],
        "num_scored": result["scored"],
        "num_samples": len(run.problems),
        **result["score"],
    }
    score["complete"] = score["value"] is not None and result["scored"] >= (
        1 - run.cfg.eval.max_failed_frac
    ) * len(run.problems)
    path.write_text(json.dumps(score, indent=1))
    return score


# -- the process that VLMEvalKit runs in, seen from here -------------------------------------------


class Kit:
    """A process with VLMEvalKit in it: one JSON line in, one out."""

    def __init__(self) -> None:
        """Raises UserError where it is not installed, or would read settings from a file inside the
        installation.
        """
        spec = importlib.util.find_spec("vlmeval")
        if spec is None or spec.origin is None:
            raise UserError("VLMEvalKit is not installed: pip install 'rlfr-vlm[eval]'")
        if (env := Path(spec.origin).parents[1] / ".env").exists():
            raise UserError(
                f"{env}: VLMEvalKit lets this file override the judge and its address; remove it"
            )
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        own = {k: v for k, v in os.environ.items() if not FOREIGN.fullmatch(k)}
        own |= {"PRED_FORMAT": "tsv", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
        command = [sys.executable, "-m", "rlfr_vlm.evaluation.vlm.process"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=own,
            text=True,
        )

    def ask(self, command: str, **order: Any) -> Any:
        """Carry out a command there. Raises UserError with its words where it cannot."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"command": command, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise UserError(
                f"VLMEvalKit's process ended with {self.process.wait()}: {self.log.read()[-2000:]}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"VLMEvalKit, {order['name']}: {reply['error']}")
        return reply["result"]


def kit() -> Kit:
    """The running one, or a new one: importing VLMEvalKit takes a quarter of a minute."""
    global _kit
    if _kit is None or _kit.process.poll() is not None:
        _kit = Kit()
    return _kit


_kit: Kit | None = None
