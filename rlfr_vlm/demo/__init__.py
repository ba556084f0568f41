"""The demo: two small data sets, the model that learns from one of them, and the verb that runs it.

Everything it needs lies in this folder, so that it runs from an installed package in any folder.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path("runs/demo_data")  # of the folder it is started in


def recipe(task: str) -> Path:
    """The config of a demo, `vision` or `text`."""
    return Path(__file__).parent / f"{task}.yaml"
