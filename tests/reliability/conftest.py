"""Figures of the reliability tests: what each line of the contract (docs/reliability.md) was
measured at.
"""

import json
import os
import time
from pathlib import Path

import pytest

from tests.reliability.forks import Forks

# file that figures are appended to, as JSON lines; unset: they are only printed
RESULTS = "RLFR_RELIABILITY_RESULTS"


@pytest.fixture
def figure(request):
    """`figure("R5", "310 of 310 corruptions detected and named")`, after the assertions that hold
    it: the line of the results' table.
    """
    start = time.perf_counter()

    def record(number: str, text: str) -> None:
        line = {
            "id": number,
            "figure": text,
            "test": request.node.nodeid,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(line))
        if path := os.environ.get(RESULTS):
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")

    return record


@pytest.fixture(scope="session")
def forks():
    """Starts the command line many times."""
    with Forks() as found:
        yield found
