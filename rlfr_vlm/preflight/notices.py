"""What is odd about a row although training would take it: pure functions of its columns and texts,
as (kind, reason).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlfr_vlm.config import RewardConfig
from rlfr_vlm.data.prompts import COLUMNS, IMAGE_MARK, UNSUPPORTED
from rlfr_vlm.preflight.facts import Notice
from rlfr_vlm.rewards.extract import extract_answer, unwrap_gold
from rlfr_vlm.rewards.outcome import boxed_reward, tags_reward
from rlfr_vlm.types import Prompt

PIXEL_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
PLACEHOLDERS = ("nan", "null", "none", "n/a", "<na>", "todo", "tbd", "unknown")
PROSE_WORDS = 6  # a gold answer of more is a sentence
_FOREIGN_MARK = re.compile(
    r"<image[\s_]?\d+>|<img\b[^>]*>|\[(?:IMAGE|IMG)\]|<ImageHere>|<image_placeholder>|<\|image_\d+\|>"
)
_GARBLED = re.compile("\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|â€.|Ã[\u00a0-\u00bf]")
_SHOWN = re.compile(
    r"(?i)\b(?:figure|image|picture|diagram|photo|graph|chart)s? (?:above|below|shown|on the "
    r"(?:left|right))\b"
    r"|\b(?:shown|seen|depicted) in the "
    r"(?:figure|image|picture|diagram|photo|graph|chart)\b|!\[[^\]]*\]\("
)
_LETTER = re.compile(r"\(?([A-J])[).]?")
_LABEL = re.compile(r"(?:^|(?<=[\s(\[{*:;,]))([A-J]) ?[).:]")
_PIXEL_TEXT = re.compile(r'"(?:' + "|".join(PIXEL_KEYS) + r')"\s*:')


def column_notices(row: Mapping[str, Any], need: str) -> list[Notice]:
    """Columns that nothing reads although they were meant to be read."""
    found: list[Notice] = []
    present = {
        meaning
        for meaning, names in COLUMNS.items()
        if any(row.get(name) is not None for name in names)
    }
    wanted = {"prompt", "images", "answer", *(["response"] if need == "response" else [])} - present
    known = {name for names in COLUMNS.values() for name in names} | set(UNSUPPORTED)
    for column in row:
        near = difflib.get_close_matches(
            str(column).lower(),
            [n for meaning in wanted for n in COLUMNS[meaning]],
            n=1,
            cutoff=0.8,
        )
        if column not in known and near and row[column] not in (None, "", []):
            found.append(
                (
                    "column_typo",
                    f"nothing reads the column `{str(column)[:40]}`; did you mean `{near[0]}`?",
                )
            )
    keys = sorted(
        {
            key
            for value in (dict(row), row.get("extra_info"))
            for key in PIXEL_KEYS
            if isinstance(value, dict) and key in value
        }
    )
    keys = keys or sorted(
        {
            key
            for name in (*COLUMNS["prompt"], *COLUMNS["images"])
            for key in _pixel_keys(row.get(name))
        }
    )
    if keys:
        found.append(("pixel_limits", f"the row sets {', '.join(keys)}, which nothing reads"))
    return found


def _pixel_keys(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (key for key in PIXEL_KEYS if key in value)
    if isinstance(value, (dict, list)) and depth < 6:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _pixel_keys(part, depth + 1)
    elif isinstance(value, str) and value.lstrip()[:1] == "[":  # messages as a JSON string
        yield from (match[0].split('"')[1] for match in _PIXEL_TEXT.finditer(value))


def marks_pictures(row: Mapping[str, Any]) -> bool:
    """Whether the row itself says where its pictures go."""

    def marked(value: Any) -> bool:
        if isinstance(value, str):
            return IMAGE_MARK in value or ('"type"' in value and '"image' in value)
        if isinstance(value, dict):
            return value.get("type") in ("image", "image_url") or any(
                marked(part) for part in value.values()
            )
        return isinstance(value, list) and any(marked(part) for part in value)

    return marked(
        next((row[name] for name in COLUMNS["prompt"] if row.get(name) is not None), None)
    )


def text_notices(prompt: Prompt, text: str, special: str | None) -> list[Notice]:
    """Of the question's text. special: a special token of the model that it spells."""
    found: list[Notice] = []
    if special is not None:
        found.append(("special_tokens", f"the prompt spells `{special}`"))
    if mark := _FOREIGN_MARK.search(text):
        found.append(("foreign_image_mark", f"the prompt holds `{mark[0][:40]}`"))
    if garbled := _GARBLED.search(text):
        found.append(("text_garbled", f"the prompt holds {garbled[0]!r}"))
    if not prompt.images and (shown := _SHOWN.search(text)):
        found.append(("image_absent", f"the prompt says `{shown[0]}`, but the row has no picture"))
    return found


def answer_notices(prompt: Prompt, text: str) -> list[Notice]:
    """Of a gold answer that rules will grade."""
    gold = unwrap_gold(prompt.answer)
    shown = f"the answer is {gold[:60]!r}"
    if gold.casefold() in PLACEHOLDERS:
        return [("answer_placeholder", shown)]
    if gold.endswith("?") and len(gold.split()) > 1:
        return [("answer_question", shown)]
    found: list[Notice] = []
    letter = _LETTER.fullmatch(gold)
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+", " ", gold))
    if len(words) > PROSE_WORDS and not re.match(r"\(?[A-J][).:]", gold):
        found.append(("answer_prose", f"{shown}: {len(words)} words"))
    if gold and re.search(
        rf"(?im)\b(?:answer|solution)\s*(?:is|:|=)\s*\$?{re.escape(gold)}\$?\s*(?:[.)]|$)|\\boxed\{{\s*{re.escape(gold)}\s*\}}",
        text,
    ):
        found.append(("answer_in_prompt", f"{shown}, which the prompt says itself"))
    if letter is not None and (reason := _not_offered(letter[1], text, bool(prompt.images))):
        found.append(("choice_not_offered", f"{shown}, but {reason}"))
    return found


def _not_offered(letter: str, text: str, has_pictures: bool) -> str:
    """Why the prompt does not offer this option; "" where it does, or where a picture may."""
    labels = sorted(set(_LABEL.findall(text)))
    if {"A", "B"} <= set(labels):
        return "" if letter in labels else f"the options are {', '.join(labels)}"
    named = re.search(rf"(?<![A-Za-z]){letter}(?![A-Za-z])", re.sub(r"\bA (?=[a-z])", "", text))
    return "" if has_pictures or named else "the prompt offers no options"


def response_notices(response: str, reward: RewardConfig, special: str | None) -> list[Notice]:
    """Of an expert response."""
    found: list[Notice] = []
    if special is not None:
        found.append(("response_special_tokens", f"the response spells `{special}`"))
    if reward.function is None and extract_answer(response, reward.answer) is None:
        found.append(
            (
                "response_no_answer",
                f"the response has no answer where reward.answer={reward.answer} looks for it",
            )
        )
    if reward.format_weight and not (tags_reward if reward.format == "tags" else boxed_reward)(
        response
    ):
        found.append(("response_format", f"reward.format={reward.format} gives the response 0"))
    return found


def normalised(text: str) -> str:
    """The text as duplicates are looked for: compatibility forms, lower case, spaces as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def own_text(prompt: Prompt, added: Sequence[str]) -> str:
    """What the row itself asks: the texts of its messages, less those that the config adds."""
    texts = (
        "".join(p["text"] for p in m["content"] if p["type"] == "text" and p["text"] not in added)
        for m in prompt.messages
    )
    return "\n".join(text for text in texts if text)
