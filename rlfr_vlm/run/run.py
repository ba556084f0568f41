"""A run's folder: what it writes, when it saves and evaluates, and how it resumes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlfr_vlm.batch import AttentionRecord, Collected, GradedGroup, Sample, TokenRecord
from rlfr_vlm.config import Config, to_yaml
from rlfr_vlm.data.render import PromptSource
from rlfr_vlm.errors import DiskFullError, Preempted, RolledBack, UserError
from rlfr_vlm.evaluation.heldout import HeldoutResult, evaluate_heldout
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import RolloutEngine, Sampler
from rlfr_vlm.rollout.spread import spread
from rlfr_vlm.run.records import (
    GroupFigures,
    batch_metrics,
    group_figures,
    over_updates,
    rollout_line,
    save_pictures,
)
from rlfr_vlm.run.rollout_files import write_rollouts
from rlfr_vlm.run.trackers import Trackers
from rlfr_vlm.run.watch import METRICS, Watch, keep_lines, read_lines
from rlfr_vlm.storage.checkpoint import PREFIX, commit_checkpoint, read_best, write_best
from rlfr_vlm.storage.resume import find_checkpoint
from rlfr_vlm.storage.state import environment, load_state, seed_generators, write_state
from rlfr_vlm.types import EncodedPrompt

MAX_UNSAVED = 2  # saves in a row that may fail for want of disk


class Run:
    """What happens in one output folder, which the command holds (storage/run_lock.py)."""

    def __init__(
        self,
        cfg: Config,
        grader: Grader,
        heldout: Sequence[EncodedPrompt] = (),
        console: Console | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Of several ranks the first one writes, all of them save."""
        self.cfg, self.grader, self.heldout, self.ranks = cfg, grader, heldout, ranks
        self.folder = Path(cfg.output_dir)
        if ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)  # the benchmark holds none
        self.console = console or Console(stderr=True, quiet=not ranks.first)
        # steps since the last checkpoint whose saves failed
        self._unsaved: dict[int, DiskFullError] = {}
        self._asked_to_stop = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._trackers: Trackers | None = None
        self.watch = Watch(cfg, self.folder, ranks, self.warn)
        self._progress: Progress | None = None  # on a terminal; elsewhere one line per step

    def close(self) -> None:
        """Write the last report and close the trackers."""
        self._report(last=True)
        signal.signal(signal.SIGTERM, self._previous_handler)
        if self._progress is not None:
            self._progress.stop()
        if self._trackers is not None:
            self._trackers.close(failed=sys.exception() is not None)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked_to_stop:  # asked twice: at once; whatever was committed stays good
            os._exit(75)
        self._asked_to_stop = True

    # -- resuming ----------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def restore(self, learner: Learner, prompts: PromptSource) -> int:
        """Go on from the newest good checkpoint. Returns its step, 0 for a fresh start. Raises
        UserError if it is another run's.
        """
        found, problem = None, None
        try:
            found = (
                find_checkpoint(self.cfg, self.checkpoints, prompts.rows, self.warn)
                if self.ranks.first
                else None
            )
        except UserError as error:
            problem = error
        self.ranks.agree(problem, "looking for a checkpoint")
        found = self.ranks.broadcast(found, "looking for a checkpoint")
        step = 0
        if found is not None:
            state = json.loads((found / "state.json").read_text())
            load_state(found, learner, prompts, state)
            step = state["step"]
            self.say(
                f"resumed from {found.name}"
                + (
                    ""
                    if state["ranks"] == self.ranks.size
                    else f", written by {state['ranks']} ranks"
                )
            )
        else:
            seed_generators(self.cfg.seed)
        self.watch.resume(step)
        if self.ranks.first:
            self._open_files(step)
        return step

    def _open_files(self, step: int) -> None:
        (self.folder / "config.resolved.yaml").write_text(to_yaml(self.cfg))
        (self.folder / "env.json").write_text(json.dumps(environment(), indent=1))
        self._trackers = trackers = Trackers(self.cfg, step, self.say, self.warn)
        self.watch.track = lambda at, event: trackers.event(at, event.monitor, event.line)
        if self.console.is_terminal:
            self._progress = progress_bar(self.console)
            self._progress.add_task("train", total=self.cfg.train.steps, completed=step, figures="")
            self._progress.start()

    def save(self, step: int, learner: Learner, prompts: PromptSource, must: bool = False) -> bool:
        """Commit a checkpoint of everything that decides the rest of the run; whether that worked.

        Where the disk has no room, training goes on: what was learned since the last checkpoint is
        lost if it stops, and may yet be saved if somebody frees some. Raises DiskFullError at the
        third such save in a row, or at once where it `must` be.
        """
        write = partial(write_state, cfg=self.cfg, step=step, learner=learner, prompts=prompts)
        try:
            commit_checkpoint(
                self.checkpoints, step, write, self.cfg.train.keep_checkpoints, self.ranks
            )
        except DiskFullError as error:
            self._unsaved[step] = error
            if must or len(self._unsaved) > MAX_UNSAVED:
                raise
            self.warn(
                f"{error}. Training goes on; it stops when {MAX_UNSAVED + 1} saves in a row fail, "
                f"and this is number {len(self._unsaved)}"
            )
            return False
        self._unsaved = {}
        # else the evaluation of this step comes next, and has more to show
        if not self.due(step, self.cfg.eval.every):
            self._report()
        return True

    def end(self) -> None:
        """After the last step, and after the model is exported: raises DiskFullError where its
        checkpoint could not be written.
        """
        if error := self._unsaved.get(self.cfg.train.steps):
            raise error

    def _report(self, last: bool = False) -> None:
        if self.report is not None and self.ranks.first:
            self.report(last, self._asked_to_stop)

    def owes_evaluation(self, step: int) -> bool:
        """Whether the evaluation after this step, the restored one, was lost to a kill."""
        if step == 0 or not self.due(step, self.cfg.eval.every):
            return False
        done = True
        if self.ranks.first:
            done = any(
                row["step"] == step and "val/score" in row
                for row in read_lines(self.folder / METRICS)
            )
            if not done:  # what there is of it is written again
                keep_lines(
                    self.folder / METRICS,
                    lambda row: (
                        row["step"] != step or not any(key.startswith("val/") for key in row)
                    ),
                )
        return not self.ranks.broadcast(done, "looking for an evaluation")

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0: never) is due; the last step counts."""
        return every > 0 and (step % every == 0 or step == self.cfg.train.steps)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What is not finite in this block is an event; a roll-back in a run that was asked to stop
        is its end: the way back is on record.
        """
        try:
            with self.watch.guard():
                yield
        except RolledBack as back:
            if any(self.ranks.gather(self._asked_to_stop, "rolling back")):
                raise Preempted(f"stopped on SIGTERM while rolling back: {back}") from back
            raise

    def stop_if_asked(self, step: int, learner: Learner, prompts: PromptSource) -> None:
        """After SIGTERM to any rank: save and raise Preempted."""
        if step < self.cfg.train.steps and any(
            self.ranks.gather(self._asked_to_stop, f"end of step {step}")
        ):
            if not self.due(step, self.cfg.train.save_steps) or step in self._unsaved:
                self.save(step, learner, prompts, must=True)
            raise Preempted(f"stopped at step {step} on SIGTERM; run the same command to go on")

    # -- writing -----------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """A line for the user."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """A line that deserves attention."""
        self.console.print(
            f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )

    def log(
        self,
        step: int,
        batch: Collected,
        samples: Sequence[Sample],
        results: Sequence[tuple[dict[str, float], list[TokenRecord]]],
        clock: dict[str, float],
        looks: AttentionRecord,
    ) -> None:
        """Metrics to metrics.jsonl and the trackers, some rollouts to rollouts/, one line to the
        terminal; of all ranks' shares.

        Raises StoppedError where a monitor stops the run, or takes it back.
        """
        records = [record for _, part in results for record in part]
        lines = self._rollout_lines(step, batch.kept, samples, records, looks)
        sizes = [len(part) for _, part in results]
        shares = self.ranks.gather(
            ([group_figures(g) for g in batch.sampled], sizes, lines), f"metrics of step {step}"
        )
        metrics, refrain = (
            ({}, "")
            if not self.ranks.first
            else self._write(step, batch.rounds, results, clock, shares)
        )
        self.watch.look(step, metrics, refrain)

    def _write(
        self,
        step: int,
        rounds: int,
        results: Sequence[tuple[dict[str, float], list[TokenRecord]]],
        clock: dict[str, float],
        shares: Sequence[tuple[list[GroupFigures], list[int], list[tuple[tuple[int, int], str]]]],
    ) -> tuple[dict[str, float], str]:
        """The step's metrics, written, and the 4-gram that repeats most in one of its responses."""
        sampled = sorted(
            (found for part, _, _ in shares for found in part), key=lambda found: found.position
        )
        metrics = batch_metrics(sampled)
        if self.cfg.rollout.max_rounds > 1:
            metrics["rollout/rounds"] = rounds
            metrics["rollout/num_prompts"] = len(sampled)
        sizes = [sum(column) for column in zip(*(part for _, part, _ in shares), strict=True)]
        metrics |= over_updates(
            [(figures, size) for (figures, _), size in zip(results, sizes, strict=True)]
        )
        metrics |= clock
        metrics["perf/tokens_per_s"] = (
            sum(sum(found.lengths) for found in sampled) / clock["timing_s/step"]
        )
        self.write_metrics(step, metrics)
        if self.cfg.train.log_rollouts:
            text = [
                line
                for _, line in sorted((key, line) for _, _, part in shares for key, line in part)
            ]
            write_rollouts(self.folder / "rollouts", step, text, self.cfg.train.rollout_format)
        figures = (
            f"reward {metrics['reward/mean']:.3f}  accuracy {metrics['reward/accuracy']:.3f}  "
            f"length {metrics['response_length/mean']:.1f}  {metrics['perf/tokens_per_s']:.0f} "
            "tokens/s"
        )
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, figures=figures)
        else:
            self.say(
                f"step {step}/{self.cfg.train.steps}  {figures}  {clock['timing_s/step']:.2f} s"
            )
        refrain, _ = max((found.refrain for found in sampled), key=lambda pair: pair[1])
        return metrics, "".join(self._token_text(token) for token in refrain)

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and the same to the trackers."""
        if not self.ranks.first:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._trackers is not None:
            self._trackers.write(step, metrics)

    # set by the command
    benchmarks: Callable[[Sampler, Path], dict[str, dict[str, Any]]] | None = None
    # likewise; writes report.html, told whether the run ends, and whether in a hurry
    report: Callable[[bool, bool], None] | None = None

    def evaluate(self, step: int, engine: RolloutEngine) -> float:
        """Accuracy on the held-out problems and on the benchmarks, written to eval/ and to the
        metrics. Returns their mean.

        The first rank evaluates, all of them sample.
        """
        if self.ranks.size > 1:
            with spread(engine, self.ranks) as every:
                score = 0.0 if every is None else self._evaluate(step, every)
            return self.ranks.broadcast(score, "score of an evaluation")
        return self._evaluate(step, engine)

    def _evaluate(self, step: int, engine: Sampler) -> float:
        scores = [self._evaluate_heldout(step, engine).accuracy] if self.heldout else []
        if self.benchmarks is not None:
            summaries = self.benchmarks(engine, self.folder / "eval" / f"step_{step:06d}")
            found = {
                f"val/{name}/accuracy": summary["accuracy"] for name, summary in summaries.items()
            }
            self.write_metrics(step, found)
            scores += found.values()
        self._report()
        return sum(scores) / len(scores)

    def keep_if_best(
        self, step: int, score: float, learner: Learner, prompts: PromptSource
    ) -> None:
        """The checkpoint with the best evaluation so far stays, whatever its age;
        `checkpoints/best.json` names it.

        Only then is the evaluation done: `val/score` in the metrics says so.
        """
        best = read_best(self.checkpoints)
        known = (
            best is not None and best["score"] >= score,
            (self.checkpoints / f"{PREFIX}{step}").exists(),
        )
        beaten, saved = self.ranks.broadcast(known, f"best checkpoint at step {step}")
        better = (
            not beaten
            and step not in self._unsaved
            and (saved or self.save(step, learner, prompts))
        )
        faultpoint("best")
        if better and self.ranks.first:
            write_best(self.checkpoints, step, score)
        self.write_metrics(step, {"val/score": score})

    def _evaluate_heldout(self, step: int, engine: Sampler) -> HeldoutResult:
        result = evaluate_heldout(
            self.cfg, engine, self.heldout, self.grader, step, self.folder / "eval"
        )
        self.write_metrics(
            step,
            {
                "val/accuracy": result.accuracy,
                "val/greedy": result.greedy,
                "val/response_length": result.mean_length,
            },
        )
        low, high = result.accuracy_ci
        self.say(
            f"step {step}  held-out accuracy {result.accuracy:.3f} ({low:.3f} to {high:.3f}), "
            f"greedy {result.greedy:.3f}, {result.num_problems} problems x {result.num_samples}"
        )
        return result

    def _rollout_lines(
        self,
        step: int,
        groups: Sequence[GradedGroup],
        samples: Sequence[Sample],
        records: Sequence[TokenRecord],
        looks: AttentionRecord,
    ) -> list[tuple[tuple[int, int], str]]:
        """Lines of rollouts/step_N.jsonl with their order, for the first groups of the step; their
        pictures are written here.
        """
        folder = self.folder / "rollouts" / "images"
        token_records = {id(s.rollout): record for s, record in zip(samples, records, strict=True)}
        positions = sorted(
            self.ranks.merge([g.position for g in groups], f"rollouts of step {step}")
        )
        shown = set(positions[: self.cfg.train.log_rollouts])
        lines = []
        for graded in groups:
            if graded.position in shown:
                folder.mkdir(parents=True, exist_ok=True)
                pictures = save_pictures(graded.group.prompt, folder)
                for rollout, outcome in zip(graded.group.rollouts, graded.outcomes, strict=True):
                    key = (graded.position, rollout.sample_index)
                    record, look = token_records.get(id(rollout)), looks.get(key)
                    line = rollout_line(
                        step, rollout, outcome, pictures, record, look, self._token_text
                    )
                    lines.append((key, json.dumps(line) + "\n"))
        return lines

    tokenizer: Any = None  # set by the command; decodes single tokens for the page

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])


def progress_bar(console: Console) -> Progress:
    """Steps done, the figures of the last one, time gone and left."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
