"""Fault points for the reliability tests: nothing happens unless RLFR_FAULT=name:nth:action is set."""

from __future__ import annotations

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def faultpoint(name: str) -> None:
    """Pass a named point. With RLFR_FAULT=name:nth:action, its nth passing kills the process (`kill`), stops it (`stop`) or raises (`raise`)."""
    armed = os.environ.get("RLFR_FAULT")
    if not armed:
        return
    wanted, nth, action = armed.split(":")
    _reached[name] += 1
    if name != wanted or _reached[name] != int(nth):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise RuntimeError(f"fault injected at {name}")
    else:
        raise ValueError(f"RLFR_FAULT: unknown action {action!r}")
