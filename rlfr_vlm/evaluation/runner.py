"""Running benchmarks: ask what is not yet answered, grade what is not yet graded, count. Killed and
started again, it repeats nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rlfr_vlm.config import Config
from rlfr_vlm.data.images import ImageError, open_image
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.evaluation.benchmarks import Benchmark, Problem
from rlfr_vlm.evaluation.ledger import COUNTED, Answer, FinalVerdict, Judgement, Ledger, SampleKey
from rlfr_vlm.evaluation.responders import Responder, Unanswered
from rlfr_vlm.evaluation.server.judge import Judge, JudgeItem, JudgeVerdict
from rlfr_vlm.evaluation.statistics import Scored, shares, summarize
from rlfr_vlm.rewards.grader import Graded, Grader

TAIL = 4000  # characters of a response that a judge reads
PROGRESS = 10  # lines of progress per benchmark


@dataclass(frozen=True)
class BenchmarkRun:
    """Everything that one benchmark is run with."""

    cfg: Config
    benchmark: Benchmark  # resolved
    problems: tuple[Problem, ...]
    responder: Responder
    grader: Grader
    judge: Judge | None
    folder: Path
    roots: tuple[Path, ...] = ()  # where pictures are looked up
    say: Callable[[str], None] = print

    @property
    def samples(self) -> list[SampleKey]:
        """Every (problem, sample index), in order."""
        return [(p.prompt.id, k) for p in self.problems for k in range(self.benchmark.num_samples)]

    @property
    def by_id(self) -> dict[str, Problem]:
        """Problems by id."""
        return {p.prompt.id: p for p in self.problems}


def run_benchmark(run: BenchmarkRun) -> dict[str, Any]:
    """Answer, grade and count; writes protocol.json, problems.jsonl, ledger.jsonl and summary.json.
    Returns the summary.

    Raises UserError when the folder holds another protocol's numbers, and StoppedError, with
    everything so far stored, when too many answers are without a verdict.
    """
    ledger = Ledger(run.folder, protocol(run))
    try:
        write_problems(run)
        answer(run, ledger)
        judge_rest(run, ledger)
        summary = summarise(run, ledger)
    finally:
        ledger.close()
    temporary = run.folder / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1))
    os.replace(temporary, run.folder / "summary.json")
    if summary["accuracy"] is None:
        counts = summary["verdicts"]
        reasons = [v.reason for v in ledger.verdicts.values() if v.reason]
        raise StoppedError(
            f"{run.benchmark.name}: no score, as of {len(run.samples)} responses "
            f"{summary['num_unanswered']} are missing, {counts['failed']} "
            f"verdicts failed, {counts['unjudged']} had no judge and {counts['error']} could not "
            "be graded (eval.max_failed_frac="
            f"{run.cfg.eval.max_failed_frac:g}); run the same command again to ask for what is "
            "missing or failed" + (f"; first reason: {reasons[0]}" if reasons else "")
        )
    return summary


def protocol(run: BenchmarkRun) -> dict[str, Any]:
    """Everything that decides the numbers; two runs with the same one may be mixed."""
    cfg = run.cfg
    return {
        "benchmark": run.benchmark.model_dump(
            mode="json", exclude={"title", "note", "file", "hub"}
        ),
        "problems": {"count": len(run.problems), "sha256": problems_digest(run.problems)},
        "model": dict(run.responder.identity),
        "seed": cfg.seed,
        "pictures": {
            "kind": cfg.eval.pictures,
            "min_pixels": cfg.data.min_pixels,
            "max_pixels": cfg.data.max_pixels,
        },
        "grading": {
            "mode": cfg.eval.grading,
            "judge": run.judge.settings if run.judge is not None else None,
        },
    }


def problems_digest(problems: Sequence[Problem]) -> str:
    """Digest of questions and gold answers, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(
            json.dumps(
                [problem.prompt.id, problem.prompt.messages, problem.golds], sort_keys=True
            ).encode()
        )
    return digest.hexdigest()[:16]


