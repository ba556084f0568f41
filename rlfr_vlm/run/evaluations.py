"""Evaluations during a run: held-out problems and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config
from rlfr_vlm.evaluation.heldout import evaluate_heldout
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import RolloutEngine, Sampler
from rlfr_vlm.rollout.spread import spread
from rlfr_vlm.run.recorder import Recorder
from rlfr_vlm.types import EncodedPrompt

Benchmarks = Callable[[Sampler, Path, Callable[[str], None]], dict[str, dict[str, Any]]]


class Evaluations:
    """The first rank evaluates, all of them sample."""

    def __init__(
        self,
        cfg: Config,
        grader: Grader,
        recorder: Recorder,
        heldout: Sequence[EncodedPrompt] = (),
        benchmarks: Benchmarks | None = None,
    ) -> None:
        """benchmarks: runs them with an engine, into a folder, saying lines; returns summaries."""
        self.cfg, self.grader, self.recorder = cfg, grader, recorder
        self.heldout, self.benchmarks = heldout, benchmarks
        self.folder = recorder.folder / "eval"

    def run(self, step: int, engine: RolloutEngine, ranks: Ranks) -> float:
        """Accuracy on the held-out problems and on the benchmarks, written to eval/ and to the
        metrics. Returns their mean.
        """
        if ranks.size == 1:
            return self._run(step, engine)
        with spread(engine, ranks) as every:
            score = 0.0 if every is None else self._run(step, every)
        return ranks.broadcast(score, "score of an evaluation")

    def _run(self, step: int, engine: Sampler) -> float:
        scores = [self._heldout(step, engine)] if self.heldout else []
        if self.benchmarks is not None:
            folder = self.folder / f"step_{step:06d}"
            summaries = self.benchmarks(engine, folder, self.recorder.terminal.say)
            found = {f"val/{name}/accuracy": each["accuracy"] for name, each in summaries.items()}
            self.recorder.write_metrics(step, found)
            scores += found.values()
        return sum(scores) / len(scores)

    def _heldout(self, step: int, engine: Sampler) -> float:
        result = evaluate_heldout(self.cfg, engine, self.heldout, self.grader, step, self.folder)
        found = {
            "val/accuracy": result.accuracy,
            "val/greedy": result.greedy,
            "val/response_length": result.mean_length,
        }
        self.recorder.write_metrics(step, found)
        low, high = result.accuracy_ci
        self.recorder.terminal.say(
            f"step {step}  held-out accuracy {result.accuracy:.3f} ({low:.3f} to {high:.3f}), "
            f"greedy {result.greedy:.3f}, {result.num_problems} problems x {result.num_samples}"
        )
        return result.accuracy
