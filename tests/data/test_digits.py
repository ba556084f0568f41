"""The demo's data set and the small Qwen2.5-VL that starts on it."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlfr_vlm.demo import digits
from rlfr_vlm.demo.digits import PictureQuestion
from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "data"))
import tiny_vlm

COMMITTED = ROOT / "rlfr_vlm/demo/tiny_vlm"
COUNTS = {"train": 40, "test": 24, "expert": 30}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    digits.build(out, COUNTS, seed=3)
    return out


def rows(data_dir, split):
    return [json.loads(line) for line in (data_dir / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("problem", "right", "text"),
    [
        (PictureQuestion("sum", (7, 6)), 13, r"7 + 6 = \boxed{13}"),
        (PictureQuestion("result", (7, 6), "-"), 1, r"7 - 6 = \boxed{1}"),
        (PictureQuestion("result", (7, 6), "+"), 13, r"7 + 6 = \boxed{13}"),
        (PictureQuestion("larger", (4, 9)), 9, r"digits 4 9 ; larger \boxed{9}"),
        (PictureQuestion("even", (4, 8, 3)), 2, r"digits 4 8 3 ; even \boxed{2}"),
        (PictureQuestion("even", (0, 1, 3)), 1, r"digits 0 1 3 ; even \boxed{1}"),
    ],
)
def test_answers_and_solutions(problem, right, text):
    assert digits.answer(problem) == right
    assert digits.solution(problem) == text


def test_rows_follow_the_schema(data_dir):
    for split, count in COUNTS.items():
        found = rows(data_dir, split)
        assert len({row["id"] for row in found}) == len(found) == count
        for row in found:
            assert row["prompt"].count("<image>") == len(row["images"]) == 1
            assert ("response" in row) == (split == "expert")
            width, height = Image.open(data_dir / row["images"][0]).size
            assert (width, height) == (
                168 if row["data_source"] in ("digits/even", "digits/result") else 112,
                56,
            )
    assert {row["data_source"] for row in rows(data_dir, "test")} == {
        f"digits/{kind}" for kind in digits.QUESTIONS
    }


def test_expert_responses_end_in_the_answer_of_what_they_read(data_dir):
    for row in rows(data_dir, "expert"):
        read, _, boxed = row["response"].partition(r"\boxed")
        numbers = [int(token) for token in read.split() if token.isdigit()]
        by_kind = {
            "larger": max(numbers),
            "even": len([n for n in numbers if n % 2 == 0]),
            "sum": sum(numbers),
            "result": numbers[0] - numbers[1] if " - " in read else sum(numbers),
        }
        assert boxed == f"{{{row['answer']}}}"
        assert int(row["answer"]) == by_kind[row["data_source"].removeprefix("digits/")]


def test_the_seed_decides_everything(data_dir, tmp_path, monkeypatch):
    again, other = tmp_path / "again", tmp_path / "other"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "digits.py",
            "build",
            str(again),
            *(f"--{split}={n}" for split, n in COUNTS.items()),
            "--seed=3",
        ],
    )
    digits.main()
    digits.build(other, COUNTS, seed=4)
    files = sorted(path.relative_to(data_dir) for path in data_dir.rglob("*.*"))
    assert len(files) == len(COUNTS) + sum(COUNTS.values())
    assert all((data_dir / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (data_dir / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_more_rows_keep_the_first_ones():
    few, many = (list(digits.draw_examples("train", count, seed=0)) for count in (3, 5))
    assert [p for p, _ in few] == [p for p, _ in many[:3]]
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(few, many, strict=False))


def test_train_and_test_use_different_digit_images(data_dir):
    seen, held_out = (
        {image.tobytes() for images in digits.digit_images(side) for image in images}
        for side in (False, True)
    )
    assert not seen & held_out
    assert len(seen) + len(held_out) == 1797
    assert all(len(images) > 20 for images in digits.digit_images(True))
    for split in COUNTS:  # redrawn from each side of the split, only one gives the stored picture
        for i, row in enumerate(rows(data_dir, split)[:8]):
            stored = Image.open(data_dir / row["images"][0]).tobytes()
            for held_out_side in (False, True):
                rng = np.random.default_rng([3, ("train", "test", "expert").index(split), i])
                redrawn = digits.draw_picture(digits.draw_problem(rng), rng, held_out_side)
                assert (redrawn.tobytes() == stored) == (held_out_side == (split == "test"))


def test_no_constant_answer_pays():
    rng = np.random.default_rng(0)
    for kind, limit in {"sum": 0.15, "larger": 0.15, "even": 0.3, "result": 0.15}.items():
        counts = Counter(digits.answer(digits.draw_problem(rng, kind)) for _ in range(1000))
        assert counts.most_common(1)[0][1] < 1000 * limit


def test_the_sloppy_teacher_keeps_the_format_and_is_partly_right():
    rng = np.random.default_rng(0)
    problems = [digits.draw_problem(rng) for _ in range(1000)]
    answers = [tiny_vlm.boxed(tiny_vlm.sloppy_solution(problem, rng)) for problem in problems]
    assert None not in answers
    assert (
        0.4
        < np.mean([a == str(digits.answer(p)) for a, p in zip(answers, problems, strict=True)])
        < 0.7
    )


@pytest.fixture(scope="module")
def few_steps_model(tmp_path_factory):
    """The script's model after three steps."""
    out = tmp_path_factory.mktemp("few_steps")
    command = [
        sys.executable,
        str(ROOT / "data/tiny_vlm.py"),
        str(out),
        "--steps=3",
        "--batch-size=4",
        "--report-rows=4",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "sampled all" in done.stdout
    return out


def test_the_script_is_deterministic(few_steps_model, tmp_path):
    tiny_vlm.build(tmp_path, steps=3, batch_size=4, lr=2e-3, seed=0)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        few_steps_model / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("folder", ["few_steps", "committed"])
def test_the_folder_reloads_with_the_auto_classes(folder, few_steps_model):
    path = few_steps_model if folder == "few_steps" else COMMITTED
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in path.iterdir()) <= 4_000_000
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert processor.tokenizer.tokenize("13") == ["1", "3"]
    text = tiny_vlm.prompt_text(processor, PictureQuestion("even", (1, 2, 3)))
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many digits are "
        "even?<|im_end|>\n<|im_start|>assistant\n"
    )
    image_tokens = processor(text=[text], images=[Image.new("RGB", (168, 56))])["input_ids"][
        0
    ].count(model.config.image_token_id)
    assert image_tokens == 12  # 168 x 56 pixels: 6 x 2 squares of 28


def test_chat_template_takes_strings_and_several_turns(few_steps_model):
    tokenizer = AutoProcessor.from_pretrained(few_steps_model)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 ?"},
        {"role": "assistant", "content": "2"},
    ]
    assert tokenizer.apply_chat_template(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1 "
        "?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )


def test_the_committed_model_is_partly_right():
    path = COMMITTED
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    examples = list(digits.draw_examples("test", 64, seed=0))
    torch.manual_seed(0)
    sampled = tiny_vlm.accuracy(
        examples, tiny_vlm.respond(model, processor, examples, num_samples=4)
    )
    greedy = tiny_vlm.accuracy(examples, tiny_vlm.respond(model, processor, examples))
    assert sampled["format"] > 0.95
    assert greedy["format"] > 0.98
    assert 0.3 < sampled["all"] < 0.55
    assert sampled["all"] < greedy["all"] < 0.8
