"""What several verbs are built from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from rlfr_vlm.config import Config
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.rollout.engine import RolloutEngine

console = Console(stderr=True)


def say(message: str) -> None:
    """A line for the user."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Workbench:
    """The parts that every verb needs."""

    cfg: Config
    policy: Policy
    grader: Grader
    engine: RolloutEngine
    learner: Learner | None = None  # none: made when training starts


@contextmanager
def workbench(cfg: Config) -> Iterator[Workbench]:
    """Load the policy, start grader and engine; stop them afterwards."""
    policy = Policy(cfg.model)
    with Grader(cfg.reward.grader, cfg.reward.answer) as grader:
        engine = make_engine(cfg, policy)
        try:
            yield Workbench(cfg, policy, grader, engine)
        finally:
            engine.close()
