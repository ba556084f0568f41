"""The grader against hand-labelled answers, several gold answers to one question, and real gold
answers against themselves.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from rlfr_vlm.config import GraderConfig
from rlfr_vlm.rewards.answers import MAX_GOLD
from rlfr_vlm.rewards.grader import MAX_GOLDS, Grader

ROWS = [
    json.loads(line)
    for line in Path(__file__).with_name("labelled_answers.jsonl").read_text().splitlines()
]
PATIENT = GraderConfig(
    workers=2, cpu_seconds=20.0, wall_seconds=60.0
)  # the label counts here, not the speed of the machine


@pytest.fixture(scope="module")
def grader():
    with Grader(PATIENT) as grader:
        yield grader


def test_labels_are_sound():
    assert len({(row["gold"], row["response"], row["where"]) for row in ROWS}) == len(ROWS) >= 300
    assert Counter(row["expected"] for row in ROWS).keys() == {"correct", "wrong", "error"}
    assert len({row["kind"] for row in ROWS}) >= 30
    assert {row["where"] for row in ROWS} == {"boxed", "tag", "text"}


def test_the_grader_agrees_with_the_labels():
    """At 98 % of the rows, and it never rewards an answer that is labelled wrong."""
    differ = []
    for where in ("boxed", "tag", "text"):
        rows = [row for row in ROWS if row["where"] == where]
        with Grader(PATIENT, where) as grader:
            graded = grader.grade([(row["gold"], row["response"]) for row in rows])
        differ += [
            (row, result)
            for row, result in zip(rows, graded, strict=True)
            if result.verdict != row["expected"]
        ]
    listing = "\n".join(
        f"{row['expected']} but graded {result.verdict}: {row}" for row, result in differ
    )
    print(f"agreement {1 - len(differ) / len(ROWS):.2%} of {len(ROWS)}\n{listing}")
    assert [row for row, result in differ if result.verdict == "correct"] == []
    assert len(differ) <= 0.02 * len(ROWS), listing


# --- several gold answers -------------------------------------------------------------------------


def test_any_of_several_golds_is_right(grader):
    golds = ("15000", r"1.5\times 10^4 \text{ kcal}")
    for answer, verdict in (
        ("15000", "correct"),
        ("1.5e4", "correct"),
        ("15,000 kcal", "correct"),
        ("1500", "wrong"),
        ("", "wrong"),
    ):
        (result,) = grader.grade([(golds, rf"\boxed{{{answer}}}")])
        assert (result.verdict, result.reason) == (verdict, ""), answer
    results = grader.grade(
        [
            (["3.52", "3.53"], r"\boxed{3.53}"),
            ("3.52", r"\boxed{3.53}"),
            (("3.52",), r"\boxed{3.52}"),
        ]
    )
    assert [result.verdict for result in results] == ["correct", "wrong", "correct"]


def test_values_that_belong_together_are_one_gold(grader):
    answers = [r"\boxed{2, 5}", r"\boxed{5, 2}", r"\boxed{2}", r"\boxed{2, 5, 7}"]
    assert [r.verdict for r in grader.grade([("2, 5", answer) for answer in answers])] == [
        "correct",
        "correct",
        "wrong",
        "wrong",
    ]
    assert [r.verdict for r in grader.grade([(("2", "5"), answer) for answer in answers])] == [
        "wrong",
        "wrong",
        "correct",
        "wrong",
    ]


def test_unusable_golds_among_several(grader):
    items = [
        (("", "7"), r"\boxed{7}"),
        (("", "7"), r"\boxed{8}"),
        (("", r"\frac{1}{"), r"\boxed{8}"),
        ((), r"\boxed{8}"),
    ]
    results = grader.grade([*items, (("7",) * (MAX_GOLDS + 1), r"\boxed{7}")])
    assert [result.verdict for result in results] == ["correct", "wrong", "error", "error", "error"]
    reasons = [
        "",
        "",
        "the gold answer is empty",
        "no gold answer",
        f"more than {MAX_GOLDS} gold answers",
    ]
    assert [result.reason for result in results] == reasons
    assert grader.check_golds([("", "7"), ("", "$$"), "7", ()]) == [
        None,
        "the gold answer is empty",
        None,
        "no gold answer",
    ]


def test_the_largest_request_fits_into_a_pipe(grader):
    for character in ("\x01", "\U0001f600", "\ud800", '"'):
        (result,) = grader.grade(
            [((character * (2 * MAX_GOLD),) * MAX_GOLDS, rf"\boxed{{{character * 5000}}}")]
        )
        assert result.verdict == "error"


# --- real gold answers ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    "RLFR_BENCHMARKS" not in os.environ,
    reason="RLFR_BENCHMARKS names no folder of <name>/<name>.jsonl files",
)
def test_each_gold_of_a_benchmark_matches_itself(grader):
    """A gold answer in a box is correct against its own row: at 99 % of the rows of each benchmark."""
    files = [
        folder / f"{folder.name}.jsonl"
        for folder in sorted(Path(os.environ["RLFR_BENCHMARKS"]).iterdir())
    ]
    files = [file for file in files if file.is_file()]
    assert files
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        items = [(row["answer"], rf"\boxed{{{row['answer']}}}") for row in rows]
        items += [
            (tuple(row["answers"]), rf"\boxed{{{answer}}}")
            for row in rows
            for answer in row.get("answers", ())
        ]
        failed = [
            (gold, r)
            for (gold, _), r in zip(items, grader.grade(items), strict=True)
            if r.verdict != "correct"
        ]
        print(
            f"{file.stem}: {1 - len(failed) / len(items):.2%} of {len(items)}",
            *(f"  {gold!r}: {r.reason}" for gold, r in failed),
            sep="\n",
        )
        assert len(failed) <= 0.01 * len(items), failed
