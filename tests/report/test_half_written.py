"""Runs that are missing, empty, cut by a kill, damaged or out of reach: a page that shows what
there is and names what is not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlfr_vlm.cli import main
from rlfr_vlm.errors import UserError
from rlfr_vlm.report import reading
from rlfr_vlm.report.comparison_page import write_comparison
from rlfr_vlm.report.findings import examine
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.run_files import read_run
from rlfr_vlm.run.rollout_files import write_rollouts
from tests.report.browser import needs_browser
from tests.report.test_report import make_run, page_data, write_jsonl

EVENT = {
    "step": 2,
    "since": 1,
    "monitor": "repetition",
    "action": "warn",
    "value": 0.6,
    "limit": 0.3,
    "what": "w",
    "cause": "",
    "do": "d",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with every file that the contract names."""
    run = make_run(tmp_path_factory.mktemp("runs") / "whole", steps=3)
    write_jsonl(run / "events.jsonl", [EVENT])
    write_jsonl(run / "rolled_back.jsonl", [{"step": 3, "roll_back": 1, "reward/mean": 0.1}])
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def problems(path: Path) -> dict[str, str]:
    """What the page says of each file."""
    found: dict[str, str] = {}
    for problem in page_data(path)["overview"]["problems"]:
        found[problem["file"]] = f"{found.get(problem['file'], '')} {problem['text']}"
    return found


# Missing.


