"""Fault points for the reliability tests: nothing happens unless RLFR_FAULT=name:nth:action is
set.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

_reached: Counter[str] = Counter()

T = TypeVar("T")


def faultpoint(name: str, file: Path | None = None) -> None:
    """Pass a named point. With RLFR_FAULT=name:nth:action, its nth passing sends the process
    SIGKILL (`kill`), SIGSTOP (`stop`) or SIGTERM (`term`), or raises (`raise`). file: what was
    written last; `tear` cuts it in half and then kills.
    """
    action = _due(name)
    if action is None:
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


def poison(name: str, value: T) -> T:
    """A float or a tensor as it is; at its nth passing with RLFR_FAULT=name:nth:nan (`inf`, `-inf`)
    a tensor's first element, in a copy,
    is that. Passings are counted by name: no fault point may share it.
    """
    action = _due(name)
    if action is None:
        return value
    spoilt: Any = value
    if isinstance(value, float):
        return spoilt * 0 + float(action)
    spoilt = spoilt.clone()
    spoilt.view(-1)[0] = float(action)
    return spoilt  # type: ignore[no-any-return]


def _due(name: str) -> str | None:
    """What is to happen at this passing. RLFR_FAULT may name several faults, with commas in
    between; one with a file at its end, name:nth:action:file, happens once for all processes that
    know this file, whichever comes first.
    """
    armed = os.environ.get("RLFR_FAULT")
    if not armed:
        return None
    _reached[name] += 1
    for fault in armed.split(","):
        wanted, nth, action, *once = fault.split(":")
        if name == wanted and _reached[name] == int(nth) and (not once or _first(Path(once[0]))):
            return action
    return None


def _first(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
