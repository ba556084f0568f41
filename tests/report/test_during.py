"""The report of a run that is still training: at what price it is written, and that no failure of
it is one of the run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlfr_vlm.config import parse_config
from rlfr_vlm.ranks import Ranks
from rlfr_vlm.report import during
from rlfr_vlm.report.during import REST, ReportKeeper
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.run.run import Run
from tests.report.test_report import make_run, page_data
from tests.runs import cli, make_config, make_data
from tests.tiny_models import tiny_qwen2_5_vl


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_takes_less_than_a_fiftieth_of_the_time_whatever_a_page_costs(tmp_path, monkeypatch):
    """Called every second for ten hours; a page takes ever longer, as a run's pages do."""
    clock, spent = Clock(), []

    def write(folder: Path) -> None:
        spent.append(0.5 + 0.002 * len(spent) + clock.now / 10_000)
        clock.now += spent[-1]

    monkeypatch.setattr(during, "write_report", write)
    keeper = ReportKeeper(tmp_path, pytest.fail, clock)
    while clock.now < 36_000:
        keeper()
        clock.now += 1
    assert sum(spent) / clock.now < 1 / 50
    assert sum(spent) / clock.now > 1 / (2 * REST)  # and is not idle either
    last = len(spent)
    keeper()
    assert len(spent) == last
    keeper(last=True)
    assert len(spent) == last + 1


@pytest.mark.parametrize(("took", "num"), [(1.0, 2), (40.0, 1)])
def test_a_page_that_takes_long_is_not_written_between_sigterm_and_sigkill(
    tmp_path, monkeypatch, took, num
):
    clock, written = Clock(), []

    def write(folder: Path) -> None:
        written.append(clock.now)
        clock.now += took

    monkeypatch.setattr(during, "write_report", write)
    keeper = ReportKeeper(tmp_path, pytest.fail, clock)
    keeper()
    keeper(last=True, hurried=True)
    assert len(written) == num


def test_a_report_that_fails_is_said_once_and_is_no_failure_of_the_run(tmp_path):
    said: list[str] = []
    keeper = ReportKeeper(tmp_path / "gone", said.append)
    keeper()
    keeper(last=True)
    assert said == [
        f"report.html was not written: there is no run folder {tmp_path}/gone; the run goes on "
        "without it"
    ]
    run = make_run(tmp_path / "run", steps=2)
    (run / "report.html").mkdir()
    keeper = ReportKeeper(run, said.append)
    keeper(last=True)
    assert "report.html cannot be written: Is a directory" in said[1]
    (run / "report.html").rmdir()
    keeper(last=True)
    assert page_data(run / "report.html")["overview"]["numSteps"] == 2
    assert len(said) == 2


def test_only_the_first_rank_writes_and_the_last_word_is_always_written(tmp_path):
    cfg = parse_config({"output_dir": str(tmp_path), "model": {"path": "m"}})
    calls: list[tuple[int, bool]] = []
    with Grader(cfg.reward.grader, "text") as grader:
        for rank in (1, 0):
            write = lambda last, hurried, rank=rank: calls.append((rank, last))  # noqa: E731
            run = Run(cfg, grader, ranks=Ranks(rank), report=lambda *_, write=write: write)
            run.close()
    assert calls == [(0, True)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of four steps that evaluates and saves at every second one."""

    def make(**sections) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        make_data(folder)
        model = tiny_qwen2_5_vl(folder / "model")
        return make_config(folder, str(model), **{"flow": None, "eval": {"every": 2}, **sections})

    return make


def status(config: Path) -> tuple[str, int]:
    """What the page that training wrote says: how far the run came, and evaluations."""
    page = config.parent / "run" / "report.html"
    data = page_data(page)["overview"]
    assert (
        "connect-src"
        not in re.search(
            r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.read_text()
        )[1]
    )
    return data["status"], len(data["evaluations"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        (None, 0, ("finished, 4 steps", 2)),
        ("reward:3:raise", 1, ("step 2 of 4", 1)),
        ("reward:3:term", 75, ("step 3 of 4", 1)),
    ],
)
def test_training_leaves_a_report_however_it_ends(config, fault, code, expected):
    made = config()
    done = cli("train", "--config", str(made), fault=fault)
    assert done.returncode == code, done.stderr[-3000:]
    assert status(made) == expected
    if fault is None:
        return
    assert cli("train", "--config", str(made)).returncode == 0  # and again on resuming
    assert status(made) == ("finished, 4 steps", 2)


@pytest.mark.slow
def test_a_page_that_cannot_be_written_stops_no_run(config):
    made = config()
    (made.parent / "run/report.html").mkdir(parents=True)
    done = cli("train", "--config", str(made))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("report.html was not written") == 1
    steps = [
        json.loads(line)["step"]
        for line in (made.parent / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == 4


@pytest.mark.slow
def test_a_page_is_there_before_the_run_ends(config):
    """Killed at once in the third step: what is there was written by the evaluation and the
    checkpoint of the second.
    """
    made = config()
    assert cli("train", "--config", str(made), fault="reward:3:kill").returncode == -9
    assert status(made) == ("step 2 of 4", 1)
