"""Benchmarks through VLMEvalKit: its data sets and scoring, our ledger, a judge that fails."""

import base64
import csv
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from rlfr_vlm.cli import main
from rlfr_vlm.config import parse_config
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.evaluation import suite
from rlfr_vlm.evaluation.benchmarks import DEFINITIONS, find_benchmark, find_source, load_problems
from rlfr_vlm.evaluation.ledger import Answer, read_ledger
from rlfr_vlm.evaluation.vlm import adapter as vlm
from rlfr_vlm.evaluation.vlm.guards import (
    UNREADABLE,
    Judging,
    arithmetic,
    bounded_equal,
    guarded,
    refuse,
)
from tests.evaluation.scripted_server import ScriptedServer

ROOT = Path(__file__).parents[2]
KEY = "sk-sentinel-5e1f0c"
FAULTS = {
    "429": 0.08,
    "500": 0.08,
    "slow": 0.06,
    "garbage": 0.09,
    "half": 0.09,
}  # 40 % of the calls


def problems_of(cfg, name):
    benchmark, folder = find_benchmark(name)
    return load_problems(benchmark, find_source(cfg, benchmark, folder))


def picture(text):
    image = Image.new("RGB", (112, 56), "white")
    ImageDraw.Draw(image).text((20, 20), text, fill="black")
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_tsv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(
            file, list(dict.fromkeys(k for row in rows for k in row)), delimiter="\t"
        )
        table.writeheader()
        table.writerows(rows)
    return path


def row(index, question, answer, **more):
    return {
        "index": index,
        "question": question,
        "answer": answer,
        "image": picture(str(index)),
        **more,
    }


def mathvista_rows():
    """Sixteen rows with what the model under test says, and whether that is right."""
    said = []

    def free(kind, answer, says, right):
        said.append((kind, answer, "", "", says, right))

    def choice(answer, option, says, right):
        said.append(("text", answer, "['3', '5', '8']", option, says, right))

    free("integer", "14", "14", True)  # decided without a judge
    free("integer", "14", "13", False)
    free("integer", "7", "The sum is \\boxed{7}", True)
    free("integer", "7", "The sum is \\boxed{9}", False)
    free("float", "1.5", "1.5", True)
    free("float", "2.5", "So it is \\boxed{2.5}.", True)
    free("float", "2.5", "So it is \\boxed{2.4}.", False)
    free("text", "yes", "yes", True)
    free("text", "No", "It shows \\boxed{no}", True)
    free("text", "yes", "It shows \\boxed{no}", False)
    free("list", "[1, 2]", "[1,2]", True)
    free("list", "[3, 4]", "They are \\boxed{[3, 4]}", True)
    free("list", "[3, 4]", "They are \\boxed{[4, 3]}", False)
    choice("5", "B", "The answer is B", True)
    choice("8", "C", "Compare (A) with (B): \\boxed{C}", True)
    choice("8", "C", "Compare (A) with (C): \\boxed{A}", False)
    rows, answers, right = [], {}, {}
    for index, (kind, answer, choices, option, says, correct) in enumerate(said, 100):
        question_type = "multi_choice" if choices else "free_form"
        rows.append(
            row(index, f"Hint: look.\nQuestion: {index}?", answer, question_type=question_type, answer_type=kind, choices=choices or "[]",
                answer_option=option, task="digits", skills="['arithmetic reasoning']")
        )  # fmt: skip
        answers[str(index)], right[str(index)] = says, correct
    return rows, answers, right


def extract(request):
    """A judge that finds what is boxed."""
    text = str(request["messages"][-1]["content"])
    found = re.findall(r"\\boxed\{([^}]*)\}", text.rpartition("Model respone:")[2] or text)
    return found[-1] if found else "none"


