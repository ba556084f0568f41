"""Answers and replies of judges, fuzzed: what was written is found, nothing else is, in linear
time, and nothing is raised.

Each property holds for a few examples in the fast lane and for thousands under the marker
`reliability`.
"""

import json
import math
import time

import pytest
from hypothesis import strategies as st

from rlfr_vlm.config import GraderConfig
from rlfr_vlm.evaluation.server.judge import (
    MAX_TAIL,
    USER,
    JudgeItem,
    _shown,
    code_of,
    read_verdict,
)
from rlfr_vlm.evaluation.server.wire import (
    ChatReply,
    Fault,
    read_models,
    read_reply,
    retry_after,
    server_words,
)
from rlfr_vlm.rewards.answers import gold_problem
from rlfr_vlm.rewards.extract import MAX_TEXT, extract_answer, unwrap_gold
from rlfr_vlm.rewards.grader import Grader
from tests.evaluation.scripted_server import judged
from tests.reliability.fuzzing import CORPUS, SCALARS, TREES, run

PLACES = ("boxed", "tag", "text")
LINEAR_SECONDS = 0.2  # CPU time of 200,000 characters, on a busy machine

# -- answers ---------------------------------------------------------------------------------------

WORDS = [
    r"\boxed{",
    r"\fbox {",
    "}",
    "{",
    "\\",
    r"\{",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "The answer is",
    "answer: ",
    "\n####",
    "42",
    "1,234",
    "$x$",
    r"\(y\)",
    "(B)",
    " or ",
    ", ",
    "\n",
    " ",
    ".",
    "*",
    r"\frac{1}{2}",
    "x",
    "\x00",
    "\ud800",
    "\u202e",
    "é",
]
RESPONSES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=30).map(
    "".join
)
INNER = st.recursive(
    st.text(st.characters(exclude_characters="{}\\<", exclude_categories=["Cs"]), max_size=6),
    lambda inner: st.one_of(
        inner.map(lambda text: "{" + text + "}"),
        st.tuples(inner, inner).map(lambda two: rf"\frac{{{two[0]}}}{{{two[1]}}}"),
        inner.map(lambda text: r"\{" + text + r"\}"),
    ),
    max_leaves=6,
)


def check_answer(text):
    for where in PLACES:
        found = extract_answer(text, where)
        assert found is None or (found in text and len(found) <= MAX_TEXT)
    assert unwrap_gold(text) in text


def check_round_trip(noise, inner, tail):
    """What was put into a box or a tag comes out of it."""
    noise = noise.replace("\\", "").replace("<", "")
    assert extract_answer(rf"{noise}\boxed{{{inner}}}{tail}", "boxed") == inner.strip()
    assert extract_answer(f"{noise}<answer>{inner}</answer>{tail}", "tag") == inner.strip()
    assert extract_answer(rf"{noise}\boxed{{{inner}}}{tail}", "text") == inner.strip()
    assert (
        extract_answer(rf"<think>{noise}\boxed{{0}}</think>\boxed{{{inner}}}", "boxed")
        == inner.strip()
    )
    assert extract_answer(rf"<think>{noise}\boxed{{{inner}}}", "boxed") is None


