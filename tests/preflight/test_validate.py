"""validate: every planted defect is found where it is and nothing else, training agrees row by row,
and no row can end it.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml

from rlfr_vlm.cli import main
from rlfr_vlm.commands import checked
from rlfr_vlm.config import DataConfig, load_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import load_prompts, parse_row
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import encode_all
from rlfr_vlm.fitting.fit_solutions import Experts
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.preflight.figures import bins
from rlfr_vlm.preflight.kinds import KINDS
from rlfr_vlm.preflight.notices import answer_notices, column_notices, text_notices
from rlfr_vlm.preflight.scan import Finding, line_of
from rlfr_vlm.preflight.show import first_rows, histogram
from rlfr_vlm.preflight.workers import LIBRARIES
from rlfr_vlm.rewards.grader import Grader
from tests.preflight.planted import EXPERT_SPOILERS, SPOILERS, clean, write
from tests.runs import cli

ROOT = Path(__file__).parents[2]
FILES = {"train": "train", "eval": "test", "expert": "expert"}
SETTINGS = {
    "data": {"max_prompt_tokens": 700},
    "reward": {"format": "boxed", "format_weight": 0.5},
    "flow": {"fit": {"max_tokens": 800}},
    "rollout": {"num_prompts": 8},
}


def config(folder, files=FILES, **sections):
    """A config file for data under folder/data, results under folder/run."""
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(ROOT / "rlfr_vlm/demo/tiny_vlm")},
        **SETTINGS,
        **sections,
    }
    tree["data"] = {
        **tree["data"],
        **{role: str(folder / "data" / f"{name}.jsonl") for role, name in files.items()},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def validate(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exited:
        main(["validate", *map(str, arguments)])
    output = capsys.readouterr()
    return exited.value.code, output.out, output.err


def findings(folder):
    data = json.loads((folder / "run/validate/validate.json").read_text())
    return data, {(found["role"], found["line"], found["kind"]) for found in data["findings"]}


@pytest.fixture(autouse=True, scope="module")
def fork_server():
    """With the model's libraries: this process validates with and without a model, and the first
    use would decide for all.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(LIBRARIES)
    forkserver.ensure_running()


