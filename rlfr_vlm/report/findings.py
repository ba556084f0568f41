"""What the page says beyond the files as they are: events, the flow's health and tokens,
latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rlfr_vlm.report.events import EventData, EventLog, read_events
from rlfr_vlm.report.flow_health import FlowHealth, FlowHealthData, flow_health
from rlfr_vlm.report.flow_tokens import TokenCensus, TokenWindow
from rlfr_vlm.report.latents import (
    LatentCensus,
    LatentData,
    LatentPoints,
    LatentView,
    NoLatents,
    latent_view,
)
from rlfr_vlm.report.reading import FileNote
from rlfr_vlm.report.rollout_data import RolloutData, pack_rollouts
from rlfr_vlm.report.run_files import Metrics, RunFiles
from rlfr_vlm.report.template import compress, json_text, text_block


class FlowData(FlowHealthData):
    """The view of the flow without its tokens, as the page reads it."""

    hasTokens: bool
    approximate: bool


class FindingsData(TypedDict):
    """What the page needs at once."""

    events: EventData
    flow: FlowData
    latents: LatentData | NoLatents


@dataclass(frozen=True)
class Findings:
    """All of it."""

    events: EventLog
    health: FlowHealth
    tokens: list[TokenWindow]
    tokens_approximate: bool
    latents: LatentView | None
    no_latents: str  # why

    def for_page(self) -> FindingsData:
        """What the page needs at once, as JSON."""
        return {
            "events": self.events.for_page(),
            "flow": {
                **self.health.for_page(),
                "hasTokens": bool(self.tokens),
                "approximate": self.tokens_approximate,
            },
            "latents": self.latents.for_page() if self.latents else {"missing": self.no_latents},
        }

    def blocks(self) -> list[str]:
        """What the page unpacks when a view is opened."""
        found: dict[str, list[TokenWindow] | list[LatentPoints]] = {
            "flow-tokens": self.tokens,
            "latent-points": [self.latents.points] if self.latents else [],
        }
        return [
            text_block(name, compress([json_text(part) for part in parts]))
            for name, parts in found.items()
            if parts
        ]

    @property
    def latent_curves(self) -> Metrics:
        """Figures of the latents by step."""
        return self.latents.curves if self.latents else Metrics(series={})


def examine(
    folder: Path, run: RunFiles, budget: int, problems: list[FileNote]
) -> tuple[RolloutData, Findings]:
    """Read the run's rollouts once: those that the page carries, in `budget` bytes, and what all of
    them say.
    """
    steps = [file.step for file in run.rollout_files]
    tokens, latents = TokenCensus(steps), LatentCensus(steps)
    rollouts = pack_rollouts(folder, run.rollout_files, budget, problems, (tokens.add, latents.add))
    view = latent_view(latents, problems)
    return rollouts, Findings(
        events=read_events(folder, problems),
        health=flow_health(run.metrics, run.config, run.yardstick),
        tokens=tokens.for_page(),
        tokens_approximate=tokens.approximate,
        latents=view,
        no_latents=_no_latents(run, latents),
    )


def _no_latents(run: RunFiles, latents: LatentCensus) -> str:
    if not run.rollout_files:
        return (
            "No rollouts yet: the folder rollouts/ is missing or empty, or train.log_rollouts is 0."
        )
    if latents.rows:
        return "Nothing to draw: the latents of all responses are equal."
    return "No latents: this run has no flow section, or was written by an earlier version."