def check_linear(unit):
    text = (unit * (200_000 // max(1, len(unit)) + 1))[:200_000]
    for read in (*(lambda t, w=where: extract_answer(t, w) for where in PLACES), unwrap_gold):
        start = time.process_time()
        read(text)
        assert time.process_time() - start < LINEAR_SECONDS


TAILS = st.text(st.characters(exclude_characters="{}\\<", exclude_categories=["Cs"]), max_size=10)
UNITS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join)


def test_answers():
    run(check_answer, RESPONSES, examples=300)
    run(check_round_trip, RESPONSES, INNER, TAILS, examples=200)
    run(check_linear, UNITS, examples=40)


@pytest.mark.reliability
def test_answers_in_thousands(figure):
    count, _ = run(check_answer, RESPONSES, examples=20_000)
    trips, _ = run(check_round_trip, RESPONSES, INNER, TAILS, examples=10_000)
    long, slowest = run(check_linear, UNITS, examples=1_000)
    figure(
        "R10",
        f"answers found in {count} random responses, {trips} round trips; {long} of 200,000 "
        f"characters, slowest {slowest:.2f} s for all places",
    )


NOTHING = [
    "",
    " ",
    "\n",
    "$",
    "$$",
    r"\quad",
    r"\,",
    r"\;",
    "~",
    r"\text{}",
    r"\text{ }",
    r"\boxed{}",
    "*",
    ".",
    ",",
    ";",
    r"\left.",
    r"\!",
    "\u00a0",
    "\u2009",
    "\u200b",
    r"\displaystyle",
    r"\checkmark",
    r"\(",
    r"\)",
    "the answer is",
    "so,",
    "=",
    r"\color{red}",
    r"\mathbf{}",
]
GOLDS = [
    "42",
    "0",
    "1",
    "-1",
    r"\frac{1}{2}",
    "x",
    "x+1",
    "(1,2)",
    "1,2",
    r"\emptyset",
    "B",
    "(C)",
    "D. none",
    "no solution",
    "none",
    "yes",
    "the",
    "a",
    "12 cm",
    "50%",
    "90^\\circ",
    "[0,1)",
    "x\\ge 3",
    "x=5",
    "\\infty",
    "\\$5",
    "3:2",
    "1_2",
    "\\text{the }",
    "三角形",
]


def empty_checker(grader):
    def check(pieces):
        responses = [rf"\boxed{{{''.join(pieces)}}}", f"<answer>{''.join(pieces)}</answer>"]
        found = grader.grade([(gold, response) for gold in GOLDS for response in responses])
        assert {result.verdict for result in found} == {"wrong"}, pieces

    return check


EMPTIES = st.lists(st.sampled_from(NOTHING), max_size=5)


def test_an_empty_answer_is_never_correct():
    with Grader(GraderConfig(workers=1, wall_seconds=30.0)) as grader:
        assert [gold for gold in GOLDS if gold_problem(gold)] == []
        assert {
            r.verdict for r in grader.grade([(gold, rf"\boxed{{{gold}}}") for gold in GOLDS])
        } == {"correct"}
        run(empty_checker(grader), EMPTIES, examples=40)


@pytest.mark.reliability
def test_an_empty_answer_is_never_correct_in_thousands(figure):
    with Grader(GraderConfig(workers=2, wall_seconds=30.0)) as grader:
        count, _ = run(empty_checker(grader), EMPTIES, examples=1_000)
    figure(
        "R10", f"{count} answers of nothing but signs against {len(GOLDS)} gold answers: 0 correct"
    )


# -- judges ----------------------------------------------------------------------------------------

CODE = "bcdfghjk"
SAYINGS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                CODE,
                CODE.upper(),
                ":1",
                ":0",
                ":",
                "1",
                "0",
                "\n",
                " ",
                "*",
                "`",
                "<think>",
                "</think>",
                "The verdict is ",
                ".",
                "\r",
                "\u2028",
                "x",
            ]
        ),
        st.text(max_size=5),
    ),
    max_size=14,
).map("".join)
BODIES = st.one_of(
    st.binary(max_size=200),
    TREES.map(lambda tree: json.dumps(tree).encode()),
    st.fixed_dictionaries(
        {
            "choices": st.lists(
                st.fixed_dictionaries(
                    {
                        "message": st.fixed_dictionaries({"content": SCALARS}),
                        "finish_reason": st.sampled_from(
                            ["stop", "length", "content_filter", None, "x"]
                        ),
                    }
                ),
                max_size=2,
            )
        },
        optional={"usage": TREES},
    ).map(lambda tree: json.dumps(tree).encode()),
    st.tuples(
        st.sampled_from(["[", '{"error":', '{"choices":[', '{"detail":[']), st.integers(1, 3000)
    ).map(lambda two: (two[0] * two[1]).encode()),
)
HEADERS = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\s*-?\d{0,25}(\.\d{0,12})?\s*", fullmatch=True),
    st.from_regex(
        r"(Mon|Xyz)?,? ?\d{0,12} (Jan|Foo|Dec) -?\d{0,25} \d{0,5}:\d{0,25}(:\d{0,5})? "
        r"?(GMT|[+-]\d{0,25})?",
        fullmatch=True,
    ),
)


def swapped(text):
    return text.translate({ord("0"): "1", ord("1"): "0"})


def check_verdict(reply):
    """Only the code makes a verdict, and 0 and 1 are treated alike."""
    said = read_verdict(reply, CODE)
    assert said in (True, False, None)
    if CODE not in reply.lower().replace("*", "").replace("`", "").replace(" ", "").replace(
        ".", ""
    ):
        assert said is None or any(c in reply for c in "\t_#>\"'[]")
    assert read_verdict(swapped(reply), CODE) is (None if said is None else not said)
    assert (
        read_verdict(f"{reply}\n{CODE}:1 {CODE}:0", CODE) is None
        and read_verdict(f"{reply}\n{CODE}:2", CODE) is None
    )


def check_wire(body, header):
    assert isinstance(read_reply(body), ChatReply | Fault) and isinstance(
        read_models(body), list | Fault
    )
    assert isinstance(server_words(body), str)
    seconds = retry_after(header)
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)


def check_frame(question, gold, prediction, response):
    """Whatever the four texts are, each stands whole between its own marks, and the code stands in
    none of them.
    """
    item = JudgeItem(question, gold, prediction, response + "x" * (len(response) % 3) * MAX_TAIL)
    shown = _shown(item)
    code = code_of(item, "ab" * 32)
    assert code not in "\n".join(shown.values()).lower()
    found_code, found = judged({"messages": [{"content": USER.format(code=code, **shown)}]})
    assert found_code == code and [*found.values()] == [
        shown[name] for name in ("question", "gold", "prediction", "tail")
    ]


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                f"{CODE}:1",
                "[/bcdfghjk question]",
                "{code}",
                "{gold}",
                "<|im_end|>",
                "[/INST]",
                "\n",
                "\n\n",
            ]
        ),
        st.text(max_size=8),
    ),
    max_size=6,
).map("".join)


def test_replies_of_judges():
    for header in (CORPUS / "retry_after.txt").read_text().splitlines():
        check_wire(b"", header)
    run(check_verdict, SAYINGS, examples=300)
    run(check_wire, BODIES, HEADERS, examples=200)
    run(check_frame, PIECES, PIECES, PIECES, PIECES, examples=100)


@pytest.mark.reliability
def test_replies_of_judges_in_thousands(figure):
    verdicts, _ = run(check_verdict, SAYINGS, examples=20_000)
    bodies, slowest = run(check_wire, BODIES, HEADERS, examples=10_000)
    frames, _ = run(check_frame, PIECES, PIECES, PIECES, PIECES, examples=5_000)
    figure(
        "R12",
        f"{verdicts} random verdicts, {bodies} bodies and headers, {frames} prompts of a judge; "
        f"slowest {slowest:.2f} s of CPU time",
    )
