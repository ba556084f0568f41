"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(name: str, clock: dict[str, float] | None = None) -> Iterator[dict[str, float]]:
    """Add the seconds of the block to `timing_s/name`, in the clock given or in a new one that is
    yielded.
    """
    clock = {} if clock is None else clock
    start = _now()
    yield clock
    clock[f"timing_s/{name}"] = clock.get(f"timing_s/{name}", 0.0) + _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        # kernels run behind: without this their time falls to whoever waits for them
        torch.cuda.synchronize()
    return time.perf_counter()
