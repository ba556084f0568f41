"""Fault points for the reliability tests: nothing happens unless RLFR_FAULT=name:nth:action is set."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

_reached: Counter[str] = Counter()


def faultpoint(name: str, file: Path | None = None) -> None:
    """Pass a named point. With RLFR_FAULT=name:nth:action, its nth passing sends the process SIGKILL (`kill`), SIGSTOP
    (`stop`) or SIGTERM (`term`), or raises (`raise`). file: what was written last; `tear` cuts it in half and then kills."""
    armed = os.environ.get("RLFR_FAULT")
    if not armed:
        return
    wanted, nth, action = armed.split(":")
    _reached[name] += 1
    if name != wanted or _reached[name] != int(nth):
        return
    if action == "tear" and file is not None:
        os.truncate(file, file.stat().st_size // 2)
        action = "kill"
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if action in signals:
        os.kill(os.getpid(), signals[action])
    elif action == "raise":
        raise RuntimeError(f"fault injected at {name}")
    else:
        raise ValueError(f"RLFR_FAULT: unknown action {action!r}")
