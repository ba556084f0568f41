"""The grader with real worker processes: verdicts on hand-labelled answers, and what hostile ones
cannot do.
"""

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rlfr_vlm.rewards
from rlfr_vlm.config import GraderConfig
from rlfr_vlm.rewards.answers import MAX_GOLD
from rlfr_vlm.rewards.extract import MAX_ANSWER, unwrap_gold
from rlfr_vlm.rewards.grader import Grader, extract_answer, gold_problem, grade_answer

# fmt: off
EQUAL = [  # (gold, prediction)
    # numbers and fractions
    ("1/2", r"\frac{1}{2}"), (r"\frac12", "0.5"), ("0.5", r"\dfrac12"), ("-1/3", r"-\frac13"), ("1/3", "0.333333"),
    ("3/2", r"1\frac{1}{2}"), ("3/2", "1 1/2"), (r"-\frac32", r"-1\frac12"), (r"\frac13", r"0.\overline{3}"), (r"0.1\overline{6}", "1/6"),
    ("3:4", "3/4"), ("42", "−(−42)"), ("1234", "1,234"), ("1,234", "1234"), ("1234", "1{,}234"), ("1234567", "1 234 "
        "567"),
    ("1000", r"1\times 10^3"), ("1000", "1e3"), (r"6.62\times 10^{-34}", r"6.62\times10^{-34}"), (r"\frac{1}{2}", "½"),
    # roots, powers, functions, constants; code and Unicode spellings
    (r"\sqrt{2}", "sqrt(2)"), (r"\sqrt{12}", "2√3"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{\pi}{2}", "pi/2"), (r"2\pi", "2π"),
    ("1024", "2^10"), ("8", "2**3"), ("3", r"\log_2 8"), ("10", r"\binom{5}{2}"), ("120", "5!"), (r"\sin "
        r"x", "sin(x)"), ("2+3i", "3i+2"),
    (r"\pm 3", "3, -3"),
    # algebra and equations
    ("x^2+2x+1", "(x+1)^2"), ("x^{12}", "x^12"), (r"\frac{x+1}{2}", "(x+1)/2"), ("3x", "3 x"), ("5", "x=5"), ("x=5", "5"),
    ("y=2x+1", "2x+1"), ("42", r"6\cdot 7=42"), (r"\frac{1}{3}", r"\frac{1}{3} \approx 0.333"),
    # sets, intervals, tuples, matrices
    ("(1,2)", "(1, 2)"), ("[1,2)", r"\left[1,2\right)"), (r"(-\infty,3]", r"x\le 3"), (r"x\le 3", r"(-\infty, "
        r"3]"), (r"(3,\infty)", "x>3"),
    (r"(-\infty,1)\cup(2,\infty)", r"\left(-\infty, 1\right) \cup \left(2, \infty\right)"), (r"\{1,2\}", r"\{2,1\}"), ("1,2", "1 and "
        "2"),
    ("x=1 or x=2", "x=2 or x=1"), ("1, 2", "x=1, x=2"), (r"\emptyset", "∅"), ("(5,3)", "(5,3)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    # units, percent, money
    ("12", r"12\text{ cm}"), ("12 cm", "12"), ("12 cm", r"12\mathrm{~cm}"), ("12 cm", "12 "
        "centimeters"),
    ("12 square cm", r"12\text{ cm}^2"), ("5", "5 apples"), ("5", "5m"), (r"\frac{5}{3}", "5/3 "
        "hours"), ("10 km/h", "10 km per hour"),
    ("60 mph", "60"), ("90", r"90^\circ"), (r"90^\circ", "90 degrees"), ("25 °C", "25"), (r"50\%", "0.5"), ("50%", "50"), ("0.5", r"50\%"),
    ("16%", "16 percent"), ("12.5", r"\$12.50"), ("12 dollars", r"\$12"),
    # letters and words
    ("B", "(B)"), ("B", r"\text{B}"), ("B", "B."), ("B", "B) 12 cm"), ("(B)", "b"), ("B", "The correct option "
        "is B"), ("A, C", "C, A"),
    ("Evelyn", r"\text{Evelyn}"), ("Evelyn", "evelyn."), ("Evelyn", "The answer is Evelyn"), (r"\text{Monday}", "Monday"), ("yes", "Yes"),
    ("no solution", "No solution"), ("12:30", "12:30"), ("三角形", r"\text{三角形}"), ("12", "12cm"),
    # how data sets wrap the gold answer
    ("<answer> 42 </answer>", "42"), (r"so the answer is \boxed{7}", "7"), ("6 * 12 = 72\n#### 72", "72"), ("$5$", "5"), (r"\$5", "5"),
]
DIFFERENT = [
    ("1/2", "1/3"), ("1/3", "0.33"), (r"\frac{1}{23}", r"\frac{12}{3}"), ("0", "0.0000001"), (r"6.62\times "
        r"10^{-34}", r"1\times 10^{-34}"),
    ("3", "3x"), ("2", "x^2"), ("2t", "2"), ("4s", "4"), ("5", "five"), ("5", ""), ("5", "   "), ("5", r"\frac{1}{0}"), ("5", "5?6"),
    ("42", "4 2"), ("42", "1" * 3000), ("42", "4\u200b2"), ("42", "42\x00"), ("42", "\u202e24"), ("1010_2", "1010_3"), ("x=5", "y=5"),
    ("x>3", r"x\ge 3"),
    # more than one answer
    ("42", "42 or 43"), ("43", "42 or 43"), ("42", r"42\text{ or }43"), ("42", r"42\text{ or 43}"), ("42", "either "
        "42"), ("42", "not 42"),
    ("42", "42, 43"), ("42", "42; 43"), ("43", "42; 43"), ("42", "42 43"), ("85", "42 43"), ("4243", "42 "
        "43"), ("42", "42 and 43"),
    ("42", "42|43"), ("42", "42/43"), ("42", "42-43"), ("42", "42~43"), ("42", r"42\quad 43"), ("42", r"\{42,43\}"), ("42", "42 (or "
        "43)"),
    ("42", r"42 \lor 43"), ("42", r"\pm 42"), ("42", "43=42"), ("43", "42=43"), ("42", "x=43=42"), ("42", "x=42 or "
        "x=43"),
    ("42", "x=42, y=43"), ("42", "41<42<43"), ("43", r"42 \text{ but also } 43"), ("8", "7 vs 8"), ("42", r"\text{42}\text{43}"),
    # sets, intervals, tuples, matrices
    ("1,2", "1"), ("1,2", "1,2,3"), ("[1,2]", "(1,2)"), ("(1,2)", "(2,1)"), ("(5,3)", "(4,2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
    # units and percent
    ("12 cm", "12 m"), ("12 cm^2", "12 cm"), ("5 apples", "5 oranges"), ("50%", "5%"), ("50", "0.5"),
    # letters and words
    ("B", "A"), ("B", "A or B"), ("B", "A) or B)"), ("A", "A) or B)"), ("A", "A, B"), ("A", "AB"), ("A", "A. "
        "B"), ("A", "A / B"),
    ("A", "not A"), ("B", "Because"), ("listen", "silent"), ("Evelyn", "nyleve"), ("Evelyn", "Evelyn or "
        "Tom"), ("yes", "no"),
    ("42", "answer"), ("三角形", "正方形"),
]
BAD_GOLDS = ["", "   ", "$$", "1 2 3 4", r"\frac{1}{0}", r"\frac{1}{", "\u200b5", "x" * (MAX_GOLD + 1)]

EXHAUSTING = ["9^{9^{9^{9}}}", "((((9!)!)!)!)!", "99999999!-x"]  # of the CPU limit
HOSTILE = [
    "9**9**9**9", "__import__('os').system('touch MARK')", "exec(\"open('MARK','w')\")", r"\text{__import__('os').system('touch "
        r"MARK')}",
    "lambda: open('MARK','w')", "().__class__.__bases__[0].__subclasses__()", "open('MARK','w').write('x')", "$(touch "
        "MARK)",
    "`touch MARK`", r"\write18{touch MARK}", r"\input{/etc/passwd}", "{{7*7}}${7*7}", "E.__class__", "42\x00", "\ud800\udfff", "4\u200b2",
    "\u202e24", "4\u03012", r"\sqrt{" * 100 + "2" + "}" * 100, r"\begin{pmatrix}" + "&".join(["9^{99999}"] * 100) + r"\end{pmatrix}",
    "1" * 200_000, "9" * 1900, "+".join(["1"] * 900), "\\" * 1500, "$" * 1500, "42" + " " * 1000 + "43", "=".join(["42", "43"] * 200),
    ",".join(map(str, range(500))), "^".join(["9"] * 500), r"\frac" * 300, "e^" * 300 + "x", "|" * 500 + "42" + "|" * 501, "%" * 1000,
    r"\infty-\infty", "0/0", "nan", "True", "None", "<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n\\boxed{2}",
]
HUGE = [
    r"\boxed{" * 20_000, r"\boxed{1}" * 20_000, "{" * 1_000_000, "a" * 1_000_000, "<answer>" * 100_000, "\\boxed" + " " * 1_000_000,
    "1 " * 500_000, r"\boxed{" + "1" * 1_000_000 + "}", "answer is " * 100_000, "$" * 1_000_000,
]
# fmt: on


def boxed(answer):
    return rf"so it is \boxed{{{answer}}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(GraderConfig(workers=2, cpu_seconds=1.0, wall_seconds=20.0)) as grader:
        yield grader


def worker_pids(grader):
    return [worker.process.pid for worker in grader._workers]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --- verdicts -------------------------------------------------------------------------------------


def test_labelled_answers():
    mislabelled = [(gold, p) for gold, p in EQUAL if grade_answer(gold, p) != "correct"]
    mislabelled += [(gold, p) for gold, p in DIFFERENT if grade_answer(gold, p) != "wrong"]
    assert mislabelled == []


def test_workers_agree_with_the_pure_function_and_keep_the_order(grader):
    pairs = [
        pair
        for two in zip(EQUAL, DIFFERENT, strict=False)
        for pair in two
        if "}" not in pair[1] and "\\" not in pair[1]
    ]
    assert len(pairs) > 80
    graded = grader.grade([(gold, boxed(prediction)) for gold, prediction in pairs])
    assert [result.verdict for result in graded] == [grade_answer(*pair) for pair in pairs]
    assert [result.prediction for result in graded] == [
        prediction.strip()[: MAX_ANSWER + 1] for _, prediction in pairs
    ]


def test_response_without_an_answer_is_wrong(grader):
    (result,) = grader.grade([("42", "I do not know, 42 perhaps")])
    assert (result.verdict, result.prediction, result.reason) == ("wrong", "", "")


def test_unusable_gold_is_an_error_and_never_a_reward(grader):
    assert [gold for gold in BAD_GOLDS if gold_problem(gold) is None] == []
    assert [gold_problem(gold) for gold, _ in EQUAL + DIFFERENT if gold_problem(gold)] == []
    graded = grader.grade([(gold, boxed("5")) for gold in BAD_GOLDS])
    assert {result.verdict for result in graded} == {"error"} and all(
        result.reason for result in graded
    )
    assert grader.check_gold("42") is None
    assert grader.check_golds(["42", r"\frac{1}{", "B"]) == [
        None,
        r"math-verify cannot read the gold answer `\frac{1}{`",
        None,
    ]


# --- extraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"a \boxed{\frac{1}{2}} b", r"\frac{1}{2}"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{ \fbox{\boxed{5}} }", "5"),
        (r"\boxed{\boxed{1}+\boxed{2}}", r"\boxed{1}+\boxed{2}"),
        (r"\boxed{42 \boxed{43}}", r"42 \boxed{43}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"put it into \boxed{ please: \boxed{7}", "7"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"}}{ \boxed {9}", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("5", None),
    ],
)
def test_boxed_answers(text, answer):
    assert extract_answer(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no: <answer> 2 </answer>", "2"),
        (r"<answer>it is \boxed{3}</answer>", "3"),
        ("</answer><answer>", None),
        ("<answer>5", None),
        (r"\boxed{5}", None),
    ],
)
def test_tagged_answers(text, answer):
    assert extract_answer(text, "tag") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"5, so \boxed{6} 7", "6"),
        ("The answer is 42.", "42"),
        ("**Answer:** B", "B"),
        ("Final Answer:\n\n$\\frac12$\n", r"$\frac12$"),
        ("I count 42 apples", "42"),
        ("it is 42 or 43.", "42 or 43"),
        ("either $42$ or $43$ here", "$42$ or $43$"),
        ("The roots are 2, 3 and 5.", "2, 3 and 5"),
        ("Step 1\n\nthen it is 1,234", "1,234"),
        ("sum\n= 3/4", "= 3/4"),
        ("Paris", "Paris"),
        ("B", "B"),
        ("no idea at all what this could be", None),
        ("", None),
    ],
)
def test_answers_in_free_text(text, answer):
    assert extract_answer(text, "text") == answer


