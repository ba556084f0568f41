"""What a library that takes the process for its own must not change."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Leave the global random generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Importing and starting vLLM changes the process: put back what the trainer and its
    subprocesses rely on.

    Generators, the number of threads (and torch.set_num_threads itself, which vLLM disables on
    CPU), default dtype, signal handlers and the environment (LD_PRELOAD, LOCAL_WORLD_SIZE,
    inductor's settings, ...), of which only vLLM's own variables stay.
    """
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    main = threading.current_thread() is threading.main_thread()
    handlers = (
        {number: signal.getsignal(number) for number in signal.valid_signals()} if main else {}
    )
    with undisturbed_generators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
            for key in set(os.environ) | set(environment):
                if not key.startswith("VLLM_") and os.environ.get(key) != environment.get(key):
                    if key in environment:
                        os.environ[key] = environment[key]
                    else:
                        del os.environ[key]
