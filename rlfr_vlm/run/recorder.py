"""What a run's steps write: metrics.jsonl and the trackers, and the responses that are logged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rlfr_vlm.batch import AttentionRecord, Collected, GradedGroup, Sample, TokenRecord
from rlfr_vlm.config import Config
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.run.records import (
    GroupFigures,
    batch_metrics,
    group_figures,
    over_updates,
    rollout_line,
    save_pictures,
)
from rlfr_vlm.run.rollout_files import write_rollouts
from rlfr_vlm.run.terminal import Terminal
from rlfr_vlm.run.trackers import Trackers
from rlfr_vlm.run.watch import METRICS

Results = Sequence[tuple[dict[str, float], list[TokenRecord]]]  # of each update of a step
Lines = list[tuple[tuple[int, int], str]]  # (position of the group, sample), a row of rollouts/
Share = tuple[list[GroupFigures], list[int], Lines]  # of a rank


class Recorder:
    """Of several ranks the first one writes what all of them gather."""

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        ranks: Ranks,
        terminal: Terminal,
        decode: Callable[[int], str],
    ) -> None:
        """decode: the text of a single token."""
        self.cfg, self.folder, self.ranks, self.terminal = cfg, folder, ranks, terminal
        self.decode = decode
        self.trackers: Trackers | None = None  # opened when the run knows where it goes on

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and the same to the trackers."""
        if not self.ranks.first:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.trackers is not None:
            self.trackers.write(step, metrics)

    def step(
        self,
        step: int,
        batch: Collected,
        samples: Sequence[Sample],
        results: Results,
        clock: dict[str, float],
        attention: AttentionRecord,
    ) -> tuple[dict[str, float], str]:
        """Metrics, some rollouts, one line to the terminal; of all ranks' shares.

        Returns, on the first rank, the metrics and the 4-gram that repeats most in a response.
        """
        records = [record for _, part in results for record in part]
        lines = self._rollout_lines(step, batch.kept, samples, records, attention)
        own = ([group_figures(g) for g in batch.sampled], [len(part) for _, part in results], lines)
        shares = self.ranks.gather(own, f"metrics of step {step}")
        if not self.ranks.first:
            return {}, ""
        sampled = sorted(
            (found for part, _, _ in shares for found in part), key=lambda found: found.position
        )
        metrics = self._metrics(sampled, batch.rounds, results, clock, shares)
        self.write_metrics(step, metrics)
        if self.cfg.train.log_rollouts:
            rows = [line for _, line in sorted(row for _, _, part in shares for row in part)]
            write_rollouts(self.folder / "rollouts", step, rows, self.cfg.train.rollout_format)
        shown = (
            f"reward {metrics['reward/mean']:.3f}  accuracy {metrics['reward/accuracy']:.3f}  "
            f"length {metrics['response_length/mean']:.1f}  "
            f"{metrics['perf/tokens_per_s']:.0f} tokens/s"
        )
        self.terminal.step(step, self.cfg.train.steps, shown, clock["timing_s/step"])
        refrain, _ = max((found.refrain for found in sampled), key=lambda pair: pair[1])
        return metrics, "".join(map(self.decode, refrain))

    def _metrics(
        self,
        sampled: Sequence[GroupFigures],
        rounds: int,
        results: Results,
        clock: dict[str, float],
        shares: Sequence[Share],
    ) -> dict[str, float]:
        metrics = batch_metrics(sampled)
        if self.cfg.rollout.max_rounds > 1:
            metrics["rollout/rounds"] = rounds
            metrics["rollout/num_prompts"] = len(sampled)
        sizes = [sum(column) for column in zip(*(part for _, part, _ in shares), strict=True)]
        metrics |= over_updates(
            [(found, size) for (found, _), size in zip(results, sizes, strict=True)]
        )
        metrics |= clock
        tokens = sum(sum(found.lengths) for found in sampled)
        return metrics | {"perf/tokens_per_s": tokens / clock["timing_s/step"]}

    def _rollout_lines(
        self,
        step: int,
        groups: Sequence[GradedGroup],
        samples: Sequence[Sample],
        records: Sequence[TokenRecord],
        attention: AttentionRecord,
    ) -> Lines:
        """Rows of rollouts/step_N.jsonl with their order, for the first groups of the step; their
        pictures are written here.
        """
        folder = self.folder / "rollouts" / "images"
        of_tokens = {id(s.rollout): record for s, record in zip(samples, records, strict=True)}
        own = [g.position for g in groups]
        positions = sorted(self.ranks.merge(own, f"rollouts of step {step}"))
        shown = set(positions[: self.cfg.train.log_rollouts])
        lines: Lines = []
        for graded in (g for g in groups if g.position in shown):
            folder.mkdir(parents=True, exist_ok=True)
            pictures = save_pictures(graded.group.prompt, folder)
            for rollout, outcome in zip(graded.group.rollouts, graded.outcomes, strict=True):
                key = (graded.position, rollout.sample_index)
                record, look = of_tokens.get(id(rollout)), attention.get(key)
                row = rollout_line(step, rollout, outcome, pictures, record, look, self.decode)
                lines.append((key, json.dumps(row) + "\n"))
        return lines