def write_problems(run: BenchmarkRun) -> None:
    """Questions, gold answers and pictures beside the ledger, for the page and for whoever reads
    the numbers later.
    """
    path = run.folder / "problems.jsonl"
    if path.exists():
        return
    lines = []
    for problem in run.problems:
        pictures = [_save_picture(source, run) for source in problem.prompt.images]
        line = {
            "id": problem.prompt.id,
            "question": problem.prompt.question,
            "images": pictures,
            "golds": list(problem.golds),
            "data_source": problem.prompt.data_source,
        }
        lines.append(json.dumps(line) + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    os.replace(temporary, path)


def _save_picture(source: Any, run: BenchmarkRun) -> str:
    try:
        image = open_image(source, run.roots, False)
    except ImageError as error:
        raise UserError(f"benchmark {run.benchmark.name}: {error}") from None
    name = (
        f"images/{hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()[:16]}.png"
    )
    target = run.folder / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        image.save(target)
    return name


# -- answers and verdicts --------------------------------------------------------------------------


def answer(run: BenchmarkRun, ledger: Ledger) -> None:
    """Store the responses that are missing, each part as soon as it is there, with the verdicts
    that rules alone can give.
    """
    missing = ledger.unanswered(run.samples)
    # answered before a kill, not yet graded
    grade_by_rules(run, ledger, ledger.ungraded(run.samples))
    done = len(run.samples) - len(missing)
    lost: list[Unanswered] = []
    for part in run.responder.respond(missing, run.by_id, run.benchmark):
        answers = [a for a in part if isinstance(a, Answer)]
        lost += [a for a in part if isinstance(a, Unanswered)]
        ledger.append(answers)
        grade_by_rules(run, ledger, [(a.problem, a.sample) for a in answers])
        before, done = done, done + len(answers)
        if done * PROGRESS // len(run.samples) > before * PROGRESS // len(run.samples):
            run.say(f"{run.benchmark.name}  {done}/{len(run.samples)} responses")
    if lost:
        run.say(
            f"{run.benchmark.name}: {len(lost)} requests were not answered, first: "
            f"{lost[0].problem}: {lost[0].reason}"
        )


def grade_by_rules(run: BenchmarkRun, ledger: Ledger, samples: Sequence[SampleKey]) -> None:
    """Verdicts of the training grader, where they are final."""
    if run.cfg.eval.grading not in ("rule", "rule_then_judge") or not samples:
        return
    waiting = [s for s in samples if s not in ledger.verdicts]
    verdicts = []
    for sample, rule in zip(waiting, rules(run, ledger, waiting), strict=True):
        if run.cfg.eval.grading == "rule" or rule.verdict == "correct":
            verdicts.append(
                Judgement(*sample, rule.verdict, rule.prediction, rule.reason, rule.verdict)
            )
    ledger.append(verdicts)


def rules(run: BenchmarkRun, ledger: Ledger, samples: Sequence[SampleKey]) -> list[Graded]:
    """What the training grader says of stored responses."""
    problems = run.by_id
    pairs = []
    for problem, sample in samples:
        golds = problems[problem].golds
        pairs.append(
            (golds if len(golds) > 1 else golds[0], ledger.answers[problem, sample].response)
        )
    return run.grader.grade(pairs)


def judge_rest(run: BenchmarkRun, ledger: Ledger) -> None:
    """Ask the judge for every verdict that is still missing or that it failed to give."""
    waiting = ledger.ungraded(run.samples)
    if run.judge is None or not waiting:
        return
    problems = run.by_id
    graded = dict(zip(waiting, rules(run, ledger, waiting), strict=True))
    items = [
        JudgeItem(
            problems[s[0]].prompt.question,
            " or ".join(problems[s[0]].golds),
            graded[s].prediction,
            ledger.answers[s].response[-TAIL:],
        )
        for s in waiting
    ]
    for index, said in run.judge.judge(items):
        sample = waiting[index]
        ledger.append([decide(sample, graded[sample], said, run.judge.settings)])


def decide(
    sample: SampleKey, rule: Graded, said: JudgeVerdict, settings: Mapping[str, Any]
) -> Judgement:
    """The verdict where a judge has been asked; a judge that failed to answer decides nothing."""
    judge = {"verdict": said.verdict, "reply": said.reply, "attempts": said.attempts, **settings}
    return Judgement(
        *sample,
        said.verdict,
        rule.prediction,
        said.reason,
        rule.verdict,
        judge,
        round(said.seconds, 3),
    )


# -- counting --------------------------------------------------------------------------------------


def summarise(run: BenchmarkRun, ledger: Ledger) -> dict[str, Any]:
    """The numbers, from what is stored. `accuracy` is null where more than `eval.max_failed_frac`
    of the answers have no verdict.
    """
    samples, k = run.samples, run.benchmark.num_samples
    answers = [ledger.answers[s] for s in samples if s in ledger.answers]
    verdicts = {s: ledger.verdicts[s] for s in samples if s in ledger.verdicts}
    counts = Counter(v.verdict for v in verdicts.values())
    counts["unjudged"] += len(answers) - len(verdicts)
    numbers = summarize([_scored(ledger, p.prompt.id, k) for p in run.problems])
    without = len(samples) - numbers.num_counted - counts["error"]
    scored = numbers.accuracy is not None and without <= run.cfg.eval.max_failed_frac * len(samples)
    accuracy = numbers.accuracy if scored else None
    summary: dict[str, Any] = {
        "benchmark": run.benchmark.name,
        "version": run.benchmark.version,
        "title": run.benchmark.title,
        "protocol": ledger.hash,
        "num_problems": len(run.problems),
        "num_samples": k,
        "temperature": run.benchmark.temperature,
        "accuracy": accuracy.value if accuracy else None,
        "accuracy_ci": [accuracy.low, accuracy.high] if accuracy else None,
        "pass_at_k": {str(n): e.value for n, e in numbers.pass_at.items()}
        if scored and k > 1
        else None,
        "maj_at_k": numbers.majority.value if scored and k > 1 and numbers.majority else None,
        "num_unanswered": len(samples) - len(answers),
        "verdicts": {name: counts[name] for name in get_args(FinalVerdict)},
        "extracted": numbers.extracted,
        "truncated": numbers.truncated,
        "mean_length": numbers.mean_length,
        "seconds": round(sum(a.seconds for a in answers), 1),
        "by_source": _by_source(run, ledger),
    }
    if run.judge is not None:
        said = [(v.rule, v.judge["verdict"]) for v in verdicts.values() if v.judge is not None]
        both = [rule == judge for rule, judge in said if rule in COUNTED and judge in COUNTED]
        summary["judge"] = run.judge.settings
        summary["agreement"] = sum(both) / len(both) if both else None
        summary["rule_accuracy"] = sum(v.rule == "correct" for v in verdicts.values()) / max(
            1, len(verdicts)
        )
    return summary


def _scored(ledger: Ledger, problem: str, k: int) -> list[Scored]:
    found = []
    for sample in ((problem, i) for i in range(k)):
        if (answer := ledger.answers.get(sample)) is not None:
            verdict = ledger.verdicts.get(sample)
            counted = verdict is not None and verdict.verdict in COUNTED
            correct = verdict.verdict == "correct" if verdict is not None and counted else None
            found.append(
                Scored(
                    correct,
                    verdict.prediction if verdict else "",
                    answer.finish_reason == "length",
                    answer.response_tokens,
                )
            )
    return found


def _by_source(run: BenchmarkRun, ledger: Ledger) -> dict[str, dict[str, float]]:
    sources: dict[str, list[list[bool]]] = {}
    for problem in run.problems:
        scored = _scored(ledger, problem.prompt.id, run.benchmark.num_samples)
        sources.setdefault(problem.prompt.data_source, []).append(
            [s.correct for s in scored if s.correct is not None]
        )
    found = {source: (len(lists), shares(lists)) for source, lists in sorted(sources.items())}
    return {
        s: {"accuracy": sum(values) / len(values), "num_problems": n}
        for s, (n, values) in found.items()
        if values
    }


def check_grading(cfg: Config) -> None:
    """Raises UserError for a grading that nobody could carry out."""
    if cfg.eval.grading != "rule" and cfg.eval.judge is None:
        raise UserError(
            f"eval.grading={cfg.eval.grading} needs a judge: set eval.judge, or --judge NAME "
            "(local, api, or a YAML file)"
        )
    if cfg.eval.grading == "rule" and cfg.eval.judge is not None:
        raise UserError(
            "eval.judge is set, but eval.grading=rule asks nobody: use rule_then_judge, judge or "
            "both"
        )
