"""Where a response's answer stands, and a gold answer without its wrapping."""

from __future__ import annotations

import re
from typing import Literal

Where = Literal["boxed", "tag", "text"]

MAX_ANSWER = 2_000  # characters of an answer; a longer one is wrong: no gold answer comes near
MAX_TEXT = 20_000  # characters at the end of a response in which its answer is looked for
_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(r"(?im)\banswer(?:\s{1,3}is|\*{0,2}\s{0,3}:)|^####(?=[^a-zA-Z\n]{1,50}$)")
_ITEM = re.compile(
    r"\([A-J]\)|\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)|(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?%)?"
)
_JOINER = re.compile(r"[ \t]{0,3}(?:[,;/&]|or|and)[ \t]{0,3}(?:or|and)?[ \t]{0,3}")
_OPTION = re.compile(r"\(?[A-J][.:)] ")
_CHOSEN = re.compile(r"\([A-J]\)")
_WORD = re.compile(r"(?<!\\)\b(?!or\b|and\b)[^\W\d_]{2,}")


def extract_answer(text: str, where: Where) -> str | None:
    r"""The final answer of a response, as written, or None.

    What stands before the last </think>, or behind a <think> that is never closed, is reasoning and
    no answer.
    boxed: the last complete \boxed{...} or \fbox{...}; of boxes in a box, the outer one.
    tag: the last <answer>..</answer>, or the box that it holds.
    text: the tag, else the box, else what follows the last "answer is", "answer:" or "####", else
        the last line where that is an expression,
    a name or an option, else the last number or $formula$ with those joined to it ("42 or 43"; "2,
    3 and 5"). Reads the last MAX_TEXT characters, in linear time.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0][-MAX_TEXT:]
    box = last_box(text)
    if where == "boxed":
        return box
    tag = _last_tag(text)
    if where == "tag" or tag is not None:
        return tag if tag is None else last_box(tag) or tag
    if box is not None:
        return box
    return _after_mark(text) or _last_line(text)


def last_box(text: str) -> str | None:
    """Content of the box that closes last: one pass with a stack of open braces (None for those of
    no box).
    """
    stack: list[tuple[int, int] | None] = []
    found = None  # (box start, content start, content end, box end)
    for token in _BOX_TOKEN.finditer(text):
        kind = token.group()
        if kind == "{":
            stack.append(None)
        elif kind != "}":  # a box, or an escaped character
            stack += [token.span()] if kind.endswith("{") and len(kind) > 2 else []
        elif stack and (opened := stack.pop()):
            start, content = opened
            if (
                found
                and found[0] >= content
                and not (text[content : found[0]] + text[found[3] : token.start()]).strip()
            ):
                found = (start, *found[1:3], token.end())  # filled by another box
            else:
                found = (start, content, token.start(), token.end())
    return text[slice(*found[1:3])].strip() if found else None


def _last_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def _after_mark(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or "####" on its line, or on the next line that
    says anything.
    """
    end = max((mark.end() for mark in _MARK.finditer(text)), default=len(text))
    return text[end:].strip(" \t\r\n:*").split("\n", 1)[0].strip(" \t\r*").removesuffix(".") or None


def _last_line(text: str) -> str | None:
    line = text.strip().rsplit("\n", 1)[-1].strip()
    is_expression = "$" not in line and not _WORD.search(line)
    is_text = (len(line.split()) <= 4 and not _CHOSEN.search(line)) or _OPTION.match(line)
    if line and (is_expression or (is_text and not any(c.isdigit() or c == "$" for c in line))):
        return line.removesuffix(".")
    items = list(_ITEM.finditer(text, max(0, len(text) - MAX_ANSWER)))
    if not items:
        return None
    first = len(items) - 1
    while first and _JOINER.fullmatch(text, items[first - 1].end(), items[first].start()):
        first -= 1
    return text[items[first].start() : items[-1].end()].strip()


def unwrap_gold(gold: str) -> str:
    r"""The answer in a gold column: in its \boxed{} or <answer>, after the last `####` (GSM8K),
    else the column itself.
    """
    gold = gold.strip()
    return last_box(gold) or _last_tag(gold) or gold.rpartition("####")[2].strip()
