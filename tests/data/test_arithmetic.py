"""The text demo's data set."""

import json

from rlfr_vlm.demo import arithmetic


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_rows_are_right_deterministic_and_split_by_pair(tmp_path):
    arithmetic.build(tmp_path / "a", 300, 50, 40, seed=0)
    arithmetic.build(tmp_path / "b", 300, 50, 40, seed=0)
    assert [len(read(tmp_path / "a", n)) for n in ("train", "test", "expert")] == [300, 50, 40]
    for name in ("train", "test", "expert"):
        assert read(tmp_path / "a", name) == read(tmp_path / "b", name)
        for row in read(tmp_path / "a", name):
            first, second = (
                int(w.strip("?.")) for w in row["prompt"].split() if w.strip("?.").isdigit()
            )
            assert int(row["answer"]) == (
                first + second if row["data_source"].endswith("sum") else first - second
            )
            assert ("response" in row) == (name == "expert")
    pairs = arithmetic.split_pairs(0)
    assert not set(pairs["train"]) & set(pairs["test"])
