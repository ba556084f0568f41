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

from rlfr_vlm.batch import AttentionRecord, Collected, Sample
from rlfr_vlm.config import Config, to_yaml
from rlfr_vlm.data.stream import PromptSource
from rlfr_vlm.errors import DiskFullError, Preempted, RolledBack, UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import RolloutEngine
from rlfr_vlm.run.evaluations import Benchmarks, Evaluations
from rlfr_vlm.run.recorder import Recorder, Results
from rlfr_vlm.run.terminal import Terminal
from rlfr_vlm.run.trackers import Trackers
from rlfr_vlm.run.watch import METRICS, Watch, keep_lines, read_lines
from rlfr_vlm.storage.checkpoint import PREFIX, commit_checkpoint, read_best, write_best
from rlfr_vlm.storage.resume import find_checkpoint
from rlfr_vlm.storage.state import environment, load_state, seed_generators, write_state
from rlfr_vlm.types import EncodedPrompt

MAX_UNSAVED = 2  # saves in a row that may fail for want of disk

ReportWriter = Callable[[bool, bool], None]  # told whether the run ends, and whether in a hurry


class Run:
    """What happens in one output folder, which the command holds (storage/run_lock.py)."""

    def __init__(
        self,
        cfg: Config,
        grader: Grader,
        heldout: Sequence[EncodedPrompt] = (),
        ranks: Ranks = ALONE,
        decode: Callable[[int], str] = str,
        benchmarks: Benchmarks | None = None,
        report: Callable[[Path, Callable[[str], None]], ReportWriter] | None = None,
    ) -> None:
        """Of several ranks the first one writes, all of them save.

        decode: the text of a single token. report: makes, for the folder and a way to warn, what
            writes the page.
        """
        self.cfg, self.ranks = cfg, ranks
        self.folder = Path(cfg.output_dir)
        if ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)  # the benchmark holds none
        self.terminal = Terminal(quiet=not ranks.first)
        self.recorder = Recorder(cfg, self.folder, ranks, self.terminal, decode)
        self.evaluations = Evaluations(cfg, grader, self.recorder, heldout, benchmarks)
        self.watch = Watch(cfg, self.folder, ranks, self.terminal.warn)
        self._write_report = report(self.folder, self.terminal.warn) if report else None
        # steps since the last checkpoint whose saves failed
        self._unsaved: dict[int, DiskFullError] = {}
        self._asked_to_stop = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def close(self) -> None:
        """Write the last report and close the trackers."""
        self._report(last=True)
        signal.signal(signal.SIGTERM, self._previous_handler)
        self.terminal.close()
        if self.recorder.trackers is not None:
            self.recorder.trackers.close(failed=sys.exception() is not None)

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
                find_checkpoint(self.cfg, self.checkpoints, prompts.rows, self.terminal.warn)
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
            self.terminal.say(
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
        trackers = Trackers(self.cfg, step, self.terminal.say, self.terminal.warn)
        self.recorder.trackers = trackers
        self.watch.track = lambda at, event: trackers.event(at, event.monitor, event.line)
        self.terminal.start(step, self.cfg.train.steps)

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
            self.terminal.warn(
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
        if self._write_report is not None and self.ranks.first:
            self._write_report(last, self._asked_to_stop)

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

    # -- steps and evaluations -----------------------------------------------------------------

    def log(
        self,
        step: int,
        batch: Collected,
        samples: Sequence[Sample],
        results: Results,
        clock: dict[str, float],
        attention: AttentionRecord,
    ) -> None:
        """Put a step on record. Raises StoppedError where a monitor stops the run, or takes it
        back.
        """
        metrics, refrain = self.recorder.step(step, batch, samples, results, clock, attention)
        self.watch.look(step, metrics, refrain)

    def evaluate(self, step: int, engine: RolloutEngine) -> float:
        """The policy as it is, on the held-out problems and the benchmarks. Returns the mean."""
        score = self.evaluations.run(step, engine, self.ranks)
        self._report()
        return score

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
        self.recorder.write_metrics(step, {"val/score": score})
