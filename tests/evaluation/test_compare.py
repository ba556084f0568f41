"""Two evaluations compared: from ledgers as they are written to a table, and refused where the
numbers would not compare.
"""

import copy
import csv
import json

import pytest

from rlfr_vlm.cli import main
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.compare import compare, protocol_differences
from rlfr_vlm.evaluation.comparison_text import render
from rlfr_vlm.evaluation.ledger import Answer, Judgement, Ledger, read_ledger
from rlfr_vlm.evaluation.statistics import difference_interval, mcnemar, wilson_interval

VERDICTS = {"1": "correct", "0": "wrong", "u": "unjudged", "f": "failed", "e": "error"}


def protocol(**changes):
    """As the runner writes it; `a__b=c` changes a.b."""
    tree = {
        "benchmark": {
            "name": "toy",
            "version": 1,
            "system": None,
            "suffix": "",
            "num_samples": 1,
            "temperature": 0.0,
        },
        "problems": {"count": None, "sha256": "abc"},
        "model": {"path": "base", "weights": "00ff"},
        "seed": 0,
        "grading": {"mode": "rule", "judge": None},
    }
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return tree


def evaluation(folder, verdicts, ids=None, golds=None, **changes):
    """An evaluation whose problems have these verdicts, one letter per sample; "-" is a response
    without a verdict, "?" no response.
    """
    ids = ids or [f"p{i}" for i in range(len(verdicts))]
    changes = {
        "benchmark__num_samples": max(map(len, verdicts)),
        **({} if "problems" in changes else {"problems__count": len(verdicts)}),
        **changes,
    }
    ledger = Ledger(folder, protocol(**changes))
    for problem, letters in zip(ids, verdicts, strict=True):
        for sample, letter in enumerate(letters):
            if letter != "?":
                ledger.append([Answer(problem, sample, "text", "stop", 5, 7, 0.1)])
            if letter in VERDICTS:
                ledger.append([Judgement(problem, sample, VERDICTS[letter], "7")])
    ledger.close()
    if golds is not None:
        (folder / "problems.jsonl").write_text(
            "".join(json.dumps({"id": i, "golds": [golds]}) + "\n" for i in ids)
        )
    return folder


