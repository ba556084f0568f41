"""Rows of a run carry where their tokens looked, and nothing else of the run notices."""

import base64
import json
import zlib

import pytest

from rlfr_vlm import commands
from rlfr_vlm.config import config_hash, load_config
from tests.launch.test_ranks import mixed_rows
from tests.runs import digest, make_config, make_data, torchrun


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory):
    """Every second prompt is text only."""
    folder = tmp_path_factory.mktemp("looks")
    make_data(folder)
    mixed_rows(folder)
    sections = {
        "rollout": {"engine": "hf", "num_prompts": 4, "group_size": 2, "max_new_tokens": 6},
        "data": {"shuffle": False},
    }
    return make_config(
        folder, model_folder("qwen2_5_vl"), train={"steps": 2, "save_steps": 2}, **sections
    )


def settings(config, name, *overrides):
    return (f"output_dir={config.parent / name}", *overrides)


def records(config, name, step=1):
    run = config.parent / name
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {key: value for key, value in line.items() if not key.startswith(("timing_s/", "perf/"))}
        for line in metrics
    ]
    return (
        metrics,
        timeless,
        [
            json.loads(line)
            for line in (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        ],
    )


@pytest.fixture(scope="module")
def logged(config):
    """The same run with 0, 1 and 3 groups' attention on record."""
    for count in (0, 1, 3):
        commands.train(
            load_config(config, settings(config, f"log{count}", f"train.log_attention={count}"))
        )
    return config


def test_the_first_groups_with_pictures_carry_attention(logged):
    for count in (0, 1, 3):
        _, _, rows = records(logged, f"log{count}")
        assert len(rows) == 8
        pictured = list(dict.fromkeys(row["prompt_id"] for row in rows if row["images"]))
        assert len(pictured) == 2
        for row in rows:
            assert (row["attention"] is not None) == (row["prompt_id"] in pictured[:count])
    for row in rows:
        if row["attention"] is not None:
            (grid,) = row["attention"]["grids"]
            assert grid == [2, 2]
            cells = zlib.decompress(base64.b64decode(row["attention"]["cells"]))
            assert len(cells) == len(row["tokens"]) * 4
            assert all(max(cells[4 * t : 4 * t + 4]) == 255 for t in range(len(row["tokens"])))
            assert len(row["attention"]["share"]) == len(row["tokens"])
            assert all(0 < share < 1 for share in row["attention"]["share"])


def test_numbers_and_weights_are_the_same_to_the_bit(logged):
    (with_clock, expected, before), others = (
        records(logged, "log0"),
        [records(logged, f"log{count}") for count in (1, 3)],
    )
    assert "timing_s/attention" not in with_clock[0]
    for clock, metrics, rows in others:
        assert metrics == expected
        assert [{**row, "attention": None} for row in rows] == before
        assert clock[0]["timing_s/attention"] > 0
    weights = [digest(logged.parent / f"log{count}", 2) for count in (0, 1, 3)]
    assert weights[0] == weights[1] == weights[2]


def test_a_run_may_go_on_with_another_setting(config):
    one, other = (
        load_config(config, settings(config, "run", f"train.log_attention={count}"))
        for count in (0, 2)
    )
    assert config_hash(one) == config_hash(other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_record_what_one_process_does(logged, stage):
    """The second rank's share has no picture at all: it goes through the vision tower all the same."""
    name = f"ranks{stage}"
    torchrun(
        2,
        "rlfr_vlm.cli",
        "train",
        "--config",
        logged,
        *settings(logged, name, "train.log_attention=3", f"deepspeed.zero_stage={stage}"),
    )
    _, _, alone = records(logged, "log3")
    _, _, both = records(logged, name)
    assert [row["tokens"] for row in both] == [row["tokens"] for row in alone]
    assert sum(row["attention"] is not None for row in both) == 4
    for ours, theirs in zip(both, alone, strict=True):
        if theirs["attention"] is None:
            assert ours["attention"] is None
        else:
            assert ours["attention"]["share"] == pytest.approx(
                theirs["attention"]["share"], abs=2e-4
            )
            found, expected = (
                zlib.decompress(base64.b64decode(row["attention"]["cells"]))
                for row in (ours, theirs)
            )
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1
