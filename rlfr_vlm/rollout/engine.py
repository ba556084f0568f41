"""What every rollout engine can do, and which one a config asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rlfr_vlm.types import EncodedPrompt, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one batch of responses is sampled: no top-k, no penalty; training also leaves the nucleus
    at the full distribution.
    """

    group_size: int  # responses per prompt, G
    temperature: float  # 0: greedy; log-probs are then those at temperature 1
    max_new_tokens: int
    # strings that end a response, besides EOS; the tokens that complete one are kept
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # sample on through EOS
    # nucleus (evaluation); log-probs stay those of the full distribution with transformers, vLLM's
    # are of the nucleus
    top_p: float = 1.0
    # index of the first of the G responses: which of a problem's samples these are
    first_sample: int = 0
    # the request's seed is request_seed(*seed_key, prompt id, sample index)
    seed_key: tuple[int | str, ...]


def sample_indices(sampling: SamplingConfig) -> range:
    """Indices of the responses asked for."""
    return range(sampling.first_sample, sampling.first_sample + sampling.group_size)


class Sampler(Protocol):
    """What evaluation needs of an engine."""

    name: str

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        """`group_size` responses to each prompt, in the order of the prompts."""
        ...


class RolloutEngine(Sampler, Protocol):
    """Samples responses of the policy."""

    def load_weights(self, policy: Any) -> None:
        """Sample from exactly these weights from now on. Raises StoppedError when that cannot be
        proven.

        Where the policy's weights are sharded, all ranks must call it together.
        """
        ...

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Copy a part of the weights, by their names in Policy.weight_specs, and prove that it
        arrived; `finish_load` ends the load.

        Weights that an engine stacks (q, k and v; gate and up) must come in one bucket. Raises
        StoppedError naming the tensor that is unknown, of another shape, or differs afterwards.
        """
        ...

    def finish_load(self, version: int) -> None:
        """All buckets were given: forget what was computed with older weights; rollouts are of this
        version of the policy from now on.

        Raises StoppedError naming a tensor that has not come since the last load was finished.
        """
        ...

    def sleep(self) -> None:
        """Give back what memory it can until the next load; nothing is sampled meanwhile."""
        ...

    def close(self) -> None:
        """Give back memory and processes. The engine is of no use afterwards."""
        ...