def table(report):
    """The cells of the Markdown table by column, one dict per benchmark."""
    rows = [
        line.strip("| ").split(" | ")
        for line in render(report, "md").splitlines()
        if line.startswith("| ")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_one_sample_per_problem(tmp_path):
    evaluation(tmp_path / "a/toy", ["1"] * 10 + ["0"] * 10)
    evaluation(
        tmp_path / "b/toy",
        ["1"] * 8 + ["0"] * 2 + ["1"] * 7 + ["0"] * 3,
        model__path="trained",
        seed=7,
    )
    (found,) = compare(tmp_path / "a", tmp_path / "b").comparisons
    assert (found.a.accuracy.value, found.b.accuracy.value) == (0.5, 0.75)
    assert (found.b.accuracy.low, found.b.accuracy.high) == pytest.approx(wilson_interval(0.75, 20))
    assert (found.change.difference.value, found.change.test) == (0.25, "McNemar, exact")
    assert (found.change.difference.low, found.change.difference.high) == pytest.approx(
        difference_interval([-1] * 2 + [1] * 7 + [0] * 11)
    )
    assert found.change.p_value == mcnemar(2, 7)
    assert found.lost == (("p8", 0), ("p9", 0))
    assert {problem for problem, _ in found.gained} == {f"p{i}" for i in range(10, 17)}
    assert found.expected == ('model.path: "base" in A, "trained" in B', "seed: 0 in A, 7 in B")
    assert found.warnings == ()


def test_several_samples_are_clustered_by_problem_and_some_lack_a_verdict(tmp_path):
    evaluation(tmp_path / "a/toy", ["1100"] * 50 + ["0000"] * 50)
    evaluation(tmp_path / "b/toy", ["1110"] * 50 + ["000e"] * 49 + ["eeee"])
    (found,) = compare(tmp_path / "a", tmp_path / "b").comparisons
    assert (found.num_problems, found.left_out) == (99, 1)
    assert found.change.difference.value == pytest.approx(0.25 * 50 / 99)
    assert found.change.difference.value == pytest.approx(
        found.b.accuracy.value - found.a.accuracy.value
    )
    assert (found.change.test, found.change.p_value < 0.001) == ("paired permutation", True)
    assert (len(found.lost), len(found.gained), found.b.errors) == (0, 50, 53)
    assert found.gained[0] == ("p0", 2)
    text = render(compare(tmp_path / "a", tmp_path / "b"), "md")
    assert "1 problems without a verdict in A or in B are left out" in text
    assert "wrong to right: p0, p1" in text


@pytest.mark.parametrize(
    ("letter", "field"), [("f", "failed"), ("?", "failed"), ("u", "unjudged"), ("-", "unjudged")]
)
def test_no_score_above_one_percent_without_a_verdict(tmp_path, letter, field):
    evaluation(tmp_path / "a/toy", ["1"] * 200)
    evaluation(tmp_path / "b/toy", ["1"] * 198 + [letter] * 2)
    evaluation(tmp_path / "c/toy", ["1"] * 197 + [letter] * 3)
    (fine,) = compare(tmp_path / "a", tmp_path / "b").comparisons
    assert (fine.change.difference.num_problems, fine.left_out, getattr(fine.b, field)) == (
        198,
        2,
        2,
    )
    report = compare(tmp_path / "c", tmp_path / "a")
    assert report.comparisons[0].change is None
    (row,) = table(report)
    assert {row[name] for name in ("accuracy A", "accuracy B", "B - A", "p")} == {"withheld"}
    assert row[f"{field} A, B"] == "3, 0"
    for form in ("md", "csv", "latex"):
        assert "3 of 200 in A" in render(report, form)
        assert "100.0" not in render(report, form)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark__version": 2}, "benchmark.version: 1 in A, 2 in B"),
        ({"benchmark__name": "other"}, 'benchmark.name: "toy" in A, "other" in B'),
        ({"problems__sha256": "abd"}, 'problems.sha256: "abc" in A, "abd" in B'),
        (
            {"grading__mode": "judge", "grading__judge": {"model": "m"}},
            'grading.judge.model: nothing in A, "m" in B; grading.mode: "rule"',
        ),
    ],
)
def test_other_problems_or_grading_are_refused(tmp_path, changes, message):
    evaluation(tmp_path / "a/toy", ["1", "0"], golds="7")
    evaluation(tmp_path / "b/toy", ["1", "0"], golds="7", **changes)
    with pytest.raises(UserError) as error:
        compare(tmp_path / "a", tmp_path / "b")
    assert "compare: toy: other problems or another grading" in str(error.value)
    assert message in str(error.value)


def test_another_prompt_or_decoding_is_a_warning_where_problems_are_the_same(tmp_path):
    evaluation(tmp_path / "a/toy", ["1", "0"], golds="7")
    changes = {
        "benchmark__suffix": "Think.",
        "problems__sha256": "abd",
        "benchmark__temperature": 0.6,
    }
    evaluation(tmp_path / "b/toy", ["1", "0"], golds="7", **changes)
    (found,) = compare(tmp_path / "a", tmp_path / "b").comparisons
    assert [w.split(":")[0] for w in found.warnings] == [
        "benchmark.suffix",
        "benchmark.temperature",
        "problems.sha256",
    ]
    assert "- warning: benchmark.temperature: 0.0 in A, 0.6 in B" in render(
        compare(tmp_path / "a", tmp_path / "b"), "md"
    )
    evaluation(tmp_path / "c/toy", ["1", "0"], golds="8", **changes)
    evaluation(tmp_path / "d/toy", ["1", "0"], **changes)  # golds unknown
    for other in ("c", "d"):
        with pytest.raises(UserError, match=r"problems\.sha256"):
            compare(tmp_path / "a", tmp_path / other)


def test_protocols_without_a_digest_are_held_to_the_problems_in_their_ledgers(tmp_path):
    evaluation(tmp_path / "a/toy", ["1", "0", "1"], ["x", "y", "z"], problems={})
    evaluation(tmp_path / "b/toy", ["1", "0", "1"], ["x", "y", "w"], problems={})
    with pytest.raises(
        UserError, match=r"the problems differ: 1 only in A \(z\), 1 only in B \(w\)"
    ):
        compare(tmp_path / "a", tmp_path / "b")
    evaluation(tmp_path / "c/toy", ["0", "0", "1"], ["x", "y", "z"], problems={})
    assert compare(tmp_path / "a", tmp_path / "c").comparisons[0].num_problems == 3


