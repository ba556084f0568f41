"""Draws the demo's data set: questions about pictures of handwritten digits.

    python -m rlfr_vlm.demo.digits build OUT_DIR [--train N --test N --expert N --seed S]

writes train.jsonl (prompts for RL), test.jsonl (held out: its pictures are made of digit images
that no other file uses), expert.jsonl (solutions, which the flow field is fitted on) and images/.
The digits are scikit-learn's `load_digits` (1,797 images of 8 x 8 by 13 writers), read from the
installed package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from rlfr_vlm.errors import UserError

Split = Literal["train", "test", "expert"]
COUNTS: dict[Split, int] = {"train": 4096, "test": 256, "expert": 1024}  # rows

# pixels, side of the square one digit or sign is drawn in: 2 x 2 image tokens of Qwen2.5-VL (patch
# 14, merged 2 x 2)
SLOT = 56
HELD_OUT = 360  # digit images kept for the test set
QUESTIONS = {
    "sum": "What is the sum of the digits?",
    "larger": "Which digit is larger?",
    "even": "How many digits are even?",
    "result": "What is the result?",
}


@dataclass(frozen=True)
class PictureQuestion:
    """What a picture shows and what is asked about it."""

    kind: str  # a key of QUESTIONS
    digits: tuple[int, ...]
    sign: str = ""  # "+" or "-", drawn between two digits


def answer(problem: PictureQuestion) -> int:
    """The right answer."""
    if problem.kind == "larger":
        return max(problem.digits)
    if problem.kind == "even":
        return sum(d % 2 == 0 for d in problem.digits)
    first, second = problem.digits
    return first - second if problem.sign == "-" else first + second


def solution(problem: PictureQuestion, boxed: int | None = None) -> str:
    """A worked solution: first what is read, then the conclusion `boxed` (default: the right
    one).
    """
    boxed = answer(problem) if boxed is None else boxed
    if problem.kind in ("sum", "result"):
        return f"{problem.digits[0]} {problem.sign or '+'} {problem.digits[1]} = \\boxed{{{boxed}}}"
    return f"digits {' '.join(map(str, problem.digits))} ; {problem.kind} \\boxed{{{boxed}}}"


def draw_problem(rng: np.random.Generator, kind: str | None = None) -> PictureQuestion:
    """A random problem. For `larger` and `even` every answer is equally frequent, so that guessing
    pays little.
    """
    kind = kind or str(rng.choice(list(QUESTIONS)))
    if kind == "larger":
        top = int(rng.integers(1, 10))
        pair = [top, int(rng.integers(top))]
        rng.shuffle(pair)
        return PictureQuestion(kind, tuple(pair))
    if kind == "even":
        even = np.arange(3) < rng.integers(4)
        rng.shuffle(even)
        return PictureQuestion(
            kind,
            tuple(int(2 * d + 1 - e) for d, e in zip(rng.integers(5, size=3), even, strict=True)),
        )
    first, second = (int(d) for d in rng.integers(10, size=2))
    if kind == "sum":
        return PictureQuestion(kind, (first, second))
    sign = str(rng.choice(["+", "-"]))
    if sign == "-":  # no negative answers
        first, second = max(first, second), min(first, second)
    return PictureQuestion(kind, (first, second), sign)


@cache
def digit_images(held_out: bool) -> tuple[np.ndarray, ...]:
    """The digit images of one side of the split: ten arrays [n, 8, 8] with values 0 to 1.

    The split is the same for every seed: a model trained on any draw of the training side has never
        seen the other one.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits are those of scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    side = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    return tuple(data.images[side[data.target[side] == d]] / 16.0 for d in range(10))


def draw_picture(problem: PictureQuestion, rng: np.random.Generator, held_out: bool) -> Image.Image:
    """The problem as a picture, 112 x 56 for two slots and 168 x 56 for three: sides that Qwen's
    processor keeps.
    """
    digits = [str(d) for d in problem.digits]
    symbols = [digits[0], problem.sign, digits[1]] if problem.sign else digits
    ink, paper = rng.uniform(0.55, 1.0), rng.uniform(0.0, 0.25)
    strokes = np.zeros((SLOT, SLOT * len(symbols)), dtype=np.float32)
    for place, symbol in enumerate(symbols):
        side = int(rng.integers(32, 47))
        if symbol.isdigit():
            images = digit_images(held_out)[int(symbol)]
            cells = Image.fromarray(np.uint8(255 * images[rng.integers(len(images))]))
        else:
            cells = _sign(symbol)
        glyph = cells.resize((side, side), Image.Resampling.BICUBIC).rotate(
            rng.uniform(-12, 12), Image.Resampling.BILINEAR
        )
        x, y = rng.integers(0, SLOT - side + 1, size=2)
        strokes[y : y + side, place * SLOT + x : place * SLOT + x + side] = np.asarray(glyph) / 255
    grey = np.uint8(255 * (paper + (ink - paper) * strokes))
    return Image.fromarray(grey).convert("RGB")


def _sign(sign: str) -> Image.Image:
    """A plus or minus of 16 x 16 pixels."""
    image = Image.new("L", (16, 16))
    pen = ImageDraw.Draw(image)
    pen.line((2, 8, 13, 8), fill=255, width=2)
    if sign == "+":
        pen.line((8, 2, 8, 13), fill=255, width=2)
    return image


def draw_examples(
    split: Split, count: int, seed: int
) -> Iterator[tuple[PictureQuestion, Image.Image]]:
    """The first `count` problems of a split, with their pictures; example i is the same whatever
    the count.
    """
    for i in range(count):
        rng = np.random.default_rng([seed, ("train", "test", "expert").index(split), i])
        problem = draw_problem(rng)
        yield problem, draw_picture(problem, rng, held_out=split == "test")


def build(out_dir: str | Path, counts: dict[Split, int] = COUNTS, seed: int = 0) -> str:
    """Write the data set: one JSONL file per split and the pictures. Returns a line about it."""
    digit_images(False)  # before any file is there: it may be missing
    out_dir = Path(out_dir)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        with (out_dir / f"{split}.jsonl").open("w") as rows:
            for i, (problem, picture) in enumerate(draw_examples(split, count, seed)):
                name = f"{split}-{i:05d}"
                picture.save(out_dir / "images" / f"{name}.png")
                row = {
                    "id": name,
                    "prompt": f"<image>{QUESTIONS[problem.kind]}",
                    "images": [f"images/{name}.png"],
                    "answer": str(answer(problem)),
                    "data_source": f"digits/{problem.kind}",
                }
                if split == "expert":
                    row["response"] = solution(problem)
                rows.write(json.dumps(row) + "\n")
    return f"{out_dir}: {', '.join(f'{count} {split}' for split, count in counts.items())} rows"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="draw the data set into a folder")
    command.add_argument("out_dir", type=Path)
    for split, count in COUNTS.items():
        command.add_argument(
            f"--{split}", type=int, default=count, help=f"rows of {split}.jsonl; default {count}"
        )
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(build(args.out_dir, {split: getattr(args, split) for split in COUNTS}, args.seed))
    except UserError as error:
        sys.exit(f"digits: {error}")


if __name__ == "__main__":
    main()