def test_extraction_is_linear():
    for text in HUGE:
        for where in ("boxed", "tag", "text"):
            start = time.process_time()
            extract_answer(text, where)
            unwrap_gold(text[:200_000])
            assert time.process_time() - start < 0.5, (text[:20], where)


def test_only_the_three_places_are_known():
    with pytest.raises(ValueError, match="anywhere"):
        Grader(GraderConfig(), where="anywhere")


# --- hostile answers ------------------------------------------------------------------------------


def test_hostile_answers_earn_nothing_and_harm_nobody(grader, tmp_path):
    mark = tmp_path / "mark"
    hostile = [boxed(answer.replace("MARK", str(mark))) for answer in EXHAUSTING + HOSTILE] + HUGE
    items = [item for text in hostile for item in (("42", text), ("1/2", boxed("0.5")))]
    start = time.monotonic()
    graded = grader.grade(items)
    assert time.monotonic() - start < len(EXHAUSTING) * (grader.cfg.wall_seconds + 5)
    assert [
        text[:40]
        for text, result in zip(hostile, graded[::2], strict=True)
        if result.verdict == "correct"
    ] == []
    assert {result.verdict for result in graded[1::2]} == {"correct"}
    limited = [result.reason for result in graded[: 2 * len(EXHAUSTING) : 2]]
    assert all(reason.startswith(("CPU limit", "wall limit")) for reason in limited), limited
    assert not mark.exists()


