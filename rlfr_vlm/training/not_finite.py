"""What is not finite in a step, and the responses to blame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlfr_vlm.batch import Credit, Sample, Scores
from rlfr_vlm.errors import NonFiniteError
from rlfr_vlm.types import Outcome, PolicyOutput, Rollout, RolloutGroup

NAMED = 8  # responses in a message
TOO_FAST = "the field or the policy's latents are broken; lower flow.online.lr"


def check_rollouts(groups: Sequence[RolloutGroup], outcomes: Sequence[Outcome]) -> None:
    """Raises NonFiniteError naming the responses whose log-probs by the engine, or rewards, are not
    finite: weights may be, or a reward.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if unsure := [rollout for rollout in rollouts if not all(map(math.isfinite, rollout.logprobs))]:
        raise blame("the engine's log-probs", unsure)
    if wrong := [
        rollout
        for rollout, outcome in zip(rollouts, outcomes, strict=True)
        if not math.isfinite(outcome.reward)
    ]:
        raise blame("the rewards", wrong)


def blame(what: str, rollouts: Sequence[Rollout]) -> NonFiniteError:
    """What to say of responses, as PROMPT#SAMPLE."""
    named = [f"{rollout.prompt.prompt.id}#{rollout.sample_index}" for rollout in rollouts]
    more = f" and {len(named) - NAMED} more" * (len(named) > NAMED)
    return NonFiniteError(
        f"not finite: {what} of response{'s' * (len(named) > 1)} {', '.join(named[:NAMED])}{more}"
    )


def in_microbatch(
    output: PolicyOutput, scores: Scores, credit: Credit, samples: Sequence[Sample], loss: Tensor
) -> NonFiniteError | None:
    """The first column of a micro-batch, in the order in which they come to be, that is not finite,
    and the responses to blame.
    """
    columns = {
        "the log-probs": output.logprobs.detach(),
        "the old log-probs": scores.logprobs,
        "the reference's log-probs": scores.ref_logprobs,
        "the values": scores.values,
        f"the deviations from the flow ({TOO_FAST})": scores.straying,
        "the token rewards": credit.token_rewards,
        "the advantages": credit.advantages,
        "the returns": credit.returns,
    }
    present = {what: column for what, column in columns.items() if column is not None}
    good = torch.stack(
        [*(column.isfinite().all() for column in present.values()), loss.isfinite()]
    ).tolist()
    if all(good):
        return None
    for (what, column), fine in zip(present.items(), good, strict=False):
        if not fine:
            parts = column.split([s.length for s in samples])
            return blame(
                what,
                [
                    s.rollout
                    for s, part in zip(samples, parts, strict=True)
                    if not bool(part.isfinite().all())
                ],
            )
    return blame("the policy loss", [s.rollout for s in samples])
