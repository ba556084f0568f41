"""docs/add_a_benchmark.md, followed: its rows, its YAML, its command on a tiny model."""

import json
import shlex

from rlfr_vlm.evaluation.benchmarks import find_benchmark, load_problems
from tests.docs.pages import blocks
from tests.runs import cli

PAGE = "add_a_benchmark.md"


def written(folder):
    """The two files of the page."""
    (rows,), (definition,) = blocks(PAGE, "json"), blocks(PAGE, "yaml")
    (folder / "capitals.jsonl").write_text(rows, encoding="utf-8")
    (folder / "capitals.yaml").write_text(definition, encoding="utf-8")
    return folder / "capitals.yaml"


def test_its_files_are_a_benchmark(tmp_path):
    benchmark, folder = find_benchmark(str(written(tmp_path)))
    problems = load_problems(benchmark, str(folder / benchmark.file))
    assert len(problems) == benchmark.num_problems == 3
    assert problems[1].golds == ("Tokyo", "Tōkyō")


def test_its_command_evaluates_a_model(tmp_path, model_folder):
    path, out = written(tmp_path), tmp_path / "out"
    command, report = "".join(blocks(PAGE, "sh")).splitlines()
    words = shlex.split(command)[1:]
    for old, new in (
        ("MODEL", model_folder("qwen2")),
        ("capitals.yaml", str(path)),
        ("runs/eval/capitals", str(out)),
    ):
        words[words.index(old)] = new
    small = ["--engine", "hf", "--", "model.dtype=float32", "eval.max_new_tokens=8"]
    done = cli(*words, *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 problems x 4" in done.stdout + done.stderr
    summary = json.loads((out / "capitals/summary.json").read_text())
    assert summary["accuracy"] is not None
    assert (out / "capitals/ledger.jsonl").stat().st_size > 0
    page = cli(*shlex.split(report.replace("runs/eval/capitals", str(out)))[1:])
    assert page.returncode == 0 and (out / "report.html").stat().st_size > 10_000
