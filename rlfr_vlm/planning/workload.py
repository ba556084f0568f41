"""How long the prompts of a data file are, about, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from rlfr_vlm.config import Config
from rlfr_vlm.planning.shapes import ModelShape

LOOKED_AT = 64  # rows
TOKEN_CHARACTERS = 3.5  # of a token of English text and formulas
TEMPLATE = 16  # tokens of a chat template around a question
NOT_ASKED = {
    "answer",
    "response",
    "solution",
    "id",
    "images",
    "image",
    "data_source",
    "ground_truth",
    "target",
}


def typical_prompt(cfg: Config, shape: ModelShape) -> int:
    """Tokens of a prompt with its pictures, on average over the first rows of data.train; the limit
    where it is no JSONL file at hand.
    """
    limit = cfg.data.max_prompt_tokens
    path = Path(cfg.data.train or "")
    if path.suffix != ".jsonl" or not path.is_file():
        return limit
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = [
                json.loads(line)
                for line in islice((line for line in file if line.strip()), LOOKED_AT)
            ]
        lengths = [_row_tokens(cfg, shape, path.parent, row) for row in rows]
    except (OSError, ValueError, AttributeError):
        return limit
    return max(1, min(limit, round(mean(lengths)))) if lengths else limit


def _row_tokens(cfg: Config, shape: ModelShape, folder: Path, row: dict[str, Any]) -> float:
    asked = {key: value for key, value in row.items() if key not in NOT_ASKED}
    characters = sum(map(len, _texts(asked))) + len(cfg.data.suffix) + len(cfg.data.system or "")
    pictures = row.get("images") or []
    return (
        TEMPLATE
        + characters / TOKEN_CHARACTERS
        + sum(_picture_tokens(cfg, shape, folder, p) for p in pictures)
    )


def _texts(value: Any) -> Iterator[str]:
    """Every string in a tree of lists and dicts."""
    if isinstance(value, str):
        yield value
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _texts(part)


def _picture_tokens(cfg: Config, shape: ModelShape, folder: Path, source: Any) -> float:
    """Tokens of a picture, scaled as the limits say; of the largest where its size cannot be
    seen.
    """
    if shape.vision is None:
        return 0.0
    try:
        with Image.open(folder / source) as image:
            pixels = image.width * image.height
    except (OSError, TypeError, ValueError):
        pixels = cfg.data.max_pixels
    return (
        min(max(pixels, cfg.data.min_pixels), cfg.data.max_pixels)
        / (shape.vision.patch * shape.vision.merge) ** 2
    )