def rows_of(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Data with every row-level defect, validated once: the folder, what must be found, exit code
    and what was printed.
    """
    folder = tmp_path_factory.mktemp("planted")
    expected = write(folder / "data")
    done = cli("validate", "--config", config(folder), "--clean")
    return folder, expected, done


def test_every_planted_defect_is_found_and_nothing_else(planted):
    folder, expected, done = planted
    assert done.returncode == 2, done.stderr
    assert findings(folder)[1] == expected
    of_files = {"file_unreadable", "too_few_rows", "row_crash", "answer_majority", "text_model"}
    assert {
        kind for *_, kind in expected
    } == KINDS.keys() - of_files  # these have tests of their own


def test_training_refuses_the_same_rows_for_the_same_reasons(planted):
    """Everything that reads rows in training and in the fit of the flow, against validate's errors,
    both ways.
    """
    folder, expected, _ = planted
    cfg = load_config(
        folder / "config.yaml",
        ("data.on_bad_row=skip", "data.max_bad_frac=1.0", "model.device=cpu"),
    )
    policy = Policy(cfg.model, weights=False)
    refused = set()
    for role, source in (
        ("train", cfg.data.train),
        ("eval", cfg.data.eval),
        ("expert", cfg.data.expert),
    ):
        bad = BadRows(cfg.data)
        prompts = load_prompts(
            source, cfg.data, bad, need="response" if role == "expert" else "answer"
        )
        lines = {row.id: line_of(row.id) for row in bad.rows} | {
            p.id: line_of(p.origin) for p in prompts
        }
        if role != "expert":
            with Grader(cfg.reward.grader, cfg.reward.answer) as grader:
                prompts = checked(cfg, prompts, grader, bad)
        check = Experts(policy, cfg.flow.fit.max_tokens).check if role == "expert" else None
        encode_all(prompts, Renderer(policy, cfg.data, source), bad, check)
        refused |= {(role, lines[row.id], row.kind) for row in bad.rows}
    ours = {
        (role, line, KINDS[kind].refused_as)
        for role, line, kind in expected
        if KINDS[kind].severity == "error"
    }
    assert refused == ours


def test_what_is_written_and_said(planted):
    folder, expected, done = planted
    errors = {
        (role, line, kind) for role, line, kind in expected if KINDS[kind].severity == "error"
    }
    out = folder / "run/validate"
    for name, wanted in (("quarantine", errors), ("warnings", expected - errors)):
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert {(found["role"], found["line"], found["kind"]) for found in lines} == wanted
        assert all(found["reason"] and found["file"].endswith(".jsonl") for found in lines)
    assert re.search(
        r"train\.jsonl:\d+ \(row train-\d+\): image_pixels: images/bomb\.png has 12000 x 12000 "
        r"pixels",
        done.stderr,
    )
    assert done.stderr.count("image_broken") == 1  # the first of each kind, as it is found
    assert "Traceback" not in done.stderr
    for kind in {kind for *_, kind in expected}:
        assert kind in done.stdout
    assert "data.max_prompt_tokens=700 ---" in done.stdout
    assert f"{len({(role, line) for role, line, _ in errors})} bad rows" in done.stdout
    figures = findings(folder)[0]["files"]
    assert figures["train"]["rows"] == 260 and figures["train"]["overlap_with_eval"] == 4
    assert figures["train"]["duplicates"] == 2 and figures["train"]["conflicts"] == 1
    unreadable = sum(kind == "answer_unreadable" for *_, kind in expected)
    assert (
        0
        < 1 - figures["train"]["gold_parse_rate"]
        == pytest.approx(unreadable / (260 - parse_failures(expected)))
    )


def parse_failures(expected):
    """Training rows that never reach the grader."""
    early = {"schema", "media", "image_count"}
    missing = {"answer_missing", "answer_type"}
    return len(
        {
            line
            for role, line, kind in expected
            if role == "train" and (KINDS[kind].refused_as in early or kind in missing)
        }
    )


def test_the_clean_copies_are_what_training_can_read(planted):
    folder, expected, done = planted
    settings = findings_settings(done.stdout)
    cfg = load_config(folder / "config.yaml", (*settings, "model.device=cpu"))
    policy = Policy(cfg.model, weights=False)
    for role, source in (
        ("train", cfg.data.train),
        ("eval", cfg.data.eval),
        ("expert", cfg.data.expert),
    ):
        original = (folder / "data" / f"{FILES[role]}.jsonl").read_bytes().splitlines()
        bad = {line for r, line, kind in expected if r == role and KINDS[kind].severity == "error"}
        assert Path(source).read_bytes().splitlines() == [
            text for i, text in enumerate(original, 1) if i not in bad
        ]
        stop = BadRows(cfg.data)
        prompts = load_prompts(
            source, cfg.data, stop, need="response" if role == "expert" else "answer"
        )
        assert len(encode_all(prompts, Renderer(policy, cfg.data, source), stop)) == len(prompts)


def findings_settings(stdout):
    line = next(line for line in stdout.splitlines() if line.startswith("without them: "))
    return re.findall(r"'([^']*)'", line)


def test_clean_data_is_clean_and_a_quick_look_needs_no_config(tmp_path, capsys):
    rows_of(tmp_path / "rows.jsonl", [clean(tmp_path, "train", i, i % 3 == 0) for i in range(30)])
    rows_of(tmp_path / "held.jsonl", [clean(tmp_path, "eval", i, False) for i in range(5)])
    code, out, err = validate(
        capsys,
        tmp_path / "rows.jsonl",
        "--test",
        tmp_path / "held.jsonl",
        "--out",
        tmp_path / "out",
    )
    assert (code, err) == (0, "")
    assert "no bad rows, 0 warnings" in out and "tokens were not counted: no model was given" in out
    assert (tmp_path / "out/quarantine.jsonl").read_text() == ""
    code, out, _ = validate(
        capsys,
        tmp_path / "rows.jsonl",
        "--model",
        ROOT / "rlfr_vlm/demo/tiny_vlm",
        "--out",
        tmp_path / "out",
        "--format",
        "json",
    )
    data = json.loads(out)
    assert (
        code == 0
        and data["files"]["train"]["tokens"]["max"] < 100
        and data["files"]["train"]["pictures"] == 10
    )


def test_pictures_for_a_text_model_too_few_rows_and_a_common_answer(model_folder, tmp_path, capsys):
    rows = [
        clean(tmp_path / "data", "train", i, i == 7) | ({"answer": "12"} if i % 2 or i == 2 else {})
        for i in range(30)
    ]
    rows_of(tmp_path / "data/train.jsonl", rows)
    path = config(
        tmp_path,
        {"train": "train"},
        model={"path": model_folder("llama")},
        rollout={"num_prompts": 30},
    )
    code, out, _ = validate(capsys, "--config", path)
    assert code == 2
    assert findings(tmp_path)[1] == {
        ("train", 8, "text_model"),
        ("train", None, "too_few_rows"),
        ("train", None, "answer_majority"),
    }
    assert (
        "rollout.num_prompts=30 exceeds the 29 usable rows"
        in (tmp_path / "run/validate/quarantine.jsonl").read_text()
    )
    assert "1 bad rows, 1 warnings: training would stop at the first" in out


def test_a_warning_can_be_quarantined(tmp_path, capsys):
    rows_of(
        tmp_path / "data/train.jsonl",
        [clean(tmp_path, "train", i % 9, False) | {"id": i} for i in range(12)],
    )
    path = config(tmp_path, {"train": "train"})
    assert validate(capsys, "--config", path, "--no-model")[0] == 0
    code, out, _ = validate(
        capsys, "--config", path, "--no-model", "--quarantine", "duplicate_row", "--clean"
    )
    assert code == 2 and "3 rows quarantined, 0 warnings: training would take all of them" in out
    assert len((tmp_path / "run/validate/clean/train.jsonl").read_text().splitlines()) == 9
    code, _, err = validate(capsys, "--config", path, "--no-model", "--quarantine", "duplicates")
    assert code == 2 and "no kind `duplicates`" in err


def test_a_reward_function_reads_its_gold_answers_itself(tmp_path, capsys):
    rows_of(
        tmp_path / "data/train.jsonl",
        [
            clean(tmp_path, "train", i, False) | {"answer": "\\frac{" if i else "None"}
            for i in range(8)
        ],
    )
    (tmp_path / "own.py").write_text("def score(prompts, completions): ...\n")
    for function, kinds in (
        (f"{tmp_path}/own.py:score", set()),
        (None, {"answer_unreadable", "answer_placeholder", "too_few_rows"}),
    ):
        path = config(tmp_path, {"train": "train"}, reward={"function": function})
        assert validate(capsys, "--config", path, "--no-model")[0] == (2 if kinds else 0)
        assert {kind for *_, kind in findings(tmp_path)[1]} == kinds


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_other_formats_and_their_copies(tmp_path, capsys, name):
    rows = [
        {"prompt": f"What is {i} plus {i}?", "answer": "" if i == 3 else str(2 * i)}
        for i in range(6)
    ]
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    code, _, err = validate(capsys, tmp_path / name, "--out", tmp_path / "out", "--clean")
    assert code == 2 and f"{name}[3]: answer_missing" in err
    copied = load_prompts(str(tmp_path / "out/clean" / name), DataConfig(), BadRows(DataConfig()))
    assert [p.answer for p in copied] == ["0", "2", "4", "8", "10"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "gone.jsonl does not exist"),
        ([], "there is no data to validate"),
        (["a.jsonl", "b.jsonl"], "one data file at a time"),
        (["empty.jsonl"], "no rows"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["ok.jsonl", "--model", "/nowhere/at/all"], "does not load"),
        (["ok.jsonl", "data.max_prompt_token=3"], "did you mean `data.max_prompt_tokens`"),
    ],
)
def test_what_cannot_be_validated_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    rows_of(tmp_path / "ok.jsonl", [{"prompt": "x", "answer": "1"}])
    code, _, err = validate(capsys, *arguments)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_template_that_fails_is_the_models_fault_and_one_line(tmp_path, model_folder):
    model = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    rows_of(tmp_path / "ok.jsonl", [{"prompt": "x", "answer": "1"}])
    done = cli(
        "validate",
        str(tmp_path / "ok.jsonl"),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        r"^rlfr-vlm validate: model\.path: the chat template of `.*model` fails: ",
        done.stderr.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("fault", "lost"),
    [("validate_row:6:kill", set()), ("validate_row:1:kill", {1, 2, 3, 4, 5, 6, 7, 8})],
)
def test_a_process_that_dies_costs_no_other_row(tmp_path, fault, lost):
    """Each process dies at its sixth row: every row comes back in another. Each at its first: all
    are named, and it ends.
    """
    rows_of(tmp_path / "data/train.jsonl", [clean(tmp_path, "train", i, False) for i in range(8)])
    done = cli(
        "validate",
        "--config",
        config(tmp_path, {"train": "train"}),
        "--no-model",
        "rollout.num_prompts=1",
        fault=fault,
    )
    data, found = findings(tmp_path)
    assert {line for _, line, kind in found if kind == "row_crash"} == lost, done.stderr
    assert data["files"]["train"]["rows"] == 8 and len(data["lost_processes"]) >= 1
    assert "died (exit status -9)" in data["lost_processes"][0]


def test_a_row_that_hangs_is_named(tmp_path):
    rows_of(tmp_path / "rows.jsonl", [clean(tmp_path, "train", i, False) for i in range(2)])
    code = (
        "from pathlib import Path\n"
        "from rlfr_vlm.config import load_config\n"
        "from rlfr_vlm.preflight.verb import Options, validate\n"
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    cfg = load_config(None, ('output_dir=.', 'model.path=none', "
        "f'data.train={sys.argv[1]}/rows.jsonl', 'rollout.num_prompts=1'))\n"
        "    sys.exit(validate(cfg, Options(Path(sys.argv[1]) / 'run/validate', 1, False, "
        "row_seconds=1.0)))\n"
    )
    script = tmp_path / "look.py"
    script.write_text(code)
    environment = {**os.environ, "RLFR_FAULT": "validate_row:1:stop", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    data, found = findings(tmp_path)
    assert {kind for *_, kind in found} == {"row_crash", "too_few_rows"}
    assert (
        len(
            [
                f
                for f in data["findings"]
                if f["kind"] == "row_crash" and "did not come back within 1 s" in f["reason"]
            ]
        )
        == 2
    )


# -- parts -----------------------------------------------------------------------------------------

CFG = DataConfig()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which of (A) 3 (B) 4 is larger?", "answer": "B"},
        {"prompt": "Which point is nearest, A, B or C?", "answer": "(C)"},
        {"prompt": "<image>Which point is nearest?", "images": ["a.png"], "answer": "D"},
        {
            "prompt": "Choose.\nA. cat\nB. dog\nC. a very long description of some animal that "
            "nobody knows at all",
            "answer": "C",
        },
        {"prompt": "Put your final answer within \\boxed{}. What is 5 + 7?", "answer": "12"},
        {"prompt": "The answer is 5 more than 7. What is it?", "answer": "12"},
        {"prompt": "The answer is 12 more than 7. What is it?", "answer": "12"},
        {
            "prompt": "Draw a picture of 3 boxes; how many figures are there?",
            "answer": "no solution",
        },
        {"prompt": "Ω ≤ π² naïve café", "answer": "\\frac{1}{2} \\text{ of the whole square}"},
        {
            "prompt": "x",
            "answer": "1",
            "image_id": 4,
            "idx": 3,
            "options": ["A"],
            "level": 5,
            "questions": [],
            "answers": ["1", "2"],
        },
    ],
)
def test_usual_rows_raise_no_alarm(row):
    prompt = parse_row(row, "f:1", CFG)
    text = prompt.messages[0]["content"][-1]["text"]
    assert [
        *column_notices(row, "answer"),
        *text_notices(prompt, text, None),
        *answer_notices(prompt, text),
    ] == []


def test_every_kind_is_planted_or_has_a_test_and_is_in_the_docs():
    planted_kinds = {kind for kinds, _ in (*SPOILERS, *EXPERT_SPOILERS) for kind in kinds}
    assert len(planted_kinds) >= 40 and planted_kinds <= KINDS.keys()
    docs = (ROOT / "docs/validate.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9_]+)` \|", docs, re.MULTILINE)
    assert listed == list(KINDS)
    for kind in KINDS.values():
        assert f"| `{kind.id}` | {kind.severity} | {kind.meaning} | {kind.do} |" in docs


def test_the_histogram_marks_the_limit():
    assert bins([1, 2, 3, 10], 5) == [
        [1, 1, 1],
        [2, 2, 1],
        [3, 3, 1],
        [4, 4, 0],
        [5, 5, 0],
        [6, 6, 0],
        [7, 7, 0],
        [8, 8, 0],
        [9, 9, 0],
        [10, 10, 1],
    ]
    many = bins([*range(1, 1001), 9000], 3000)
    assert many[0] == [1, 100, 100] and many[-2:] == [[1001, 3000, 0], [3001, 9000, 1]]
    assert sum(count for *_, count in many) == 1001
    lines = histogram(many, 3000)
    assert "data.max_prompt_tokens=3000" in lines[-2] and lines[-1].split()[0] == "3001-9000"
    assert "data.max_prompt_tokens=9000" in histogram(many, 9000)[-1]


def test_rows_are_named_shortly():
    found = [
        Finding(f"d/{file}", "train", line, "", "image_broken", "error", "")
        for file, line in [("a.jsonl", 3), ("a.jsonl", 9), ("b.parquet", 0)]
    ]
    assert first_rows(found) == "a.jsonl:3, 9\nb.parquet[0]"
    assert first_rows(found + found) == "a.jsonl:3, 9, 3\nb.parquet[0], ..."
    assert (
        first_rows([Finding("d/a.jsonl", "train", None, "", "too_few_rows", "error", "")])
        == "a.jsonl"
    )


@pytest.mark.slow
def test_ten_thousand_rows_within_two_minutes(tmp_path):
    """10,000 rows with 2,000 photographs of 640 x 480, each defect three times: all found, nothing
    else, below 120 s on two cores.
    """
    expected = write(tmp_path / "data", 10_000, 2_000, 3, (640, 480), "jpg")
    done = cli("validate", "--config", config(tmp_path), timeout=600)
    data, found = findings(tmp_path)
    assert found == expected, done.stderr
    assert data["files"]["train"]["rows"] == 10_000 and data["files"]["train"]["pictures"] >= 2_000
    assert data["seconds"] < 120
