"""Evaluation over ranks: the first one drives, and every one samples its share of what it asks
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlfr_vlm.errors import UserError
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.types import EncodedPrompt, Rollout, RolloutGroup

PLACE = "sampling for an evaluation"


class SpreadEngine:
    """Samples with the engines of all ranks; the others serve meanwhile."""

    def __init__(self, engine: RolloutEngine, ranks: Ranks) -> None:
        self.engine, self.ranks, self.name = engine, ranks, engine.name
        self.failed = False  # all ranks know, and none is serving any more

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        """See RolloutEngine."""
        self.ranks.broadcast((list(prompts), sampling), PLACE)
        shares = self._share(prompts, sampling)
        found = {place: rollouts for share in shares for place, rollouts in share}
        return [
            RolloutGroup(prompt, tuple(Rollout(prompt, *fields) for fields in found[place]))
            for place, prompt in enumerate(prompts)
        ]

    def _share(self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig) -> list[Any]:
        """All ranks' responses, without their prompts."""
        places, problem, own = self.ranks.places(len(prompts)), None, []
        try:
            groups = self.engine.sample([prompts[place] for place in places], sampling)
            own = [
                (place, [_fields(r) for r in group.rollouts])
                for place, group in zip(places, groups, strict=True)
            ]
        except UserError as error:
            problem = error
        try:
            self.ranks.agree(problem, PLACE)
        except Exception:
            self.failed = True
            raise
        return self.ranks.gather(own, PLACE)

    def serve(self) -> None:
        """Sample for the first rank until it has finished."""
        while (asked := self.ranks.broadcast(None, PLACE)) is not None:
            self._share(*asked)


def _fields(rollout: Rollout) -> tuple[Any, ...]:
    return (
        rollout.sample_index,
        rollout.token_ids,
        rollout.logprobs,
        rollout.text,
        rollout.finish_reason,
        rollout.policy_version,
    )


@contextmanager
def spread(engine: RolloutEngine, ranks: Ranks) -> Iterator[SpreadEngine | None]:
    """On the first rank: an engine that samples with all ranks', for the length of the block. On
    the others None, after having served.
    """
    every = SpreadEngine(engine, ranks)
    if not ranks.first:
        every.serve()
        yield None
        return
    try:
        yield every
    finally:
        if not every.failed:
            ranks.broadcast(None, PLACE)
