"""How an evaluation asks: definitions, other pictures, and what it takes over from the run that
made the model.
"""

import json

import pytest
import yaml
from PIL import Image

from rlfr_vlm.arguments import build_parser
from rlfr_vlm.cli import eval_overrides
from rlfr_vlm.config import load_config, parse_config, to_yaml
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.benchmarks import DEFINITIONS, find_benchmark
from rlfr_vlm.evaluation.parity import parity
from rlfr_vlm.evaluation.suite import in_training, plan


def test_every_definition_reads_and_is_named_after_its_file():
    for path in DEFINITIONS.glob("*.yaml"):
        assert find_benchmark(path.stem)[0].name == path.stem


def pictures(folder, counts):
    rows = []
    for i, count in enumerate(counts):
        names = [f"{i}_{j}.png" for j in range(count)]
        for j, name in enumerate(names):
            Image.new("RGB", (56, 56), (i, j, 0)).save(folder / name)
        rows.append(
            {
                "id": str(i),
                "prompt": "<image>" * count + "How many?",
                "images": names,
                "answer": "1",
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({"name": "bench", "file": "rows.jsonl"}))
    return str(path)


def planned_pictures(tmp_path, counts):
    benchmark = pictures(tmp_path, counts)
    cfg = parse_config(
        {
            "output_dir": "o",
            "model": {"path": "m"},
            "eval": {"benchmarks": [benchmark], "pictures": "swapped"},
        }
    )
    return [problem.prompt.images for problem in plan(cfg)[0].problems]


def test_swapped_pictures_come_from_a_problem_with_as_many(tmp_path):
    assert planned_pictures(tmp_path, [1, 2, 1, 0, 2, 1]) == [
        ("2_0.png",), ("4_0.png", "4_1.png"), ("5_0.png",), (), ("1_0.png", "1_1.png"), ("0_0.png",)
    ]  # fmt: skip


def test_swapping_without_a_partner_is_refused(tmp_path):
    with pytest.raises(UserError, match="finds no two problems with equally many pictures"):
        planned_pictures(tmp_path, [1, 2])


def evaluated(tmp_path, *options):
    """The config of `eval` for a model of a run that was trained with its own prompt and pixels."""
    trained = parse_config(
        {
            "output_dir": "o",
            "model": {"path": "m", "dtype": "float32"},
            "data": {"system": "Think.", "max_pixels": 50176},
            "reward": {"answer": "tag"},
            "rollout": {"max_new_tokens": 99},
        }
    )
    model = tmp_path / "run/hf/global_step_3"
    model.mkdir(parents=True)
    (tmp_path / "run/config.resolved.yaml").write_text(to_yaml(trained))
    arguments = build_parser().parse_args(
        [
            "eval",
            "--model",
            str(model),
            "--out",
            "o",
            "--benchmarks",
            pictures(tmp_path, [1]),
            *options,
        ]
    )
    return load_config(None, eval_overrides(arguments))


def test_a_checkpoint_is_asked_as_it_was_trained(tmp_path):
    cfg = evaluated(tmp_path)
    assert (cfg.data.system, cfg.data.max_pixels, cfg.model.dtype) == ("Think.", 50176, "float32")
    benchmark = plan(cfg)[0].benchmark
    assert (benchmark.system, benchmark.answer) == ("Think.", "tag")
    assert parity(cfg, plan(cfg)) == [
        "bench max_new_tokens: trained with 99, evaluated with 8192",
        "bench temperature: trained with 1.0, evaluated with 0.0",
    ]


def test_what_is_given_wins_and_is_reported(tmp_path):
    cfg = evaluated(
        tmp_path, "--", "data.max_pixels=25088", "eval.max_new_tokens=99", "eval.temperature=1.0"
    )
    assert parity(cfg, plan(cfg)) == ["data.max_pixels: trained with 50176, evaluated with 25088"]


def test_in_training_rules_grade_within_the_budget_of_the_rollouts():
    tree = {"output_dir": "o", "model": {"path": "m"}, "rollout": {"max_new_tokens": 64}}
    assert (
        in_training(parse_config({**tree, "eval": {"max_new_tokens": 512}})).eval.max_new_tokens
        == 64
    )
    with pytest.raises(UserError, match="during training benchmarks are graded by rules"):
        in_training(parse_config({**tree, "eval": {"grading": "both"}}))