def test_nothing_is_evaluated():
    """No call of eval, exec, compile, parse_expr or sympify, and none of a shell, in the package's
    reward code.
    """
    for file in Path(rlfr_vlm.rewards.__file__).parent.glob("*.py"):
        calls = [
            node.func
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
        ]
        names = {getattr(call, "id", None) for call in calls if isinstance(call, ast.Name)}
        assert not names & {"eval", "exec", "compile", "parse_expr", "sympify", "__import__"}, file
        assert not {getattr(call, "attr", None) for call in calls} & {
            "system",
            "popen",
            "parse_expr",
            "sympify",
        }, file


# --- worker processes -----------------------------------------------------------------------------


def test_worker_is_a_bare_interpreter(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sentinel-key")
    with Grader(GraderConfig(workers=1, wall_seconds=2.0)) as grader:
        assert grader.grade([("42", boxed("42"))])[0].verdict == "correct"
        (pid,) = worker_pids(grader)
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in loaded and "_json" in loaded
        for secret in ("environ", "cmdline"):
            assert b"sentinel" not in Path(f"/proc/{pid}/{secret}").read_bytes()

        os.kill(pid, signal.SIGSTOP)  # the wall limit catches what uses no CPU time
        stopped, after = grader.grade([("42", boxed("42")), ("42", boxed("42"))])
        assert (stopped.verdict, after.verdict) == (
            "error",
            "correct",
        ) and stopped.reason.startswith("wall limit")
        assert not is_alive(pid)


def test_cpu_time_decides_not_wall_time():
    """One that gets CPU time is waited for beyond the wall limit, as on a busy machine."""
    with Grader(GraderConfig(workers=1, cpu_seconds=0.5, wall_seconds=0.2)) as grader:
        (result,) = grader.grade([("42", boxed(EXHAUSTING[0]))])
    assert result.reason == "CPU limit: no verdict within 0.5 s of CPU time"
    with Grader(GraderConfig(workers=1, cpu_seconds=60.0, wall_seconds=0.1)) as grader:
        (result,) = grader.grade([("42", boxed(EXHAUSTING[0]))])
    assert result.reason == "wall limit: no verdict within 1.2 s"


def test_a_gold_answer_that_a_busy_machine_did_not_come_to_is_asked_for_again():
    with Grader(GraderConfig(workers=1, wall_seconds=1.0)) as grader:
        assert grader.check_golds(["1"]) == [None]
        os.kill(grader._workers[0].process.pid, signal.SIGSTOP)
        assert grader.check_golds(["\\frac{1}{2}", "", "3"])[::2] == [None, None]


def test_killed_worker_costs_its_own_item_only(grader):
    grader.grade([("42", boxed("42"))] * 4)
    result = []
    calls = [("42", boxed(EXHAUSTING[0]))] + [("42", boxed("42"))] * 20
    thread = threading.Thread(target=lambda: result.extend(grader.grade(calls)))
    thread.start()
    busy = []
    wait_until(
        lambda: busy or [busy.append(w) for w in list(grader._workers) if w.item == 0] or busy
    )
    os.kill(busy[0].process.pid, signal.SIGKILL)
    thread.join(60)
    assert result[0].verdict == "error" and "-9" in result[0].reason
    assert [r.verdict for r in result[1:]] == ["correct"] * 20


def test_idle_worker_that_died_costs_nothing(grader):
    for pid in worker_pids(grader):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid))
    assert [r.verdict for r in grader.grade([("42", boxed("42"))] * 4)] == ["correct"] * 4