def test_protocol_differences_are_sorted_by_what_they_mean():
    a, b = protocol(), copy.deepcopy(protocol(model__path="x", benchmark__num_samples=4))
    b["checkpoint"] = "step_10"
    found = protocol_differences(a, b)
    assert found.refused == ()
    assert found.expected == (
        'checkpoint: nothing in A, "step_10" in B',
        'model.path: "base" in A, "x" in B',
    )
    assert found.warnings == ("benchmark.num_samples: 1 in A, 4 in B",)
    assert protocol_differences(a, a) == protocol_differences(b, b)


def test_folders_of_outputs_and_of_single_benchmarks(tmp_path):
    for side in ("a", "b"):
        evaluation(tmp_path / side / "toy", ["1", "0"])
    evaluation(tmp_path / "a/more", ["1"])
    evaluation(tmp_path / "c/more", ["1"])
    report = compare(tmp_path / "a", tmp_path / "b")
    assert ([c.benchmark for c in report.comparisons], report.notes) == (
        ["toy"],
        ("more: only in A",),
    )
    for first, second in (("a/toy", "b/toy"), ("a/toy", "b"), ("a", "b/toy")):
        assert [c.benchmark for c in compare(tmp_path / first, tmp_path / second).comparisons] == [
            "toy"
        ]
    with pytest.raises(UserError, match=r"no benchmark in common: .*b has toy; .*c has more"):
        compare(tmp_path / "b", tmp_path / "c")
    with pytest.raises(UserError, match="holds no evaluation"):
        compare(tmp_path / "a", tmp_path)


def test_a_ledger_is_read_while_it_is_held_and_written(tmp_path):
    folder = evaluation(tmp_path / "toy", ["1", "0"])
    before = (folder / "ledger.jsonl").read_bytes()
    holder = Ledger(folder, protocol(problems__count=2))
    with (folder / "ledger.jsonl").open("ab") as file:
        file.write(b'{"kind": "response", "prob')  # torn: half a line
    _, answers, verdicts = read_ledger(folder)
    assert (sorted(answers), [v.verdict for v in verdicts.values()]) == (
        [("p0", 0), ("p1", 0)],
        ["correct", "wrong"],
    )
    assert (
        (folder / "ledger.jsonl").read_bytes().startswith(before + b'{"kind')
    )  # nothing was cut off
    assert (answers, verdicts) == (holder.answers, holder.verdicts)
    holder.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "ledger.jsonl:3: not a line of a ledger"),
        (
            '{"kind": "response", "protocol": "p", "problem": "x"}',
            "ledger.jsonl:3: not a line of a ledger",
        ),
        (
            '{"kind": "verdict", "protocol": "p", "problem": "x", "sample": 0, "verdict": "wrong"}',
            "ledger.jsonl:3: belongs to protocol p",
        ),
    ],
)
def test_what_is_no_ledger_is_named(tmp_path, line, message):
    folder = evaluation(tmp_path / "toy", ["1"])
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        read_ledger(folder)
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(UserError, match="not a readable evaluation"):
        read_ledger(folder)


def test_command_line_writes_every_format(tmp_path, capsys):
    ids = ["a|b", "c_d & e", "50%"]
    evaluation(tmp_path / "a/toy_1", ["1", "0", "0"], ids)
    evaluation(tmp_path / "b/toy_1", ["0", "1", "1"], ids)

    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *arguments])
        output = capsys.readouterr()
        return exited.value.code, output.out, output.err

    code, out, _ = run()
    assert code == 0
    assert "| toy_1 | 3 | 3, 3 | 33.3 [6.1, 79.2] | 66.7 [20.8, 93.9] | +33.3 [" in out
    assert "- right to wrong: a|b" in out
    code, out, _ = run("--format", "csv", "--out", str(tmp_path / "t.csv"))
    assert (code, out.strip()) == (0, str(tmp_path / "t.csv"))
    (row,) = csv.DictReader((tmp_path / "t.csv").open())
    assert float(row["difference"]) == pytest.approx(1 / 3)
    assert float(row["accuracy_b_low"]) == wilson_interval(2 / 3, 3)[0]
    assert json.loads(row["wrong_to_right_ids"]) == ["50%", "c_d & e"]
    code, out, _ = run("--format", "latex")
    assert r"toy\_1 & 3 & 3, 3 & 33.3 [6.1, 79.2] & " in out
    code, _, err = run("--out", str(tmp_path / "nowhere/t.md"))
    assert (code, "there is no folder" in err) == (2, True)
