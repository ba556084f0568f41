"""Rollouts as Parquet: the same columns as the JSON lines, whole or named as damaged."""

import json
import random

import pytest

from rlfr_vlm.report.run_files import RolloutFile, read_rollouts, read_run
from rlfr_vlm.run.rollout_files import write_rollouts

pa = pytest.importorskip("pyarrow")
ROW = {
    "step": 3,
    "prompt_id": "p",
    "sample_index": 0,
    "data_source": "bars",
    "question": "<image>How many? \ud800",
    "images": ["images/a.png"],
    "answer": "2",
    "response": "two",
    "prediction": "2",
    "verdict": "correct",
    "reason": "",
    "reward": 1.0,
    "parts": {"format": 0.5, "answer": 1.0},
    "finish_reason": "stop",
    "policy_version": 3,
    "tokens": ["t", "wo"],
    "logprobs": [-0.5, -0.25],
    "advantages": [0.5, 0.25],
    "flow_rewards": None,
    "deviations": [0.125, float("nan")],
    "entropy": None,
    "latent": [0.5] * 64,
    "attention": {"grids": [[1, 2]], "cells": "eJw=", "share": [0.5, 0.25]},
    "of_later": {"a": 1},
}


def lines(count: int) -> list[str]:
    return [
        json.dumps({**ROW, "sample_index": i, "prompt_id": f"p{i // 4}"}) + "\n"
        for i in range(count)
    ]


def test_both_forms_read_the_same(tmp_path):
    groups = []
    for form in ("jsonl", "parquet"):
        path = write_rollouts(tmp_path / form, 3, lines(8), form)
        assert path.name == f"step_000003.{form}" and [p.name for p in path.parent.iterdir()] == [
            path.name
        ]
        problems = []
        groups.append(read_rollouts(RolloutFile(3, path), problems))
        assert problems == []
    assert len(groups[0]) == 2 and repr(groups[0]).replace("\\ud800", "?") == repr(groups[1])


def test_pandas_and_datasets_read_typed_columns(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{**ROW, "sample_index": i} for i in range(3)]
    rows[0]["attention"] = rows[0]["latent"] = None
    path = write_rollouts(tmp_path, 3, [json.dumps(row) for row in rows], "parquet")
    frame = pandas.read_parquet(path)
    assert (
        frame["reward"].mean() == 1.0
        and list(frame["tokens"][0]) == ["t", "wo"]
        and frame["flow_rewards"].isna().all()
    )
    assert (
        json.loads(frame["parts"][0]) == ROW["parts"]
        and frame["attention"][0] is None
        and frame["latent"][1].shape == (64,)
    )
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert (
        table.num_rows == 3
        and table.features["logprobs"].feature.dtype == "float64"
        and table[1]["step"] == 3
    )


def test_an_empty_step_and_a_change_of_form(tmp_path):
    empty = write_rollouts(tmp_path, 1, [], "parquet")
    assert read_rollouts(RolloutFile(1, empty), problems := []) == () and problems == []
    write_rollouts(tmp_path, 1, lines(4), "jsonl")
    assert not empty.exists()
    (tmp_path / "rollouts").mkdir()
    for step, form in ((1, "jsonl"), (2, "parquet"), (3, "parquet"), (3, "jsonl")):
        write_rollouts(tmp_path / "rollouts", step, lines(4), form)
    files = read_run(tmp_path).rollout_files
    assert [file.path.name for file in files] == [
        "step_000001.jsonl",
        "step_000002.parquet",
        "step_000003.jsonl",
    ]


def test_torn_changed_and_foreign_files_are_named(tmp_path):
    path = write_rollouts(tmp_path / "rollouts", 3, lines(64), "parquet")
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [
        b"",
        b"PAR1",
        b"not a table at all",
        *(whole[: len(whole) * k // 8] for k in range(1, 8)),
        whole[:-1],
        whole[1:],
    ]
    for _ in range(40):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    silent = 0
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        problems = []
        groups = read_rollouts(RolloutFile(3, path), problems)
        assert len(groups) <= 16 and all(
            problem.file == "rollouts/step_000003.parquet" for problem in problems
        )
        assert problems or number >= 12, data[:40]
        silent += not problems
    assert (
        silent < 20
        # pages have checksums; a changed bit of the footer, most of this small file, may mean
        # nothing
    )
    path.unlink()
    problems = []
    assert read_rollouts(RolloutFile(3, path), problems) == ()
    assert problems[0].kind == "missing"


def test_columns_of_other_types_are_left_out(tmp_path):
    from pyarrow import parquet

    table = pa.table({
        "question": pa.array([1, 2], pa.timestamp("s")),
        "response": pa.array([b"\xff", b"a"]),
        "verdict": pa.array(["correct", "wrong"]).dictionary_encode(),
        "parts": ["{", "[" * 100_000],
        "reward": pa.array([1, None], pa.int8()),
        "tokens": [{"a": 1}, {"a": 2}],
        "sample_index": [0, 1],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "step_000001.parquet")
    (group,) = read_rollouts(RolloutFile(1, tmp_path / "step_000001.parquet"), problems := [])
    assert problems == [] and group.question == ""
    assert [(r.verdict, r.reward, r.parts, r.text, r.tokens) for r in group.responses] == [
        ("correct", 1.0, {}, "", ()),
        ("wrong", None, {}, "", ()),
    ]


def test_without_pyarrow_the_reader_says_what_to_install(tmp_path, monkeypatch):
    path = write_rollouts(tmp_path, 3, lines(4), "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert read_rollouts(RolloutFile(3, path), problems := []) == ()
    assert "pip install pyarrow" in problems[0].text