def test_interrupted_call_leaves_no_stale_reply(grader):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    grader.grade([("42", boxed("42"))] * 2)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            grader.grade([("42", boxed(EXHAUSTING[0]))] * 2)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert [r.verdict for r in grader.grade([("42", boxed("42")), ("42", boxed("43"))] * 3)] == [
        "correct",
        "wrong",
    ] * 3


def test_memory_limit_is_an_error():
    with Grader(
        GraderConfig.model_construct(workers=1, cpu_seconds=20.0, wall_seconds=60.0, memory_mib=8)
    ) as grader:
        deep, honest = grader.grade(
            [("42", boxed("(" * 100 + "1" + ")" * 100)), ("42", boxed("42"))]
        )
    assert deep.verdict == "error" and deep.reason.startswith("memory")
    assert honest.verdict == "correct"


def test_limits_of_a_worker(tmp_path):
    code = """
import sys
from rlfr_vlm.rewards.grader import _confine
_confine(64 << 20)
try: bytearray(200 << 20)
except MemoryError: print("memory")
try:
    with open(sys.argv[1], "w") as file: file.write("x")
except OSError: print("file")
"""
    file = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["memory", "file"]
    assert file.stat().st_size == 0


def test_calls_from_many_threads(grader):
    items = [("42", boxed("42")), ("1/2", boxed("0.5")), ("42", boxed("43"))] * 5
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: grader.grade(items)}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [[r.verdict for r in results[i]] for i in range(8)] == [
        ["correct", "correct", "wrong"] * 5
    ] * 8


def test_workers_end_with_a_killed_parent():
    code = """
import time
from rlfr_vlm.config import GraderConfig
from rlfr_vlm.rewards.grader import Grader
grader = Grader(GraderConfig(workers=1))
grader.grade([("42", "42")])
print(*(worker.process.pid for worker in grader._workers), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(is_alive, pids)), seconds=15)


def test_closed_or_forked_grader_refuses(monkeypatch):
    grader = Grader(GraderConfig(workers=1))
    (pid,) = worker_pids(grader)
    with monkeypatch.context() as patch:
        patch.setattr(grader, "_pid", os.getpid() + 1)
        with pytest.raises(RuntimeError, match="fork"):
            grader.grade([("42", "42")])
        grader.close()
        assert is_alive(pid)  # a fork's exit leaves the parent's workers alone
    grader.close()
    assert not is_alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade([("42", "42")])


def test_worker_that_cannot_start_stops_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        Grader(GraderConfig(workers=1)) as grader,
        pytest.raises(RuntimeError, match="did not start"),
    ):
        grader.grade([("42", boxed("42"))])