class Says:
    """A model under test with a text for every problem."""

    identity = {"endpoint": "says"}  # noqa: RUF012

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def respond(self, samples, problems, benchmark):
        for problem, sample in samples:
            self.asked.append((problem, sample))
            yield [Answer(problem, sample, self.answers[problem], "stop", 5, 3, 0.1)]


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory, monkeypatch):
    """Pictures unpacked into the session's folder, and an environment that would change the judge."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("LOCAL_LLM", "another-judge")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("JUDGE_KEY", KEY)


def telling_seed(prompts):
    """A seed whose faults are of every kind, strike some prompts twice, and let the probe through."""
    for seed in range(100_000):
        server = ScriptedServer(faults=FAULTS, seed=seed)
        probe = [server.fault(p, n) for p in prompts if "Say yes" in p for n in range(6)]
        twice = [p for p in prompts if server.fault(p, 0) and server.fault(p, 1)]
        if (
            not any(probe)
            and len(twice) > 2
            and {server.fault(p, 0) for p in prompts} >= set(FAULTS)
        ):
            return seed
    raise AssertionError("no such seed")


def config(tmp_path, name, server=None, retries=1, **settings):
    tree = {"benchmarks": [name], "data_dir": str(tmp_path), **settings}
    if server is not None:
        judge = {
            "model": "scripted",
            "api_base": server.api_base,
            "key_env": "JUDGE_KEY",
            "timeout": 0.6,
            "retries": retries,
            "concurrency": 4,
        }
        tree |= {"judge": judge, "grading": "rule_then_judge"}
    return parse_config({"output_dir": str(tmp_path / "out"), "model": {"path": "x"}, "eval": tree})


def run(cfg, answers, out="out"):
    model = Says(answers)
    folder = Path(cfg.output_dir).parent / out
    with suite.judge_of(cfg) as judge:
        planned = suite.plan(cfg)
        summaries = suite.run_planned(cfg, planned, lambda _: model, judge, folder, print)
    return next(iter(summaries.values())), model, folder / planned[0].benchmark.name


def verdicts(folder):
    return {problem: v.verdict for (problem, _), v in read_ledger(folder)[2].items()}


def expected(right):
    return {name: "correct" if correct else "wrong" for name, correct in right.items()}


# -- without VLMEvalKit ----------------------------------------------------------------------------


def test_only_literals_and_arithmetic_are_read(tmp_path):
    assert (
        arithmetic("['a', 'b']") == ["a", "b"]
        and arithmetic("1/4 + 2**-2") == 0.5
        and arithmetic(" -3 ") == -3
    )
    for text in (
        "__import__('os').system('x')",
        "9**9**9**9",
        "(1).__class__",
        "[].append(1)",
        "x",
        "'a' * 10**9",
        "(" * 500 + ")" * 500,
    ):
        with pytest.raises(UNREADABLE):
            arithmetic(text)
    same = bounded_equal(lambda a, b: False)
    assert (
        same("0.5", "1/2")
        and same(" Three ", "three")
        and not same("5", "6")
        and not same("x" * 300, "5")
    )
    scope = {
        "__name__": "vlmeval.dataset.utils.any",
        "eval": guarded(eval, arithmetic),
        "exec": guarded(exec, refuse),
    }
    exec("def run(text): return eval(text)\ndef hurt(text): exec(text)", scope)
    assert scope["run"]("[1, 2]") == [1, 2]
    with pytest.raises(ValueError, match="arithmetic"):
        scope["run"](f"open({str(tmp_path / 'x')!r}, 'w')")
    with pytest.raises(PermissionError):
        scope["hurt"](f"open({str(tmp_path / 'x')!r}, 'w')")
    scope["__name__"] = "sympy.parsing.sympy_parser"
    scope |= {"Integer": int, "Float": float}
    assert scope["run"]("Float('0.5') + Integer(2)") == 2.5
    for text in ("Symbol('x')", "Integer.__subclasses__()", "(lambda: 1)()", "__import__('os')"):
        with pytest.raises(PermissionError):
            scope["run"](text)
    assert (
        guarded(eval, arithmetic)("KEY + tmp_path.name") == KEY + tmp_path.name
    )  # everybody else's
    assert not (tmp_path / "x").exists()


def test_missing_file_and_column_are_named(tmp_path):
    with pytest.raises(UserError, match=r"MathVista_MINI.tsv does not exist"):
        suite.plan(config(tmp_path, "mathvista_mini"))
    write_tsv(
        tmp_path / "MathVista_MINI.tsv",
        [{k: v for k, v in mathvista_rows()[0][0].items() if k not in ("skills", "image")}],
    )
    with pytest.raises(UserError, match=r"MathVista_MINI.tsv: no column `skills`, `image`"):
        suite.plan(config(tmp_path, "mathvista_mini"))
    with pytest.raises(UserError, match="vlmeval/NAME"):
        find_benchmark("vlmeval/../x")


def test_every_definition_is_read():
    names = [p.stem for p in DEFINITIONS.glob("*.yaml")]
    kit = {find_benchmark(name)[0].vlmeval for name in names} - {None}
    assert {
        "MathVista_MINI",
        "MathVerse_MINI",
        "MathVision",
        "MathVision_MINI",
        "WeMath",
        "LogicVista",
        "DynaMath",
        "MMMU_DEV_VAL",
    } <= kit


def test_an_env_file_in_the_installation_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / "vlmeval/__init__.py").touch()
    (tmp_path / ".env").write_text("LOCAL_LLM=x")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"\.env"):
        vlm.Kit()


def test_replies_of_the_judge_are_kept_and_failures_forgotten(tmp_path):
    first = Judging(None, tmp_path / "judge.jsonl", {"1": ""})
    first.write({"said": {"a": "yes", "b": "no"}})
    first.said["1"] = [("b", "no")]
    first.lose("1", "unread")
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('\n{"said": {"c": "to')
    again = Judging(None, tmp_path / "judge.jsonl", {})
    again.write({"said": {"d": "more"}})
    assert again.known == {"a": "yes"}
    assert Judging(None, tmp_path / "judge.jsonl", {}).known == {"a": "yes", "d": "more"}


def test_own_image_set_without_code(tmp_path):
    """A YAML and a TSV: pictures in it, by the index of another row, or in files; graded by our
    rules.
    """
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    base = dict.fromkeys(("A", "B", "image_path"), "")
    rows = [
        {**row(1, "How many?", "14"), **base},
        {**base, **row(2, "Which?", "B", A="13", B="14"), "image": "1"},
    ]
    rows.append({**row(3, "And here?", "3"), **base, "image": "", "image_path": "a.png"})
    write_tsv(tmp_path / "mine.tsv", rows)
    (tmp_path / "mine.yaml").write_text("name: mine\nfile: mine.tsv\n")
    cfg = config(tmp_path, str(tmp_path / "mine.yaml"))
    problems = problems_of(cfg, str(tmp_path / "mine.yaml"))
    assert [p.golds for p in problems] == [("14",), ("B", "14"), ("3",)]
    assert problems[0].prompt.images == problems[1].prompt.images and problems[2].prompt.images == (
        "a.png",
    )
    assert problems[1].prompt.messages[0]["content"][-1]["text"] == "Which?\nA. 13\nB. 14"
    summary, _, folder = run(cfg, {"1": "\\boxed{14}", "2": "\\boxed{B}", "3": "\\boxed{4}"})
    assert summary["verdicts"]["correct"] == 2 and verdicts(folder)["3"] == "wrong"
    write_tsv(tmp_path / "mine.tsv", [*rows, {**row(1, "again", "1"), **base}])
    with pytest.raises(UserError, match=r"mine\.tsv:5: index 1 again"):
        problems_of(cfg, str(tmp_path / "mine.yaml"))


needs_kit = pytest.mark.skipif(
    importlib.util.find_spec("vlmeval") is None, reason="needs the extra `eval`"
)


# -- with it ---------------------------------------------------------------------------------------


@needs_kit
def test_mathvista_with_a_flaky_judge_equals_a_good_one(tmp_path, capfd):
    rows, answers, right = mathvista_rows()
    write_tsv(tmp_path / "MathVista_MINI.tsv", rows)
    with ScriptedServer(extract, key=KEY) as good:
        cfg = config(tmp_path, "mathvista_mini", good)
        summary, model, folder = run(cfg, answers, "good")
        assert verdicts(folder) == expected(right)
        assert summary["accuracy"] == sum(right.values()) / 16
        score = json.loads((folder / "vlmeval_score.json").read_text())
        assert score["value"] == 100 * sum(right.values()) / 16 and score["num_scored"] == 16
        calls = sum(good.count.values())
        assert {b["model"] for b in good.bodies} == {
            "scripted"
        } and calls <= 1 + 11  # the probe, and one a row that rules do not decide
        again, resumed, _ = run(cfg, answers, "good")
        assert (
            again["accuracy"] == summary["accuracy"]
            and not resumed.asked
            and len(model.asked) == 16
        )
        assert sum(good.count.values()) == calls + 1  # the probe
    with ScriptedServer(extract, faults=FAULTS, seed=telling_seed(good.count), key=KEY) as flaky:
        cfg = config(tmp_path, "mathvista_mini", flaky, retries=0)
        for _ in range(6):  # stopped and started again until every verdict is there
            try:
                _, _, folder = run(cfg, answers, "flaky")
                break
            except StoppedError:
                assert all(
                    v in ("failed", expected(right)[name])
                    for name, v in verdicts(folder.parents[1] / "flaky/mathvista_mini").items()
                )
        assert set(flaky.met) == set(FAULTS)
        assert all(n == 1 for prompt, n in flaky.answered.items() if "Extracted" in prompt)
    assert verdicts(folder) == expected(right)
    assert json.loads((folder / "vlmeval_score.json").read_text())["table"] == score["table"]
    words = capfd.readouterr()
    assert KEY not in words.out + words.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


@needs_kit
def test_a_dead_judge_makes_no_wrong_answers(tmp_path):
    rows, answers, right = mathvista_rows()
    write_tsv(tmp_path / "MathVista_MINI.tsv", rows)
    with ScriptedServer(
        extract, key=KEY, faults=lambda prompt, _: "400" if "Extracted" in prompt else None
    ) as server:
        cfg = config(tmp_path, "mathvista_mini", server)
        with pytest.raises(StoppedError, match="no score"):
            run(cfg, answers)
        found = verdicts(tmp_path / "out/mathvista_mini")
        assert list(found.values()).count("failed") == 11
        assert all(v in ("failed", expected(right)[name]) for name, v in found.items())
        server.faults = {}
        summary, model, folder = run(cfg, answers)
    assert (
        verdicts(folder) == expected(right)
        and not model.asked
        and summary["verdicts"]["failed"] == 0
    )


def option_rows(name):
    """Three rows of multiple choice: decided by rules, by the judge, and one whose judge names no
    option.
    """
    more = {
        "MMMU_DEV_VAL": {"category": "Math", "l2-category": "Science", "split": "validation"},
        "WeMath": {
            "ID": "1",
            "key": "2steps_1",
            "split": "testmini",
            "knowledge concept": "Direction",
        },
    }[name]
    mark = "<image 1> " if name.startswith("MMMU") else ""
    return [
        row(i, f"{mark}Which one, {i}?", "B", A="three", B="fourteen", C="eight", **more)
        for i in (1, 2, 3)
    ]


CASES = {  # rows, answers, verdicts with a judge that says what is boxed, without one
    "MathVision_MINI": (
        [row(i, f"{i}?", gold, choices=choices, category="counting") for i, gold, choices in
         [(1, "6", "[]"), (2, "\\frac{1}{2}", "[]"), (3, "B", "['5', '6']"), (4, "3", "[]"), (5, "3", "[]")]],
        ["6", "\\boxed{0.5}", "The answer is B", "HOSTILE", "\\boxed{HOSTILE}"],
        ["correct", "correct", "correct", "wrong", "wrong"],
        ["correct", "correct", "correct", "unjudged", "unjudged"],
    ),
    "MathVerse_MINI": (
        [row(i, f"{i}?", "14", question_for_eval="?", problem_version="Vision Intensive", query_cot="?",
             metadata="{'subject': 'Plane Geometry', 'subfield': 'Area'}") for i in (1, 2, 3)],
        ["\\boxed{14}", "\\boxed{13}", "\\boxed{maybe}"],
        ["correct", "wrong", "failed"],  # the judge of the third never says 0 or 1
        ["unjudged"] * 3,
    ),
    "LogicVista": (
        [row(i, f"{i}?", "A, C", skill="['inductive']") for i in (1, 2, 3)],
        ["\\boxed{CA}", "\\boxed{B}", "\\boxed{i do not know}"],
        ["correct", "wrong", "failed"],
        ["unjudged"] * 3,
    ),
    "DynaMath": (
        [row(i, f"{i}?", gold, answer_type=kind, subject="algebra", knowledge_level="high school", varid=1, qid=i)
         for i, gold, kind in [(0, "2.5", "float"), (1, "B", "multiple choice"), (2, "a b", "text"), (3, "2.5", "float"), (4, "a "
             "b", "text")]],
        ['{"short answer": "2.500"}', "So \\boxed{B}: A or C are not", "", "I think \\boxed{of "
            "nothing}", '{"short answer": 7}'],
        ["correct", "correct", "wrong", "failed", "wrong"],
        ["correct", "correct", "wrong", "unjudged", "wrong"],
    ),
    "MMMU_DEV_VAL": (
        option_rows("MMMU_DEV_VAL"),
        ["Answer: B", "Neither \\boxed{A} nor C", "\\boxed{of A and C both}"],
        ["correct", "wrong", "failed"],
        ["correct", "unjudged", "unjudged"],
    ),
    "WeMath": (
        option_rows("WeMath"),
        ["fourteen", "Not A nor C: \\boxed{B}", "\\boxed{of A and C both}"],
        ["correct", "correct", "failed"],
        ["correct", "unjudged", "unjudged"],
    ),
    "VisuLogic": (
        [row(i, f"{i}?", "B", category="Other") for i in (1, 2, 3)],
        ["\\boxed{B}", "Answer: A", "no idea"],
        ["correct", "wrong", "wrong"],
        ["correct", "wrong", "wrong"],
    ),
}  # fmt: skip


def word(request):
    """A judge that says what the model under test boxed; asked to compare, 1 where that is the gold
    answer.
    """
    text = str(request["messages"][-1]["content"])
    if compared := re.search(
        r"\[Standard Answer\]: (.*)\n\s*\[Model_answer\] : (.*)\n\s*Judgement:$", text
    ):
        return {"maybe": "perhaps"}.get(compared[2], str(int(compared[1] == compared[2])))
    found = re.findall(r"\\boxed\{([^}]*)\}", text)
    return found[-1] if found else "none"


@needs_kit
@pytest.mark.parametrize(
    "name",
    [
        name if name == "MathVision_MINI" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_verdicts_of_every_set(tmp_path, name):
    rows, answers, with_judge, without = CASES[name]
    hostile = f"__import__('os').system('touch {tmp_path / 'hostile'}')"
    said = {
        str(r["index"]): a.replace("HOSTILE", hostile) for r, a in zip(rows, answers, strict=True)
    }
    write_tsv(tmp_path / f"{name}.tsv", rows)
    with ScriptedServer(word, key=KEY) as server:
        for out, judge, wanted in (("with", server, with_judge), ("without", None, without)):
            cfg = config(tmp_path, f"vlmeval/{name}", judge, retries=0)
            if {"unjudged", "failed"} & set(wanted):
                with pytest.raises(StoppedError, match="no score"):
                    run(cfg, said, out)
            else:
                assert run(cfg, said, out)[0]["accuracy"] == wanted.count("correct") / len(wanted)
            assert list(verdicts(tmp_path / out / name).values()) == wanted
    assert not (tmp_path / "hostile").exists()


@needs_kit
@pytest.mark.slow
def test_headlines_are_the_tables_own(tmp_path):
    """DynaMath's worst case: a question counts where all its variants are right."""
    kind = {"answer_type": "float", "subject": "algebra", "knowledge_level": "high school"}
    rows = [
        row(2 * v + q, f"{q}{v}?", "2.5", varid=v + 1, qid=q, **kind)
        for v in (0, 1)
        for q in (0, 1)
    ]
    write_tsv(tmp_path / "DynaMath.tsv", rows)
    summary, _, folder = run(
        config(tmp_path, "dynamath"), {"0": "2.5", "1": "2.5", "2": "2.5", "3": "7"}
    )
    assert summary["accuracy"] == 0.75
    [score] = summary["vlmeval"]
    assert (score["metric"], score["value"], score["num_scored"]) == (
        "Setting=Worst Case|Overall",
        0.5,
        4,
    )
    assert list((folder / "vlmeval").glob("*_score.csv"))


