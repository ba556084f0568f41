"""The ledger: what is in it survives, and belongs to one protocol."""

import json

import pytest

from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.ledger import Answer, Judgement, Ledger

PROTOCOL = {"benchmark": {"name": "b", "temperature": 0.0}, "model": {"fingerprint": "f"}}


def answered(problem, sample=0):
    return Answer(problem, sample, "x", "stop", 3, 1, 0.1)


def test_what_was_appended_is_there_again(tmp_path):
    ledger = Ledger(tmp_path, PROTOCOL)
    ledger.append([answered("a"), answered("b")])
    ledger.append(
        [
            Judgement("a", 0, "correct", "4", rule="correct"),
            Judgement("b", 0, "failed", reason="the judge: timeout"),
        ]
    )
    ledger.append([Judgement("b", 0, "wrong", "5")])  # asked again
    ledger.close()
    again = Ledger(tmp_path, PROTOCOL)
    assert again.answers == ledger.answers
    assert {s: v.verdict for s, v in again.verdicts.items()} == {
        ("a", 0): "correct",
        ("b", 0): "wrong",
    }
    assert again.unanswered([("a", 0), ("a", 1), ("b", 0)]) == [("a", 1)]
    again.close()


def test_failed_verdicts_are_asked_again_and_others_not(tmp_path):
    ledger = Ledger(tmp_path, PROTOCOL)
    ledger.append([answered(p) for p in "abcd"])
    ledger.append(
        [Judgement("a", 0, "correct"), Judgement("b", 0, "failed"), Judgement("c", 0, "error")]
    )
    assert ledger.ungraded([(p, 0) for p in "abcde"]) == [("b", 0), ("d", 0)]
    ledger.close()


@pytest.mark.parametrize("keep", [1, 30, 80])
def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path, keep):
    ledger = Ledger(tmp_path, PROTOCOL)
    ledger.append([answered("a")])
    ledger.close()
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:keep])
    again = Ledger(tmp_path, PROTOCOL)
    again.append([answered("b")])
    again.close()
    assert [json.loads(line)["problem"] for line in ledger.path.read_text().splitlines()] == [
        "a",
        "b",
    ]


def test_another_protocol_is_refused_with_both_values(tmp_path):
    Ledger(tmp_path, PROTOCOL).close()
    other = {**PROTOCOL, "benchmark": {"name": "b", "temperature": 0.6}}
    with pytest.raises(
        UserError,
        match=r"another protocol \(benchmark\.temperature: 0\.0 -> 0\.6\).*another output_dir",
    ):
        Ledger(tmp_path, other)


def test_one_process_at_a_time(tmp_path):
    ledger = Ledger(tmp_path, PROTOCOL)
    with pytest.raises(UserError, match="in use by another evaluation"):
        Ledger(tmp_path, PROTOCOL)
    ledger.close()