def test_a_missing_folder_is_named_with_those_of_nearly_its_name(tmp_path, capsys):
    for name in ("grpo_seed0", "grpo_seed1", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as error:
        write_report(tmp_path / "grpo_sed0")
    text = str(error.value)
    assert text.startswith(
        f"there is no run folder {tmp_path}/grpo_sed0; did you mean {tmp_path}/grpo_seed0"
    )
    assert "other" not in text
    for arguments in (
        ["report", str(tmp_path / "nothing/like/it")],
        ["report", str(tmp_path / "other"), str(tmp_path / "grpo_seed")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"nor a folder {tmp_path}/nothing/like that it could be in" in said
    assert f"did you mean {tmp_path}/grpo_seed" in said


def test_a_file_and_a_name_that_cannot_be_one_are_user_errors(run):
    with pytest.raises(UserError, match="is a file; name the run's folder"):
        write_report(run / "metrics.jsonl")
    with pytest.raises(UserError, match="File name too long"):
        write_report(Path("x" * 5000))


def test_a_page_that_cannot_be_written_is_a_user_error(run, tmp_path):
    (run / "report.html").mkdir()
    with pytest.raises(
        UserError,
        match=r"report\.html cannot be written: Is a directory; --out FILE puts it elsewhere",
    ):
        write_report(run)
    assert write_report(run, tmp_path / "page.html").stat().st_size > 1e6
    assert not list(run.glob("*.tmp"))
    with pytest.raises(UserError, match="there is no folder"):
        write_report(run, tmp_path / "none" / "page.html")
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_report(run, tmp_path)


# Empty, or nothing of a run.


def test_an_empty_folder_and_one_that_is_no_run_say_so(tmp_path):
    (tmp_path / "empty").mkdir()
    found = problems(write_report(tmp_path / "empty"))
    assert found.pop("empty") == " an empty folder; if a run is to write here, it has not started"
    assert found.keys() == {
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "eval",
        "rollouts",
    }
    assert (
        found["metrics.jsonl"]
        == " no curves; the run has not finished its first step, or this is no run folder"
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    assert (
        problems(write_report(tmp_path / "thesis"))["thesis"]
        == " no run folder: nothing that training writes is in it"
    )
    make_run(tmp_path / "runs/first", steps=1)
    make_run(tmp_path / "runs/second", steps=1)
    said = problems(write_report(tmp_path / "runs"))["runs"]
    assert said.endswith(
        "runs lie in it, such as first, second: name one of them, or several to compare them"
    )


def test_a_whole_run_has_no_problems(run):
    assert problems(write_report(run)) == {}


FILES = ("config.resolved.yaml", "env.json", "metrics.jsonl", "checkpoints", "eval", "rollouts")


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_is_missing_is_named_with_what_it_means(run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert problems(write_report(run)) == {name: f" {reading.ABSENT[name]}"}


def test_a_run_killed_before_its_first_step_shows_its_config(run):
    for name in FILES[2:]:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = page_data(write_report(run))["overview"]
    assert data["config"].startswith("seed: 0")
    assert (data["state"], data["status"]) == ("empty", "no steps yet")
    assert {problem["file"] for problem in data["problems"]} == set(FILES[2:])


# Cut by a kill.


def texts(run: Path) -> list[Path]:
    return sorted(
        path for path in run.rglob("*") if path.is_file() and path.parent.name != "images"
    )


def test_every_file_cut_anywhere_is_named_and_the_rest_is_shown(run):
    for path in texts(run):
        content = path.read_bytes()
        lines = path.suffix == ".jsonl"
        for cut in {0, len(content) // 3, len(content) - 2}:
            path.write_bytes(content[:cut])
            found = problems(write_report(run))
            name = path.relative_to(run).as_posix()
            silent = name == "events.jsonl" and cut == 0  # monitors that had nothing to say
            assert found.keys() == (set() if silent else {name}), (name, cut)
            whole_rows = content[:cut].count(b"\n")
            if path.name == "metrics.jsonl":
                assert len(page_data(run / "report.html")["curves"]["metrics"]["steps"]) == len(
                    {json.loads(line)["step"] for line in content.splitlines()[:whole_rows]}
                )
            if lines and path.parent.name == "rollouts":
                assert (
                    page_data(run / "report.html")["rollouts"]["numResponses"]
                    == 2 * 16 + whole_rows
                )
        path.write_bytes(content)
    assert problems(write_report(run)) == {}


def test_a_table_of_rollouts_cut_anywhere_is_named_and_the_others_are_shown(run):
    pytest.importorskip("pyarrow")
    for step in (1, 2, 3):
        rows = (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        path = write_rollouts(run / "rollouts", step, rows, "parquet")
    content = path.read_bytes()
    for cut in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert problems(write_report(run)).keys() == {"rollouts/step_000003.parquet"}
        assert page_data(run / "report.html")["rollouts"]["numResponses"] == 32
    path.write_bytes(content)
    assert problems(write_report(run)) == {}
    assert page_data(run / "report.html")["rollouts"]["numResponses"] == 48


def test_a_last_line_that_lacks_only_its_line_break_counts(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert problems(write_report(run)) == {}
    assert page_data(run / "report.html")["overview"]["numSteps"] == 3


def test_an_evaluation_that_a_kill_cut_short_is_named(run):
    (run / "eval/step_000003.json").unlink()
    (run / "eval/step_000003.jsonl").write_text('{"id": "p", "sample')
    assert problems(write_report(run)) == {
        "eval/step_000003.jsonl": " responses of an evaluation that has not ended; train again to "
        "go on"
    }
    assert [e["step"] for e in page_data(run / "report.html")["overview"]["evaluations"]] == [
        0,
        1,
        2,
    ]


def test_a_config_cut_within_a_number_is_not_believed_in_silence(run):
    (run / "config.resolved.yaml").write_text("train:\n  steps: 30"[:-1])
    assert problems(write_report(run)) == {
        "config.resolved.yaml": " cut off in its last line; that setting is wrong, and later ones "
        "are missing"
    }


# Damaged.

VALUES = (
    None,
    True,
    -1,
    1e308,
    10**400,
    "x",
    "",
    [],
    [1],
    {},
    {"a": [1]},
    [[[]]],
    "\ud800",
    -3.5,
    [None],
    {"": {}},
    float("nan"),
)


def mutated(tree, rng: random.Random):
    """The tree with one value somewhere replaced by another type's."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree[key] = mutated(tree[key], rng) if rng.random() < 0.4 else rng.choice(VALUES)
        return tree
    return rng.choice(VALUES)


def damage(run: Path, seed: int) -> None:
    rng = random.Random(seed)
    for path in texts(run):
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            rows = [
                json.loads(line)
                for line in (text.splitlines() if path.suffix == ".jsonl" else [text])
            ]
            path.write_text(
                "".join(
                    json.dumps(mutated(row, rng) if rng.random() < 0.5 else row) + "\n"
                    for row in rows
                )
            )
        elif path.suffix == ".yaml":
            tree = {
                "seed": 0,
                "train": {"steps": 3},
                "algorithm": {"method": "grpo"},
                "flow": {"layers": [1]},
            }
            path.write_text(json.dumps(mutated(tree, rng)) + "\n")


@pytest.mark.parametrize("seed", range(12))
def test_values_of_any_type_anywhere_leave_a_page(whole, tmp_path, seed):
    one, two = (shutil.copytree(whole, tmp_path / name) for name in ("one", "two"))
    damage(one, seed)
    damage(two, 1000 + seed)
    assert page_data(write_report(one))["overview"]["name"] == "one"
    for order in ((one, two), (whole, one, two)):
        assert write_comparison(order, tmp_path / "page.html").stat().st_size > 1e6


def test_a_huge_line_is_left_out_without_being_kept_in_memory(run, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 5000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x": "' + "y" * 12_000 + '"}\n{"step": 5, "reward/mean": 1}\n')
    (run / "env.json").write_text(json.dumps({"a": "b" * 6000}))
    (run / "rollouts" / "step_000001.jsonl").write_text("{" * 20_000)
    read = read_run(run)
    assert read.metrics.steps == (0, 1, 2, 3, 5)
    found = {problem.file: problem.text for problem in read.problems}
    assert found["metrics.jsonl"].startswith("1 lines are not JSON objects, first line")
    assert "larger than" in found["env.json"]
    write_report(run)


def test_a_folder_in_the_place_of_a_file_and_the_other_way_round(run):
    for name in ("metrics.jsonl", "config.resolved.yaml", "env.json"):
        (run / name).unlink()
        (run / name).mkdir()
    for name in ("eval", "rollouts", "checkpoints"):
        shutil.rmtree(run / name)
        (run / name).write_text("x")
    found = problems(write_report(run))
    assert found.keys() == set(FILES)
    assert all(text.startswith(" cannot be read: ") for text in found.values())


# Out of reach.


@contextmanager
def as_nobody():
    """With no rights to what the owner alone may read."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("name", FILES)
def test_what_may_not_be_read_is_named(whole, name):
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o777)
        run = shutil.copytree(whole, Path(above) / "run")
        os.chmod(run, 0o777)
        os.chmod(run / name, 0)
        with as_nobody():
            found = problems(write_report(run))
        os.chmod(run / name, 0o700)
        assert found == {name: " cannot be read: Permission denied"}


def test_a_folder_that_may_not_be_read_or_written_is_a_user_error(whole):
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o777)
        run = shutil.copytree(whole, Path(above) / "run")
        os.chmod(run, 0o555)
        with as_nobody():
            with pytest.raises(
                UserError, match=r"report\.html cannot be written: Permission denied; --out FILE"
            ):
                write_report(run)
            write_report(run, Path(above) / "page.html")
        os.chmod(run, 0)
        with as_nobody(), pytest.raises(UserError, match="run cannot be read: Permission denied"):
            write_report(run)
        os.chmod(run, 0o700)


# Gone meanwhile.


def test_rollouts_that_vanish_while_they_are_read_are_named(run):
    read = read_run(run)
    shutil.rmtree(run / "rollouts")
    found = list(read.problems)
    rollouts, _ = examine(run, read, 10**6, found)
    assert rollouts.num_responses == 0
    assert {problem.file for problem in found} == {
        f"rollouts/step_{step:06d}.jsonl" for step in (1, 2, 3)
    }


def test_a_page_comes_of_a_folder_that_is_written_and_removed_all_the_time(whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            for name in (*FILES, "flow"):
                path = whole / name
                shutil.copytree(path, run / name) if path.is_dir() else shutil.copy(
                    path, run / name
                )
            for name in (*FILES, "flow"):
                path = run / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(12):
            assert page_data(write_report(run, tmp_path / "page.html"))["overview"]["name"] == "run"
    finally:
        over.set()
        thread.join()


@needs_browser
def test_the_page_of_a_torn_run_says_what_is_missing_and_what_to_do(run, open_report):
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "eval")
    (run / "events.jsonl").write_text('{"step": 1, "mon')
    report = open_report(write_report(run))
    said = report.page.inner_text("#problems")
    for text in (
        "events.jsonl: the last line is not whole",
        "metrics.jsonl: no curves; the run has not finished its first step",
        "eval: no held-out accuracy; eval.every is 0",
    ):
        assert text in said, text
    assert not report.complaints