@needs_kit
@pytest.mark.slow
def test_a_small_model_from_the_command(tmp_path, capsys):
    """The vision-language model of this repository on sixteen rows, asked with VLMEvalKit's
    prompts, stopped and started again.
    """
    rows, _, _ = mathvista_rows()
    write_tsv(tmp_path / "MathVista_MINI.tsv", rows)
    with ScriptedServer(extract, faults=FAULTS, key=KEY) as server:
        tree = json.loads(
            config(
                tmp_path, "mathvista_mini", server, retries=4, max_new_tokens=12
            ).model_dump_json()
        )
        tree["model"] = {"path": str(ROOT / "rlfr_vlm/demo/tiny_vlm"), "dtype": "float32"}
        (tmp_path / "eval.yaml").write_text(json.dumps(tree))
        for _ in range(4):
            with pytest.raises(SystemExit) as ended:
                main(["eval", "--config", str(tmp_path / "eval.yaml")])
            if ended.value.code == 0:
                break
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    protocol, answers, found = read_ledger(tmp_path / "out/mathvista_mini")
    assert len(answers) == 16 and {v.verdict for v in found.values()} <= {"correct", "wrong"}
    assert protocol["grading"]["prompt"] == "vlmeval 0.0.20 MathVista_MINI"
    lines = (tmp_path / "out/mathvista_mini/ledger.jsonl").read_text().splitlines()
    assert sum('"kind": "response"' in line for line in lines) == 16
    assert json.loads((tmp_path / "out/mathvista_mini/problems.jsonl").read_text().splitlines()[0])[
        "question"
    ].startswith("<image>Hint: look.")
    assert KEY not in said.out + said.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


@needs_kit
@pytest.mark.slow
@pytest.mark.skipif(
    "RLFR_BENCHMARKS" not in os.environ,
    reason="RLFR_BENCHMARKS is not set to a folder with benchmark files",
)
def test_mathvision_mini_itself(tmp_path):
    """All 304 problems: gold answers are right, others are wrong, pictures open."""
    source = next(Path(os.environ["RLFR_BENCHMARKS"]).rglob("MathVision_MINI.tsv"))
    with ScriptedServer(word, key=KEY) as server:
        cfg = config(source.parent, "mathvision_mini", server).model_copy(
            update={"output_dir": str(tmp_path / "out")}
        )
        [planned] = suite.plan(cfg)
        golds = {p.prompt.id: p.golds[0] for p in planned.problems}
        said = {
            name: gold if i % 2 else "It must be \\boxed{qqq}."
            for i, (name, gold) in enumerate(golds.items())
        }
        summary, _, folder = run(cfg, said)
    assert len(golds) == 304 and {planned.problems[0].prompt.origin} == {"MathVision_MINI.tsv:4"}
    assert summary["verdicts"]["correct"] == 152 and summary["accuracy"] == 0.5
    assert summary["vlmeval"][0]["value"] == 50.0
    assert len(list((folder / "images").glob("*.png"))) > 250
