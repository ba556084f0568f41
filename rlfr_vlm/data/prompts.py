"""Rows of a data set -> Prompt, under every column name that users have."""

from __future__ import annotations

import json
import re
from typing import Any

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.rows import Unreadable, read_rows, row_origin
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import Prompt

Message = dict[str, Any]  # role, and content: parts with a type, and a text or a source

IMAGE_MARK = "<image>"
COLUMNS = {
    "prompt": ("prompt", "messages", "message", "conversations", "problem", "question", "query"),
    "images": ("images", "image", "image_path", "image_urls"),
    "answer": ("answer", "solution", "ground_truth", "label", "final_answer", "reward_model"),
    "response": ("response", "expert_response", "chosen"),
    "id": ("id", "uid", "uuid", "index"),
    "data_source": ("data_source", "datasource"),
}
UNSUPPORTED = ("videos", "video", "audios", "audio")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def load_prompts(
    source: str,
    cfg: DataConfig,
    bad: BadRows,
    limit: int | None = None,
    need: str = "answer",
) -> list[Prompt]:
    """All usable rows of a data set.

    need: the column that every row must have, "answer" for RL and evaluation or "response" for
        fitting the flow.
    Raises UserError for an unreadable file, for bad rows as `data.on_bad_row` says, and for a data
    set without rows.
    """
    parsed: list[Prompt | tuple[str, RowError]] = []
    for name, row, unreadable in read_rows(source):
        if limit is not None and len(parsed) >= limit:
            break
        where = row_origin(source, name)
        try:
            parsed.append(read_prompt(row, unreadable, where, cfg, need, name))
        except RowError as error:
            parsed.append((where, error))
    if not parsed:
        raise UserError(f"data {source}: no rows")
    kept: list[Prompt] = []
    seen: dict[str, str] = {}
    for found in parsed:
        if isinstance(found, Prompt):
            try:
                claim_id(found.id, found.origin, seen)
                kept.append(found)
            except RowError as error:
                bad.add(found.origin, error, len(parsed))
        else:
            bad.add(*found, len(parsed))
    if not kept:
        raise UserError(f"data {source}: no usable rows")
    return kept


def read_prompt(
    row: dict[str, Any] | None,
    problem: Unreadable | None,
    where: str,
    cfg: DataConfig,
    need: str,
    name: str,
) -> Prompt:
    """What `read_rows` found as a Prompt. Raises RowError naming it where it is no row, or one that
    cannot be used.
    """
    if row is None:
        raise RowError("schema", f"{where}: {problem}", problem.fault if problem else "")
    return parse_row(row, where, cfg, need, name)


def claim_id(row_id: str, where: str, seen: dict[str, str]) -> None:
    """Notes who has an id. Raises RowError where another usable row of the data set has it
    already.
    """
    if row_id in seen:
        raise RowError("duplicate_id", f"{where}: id `{row_id}` was already used at {seen[row_id]}")
    seen[row_id] = where


def parse_row(
    row: dict[str, Any], where: str, cfg: DataConfig, need: str = "answer", default_id: str = ""
) -> Prompt:
    """One row -> Prompt. `where` is for messages; `default_id` is the id of a row without one
    (default: where).

    Raises RowError naming the row and the column.
    """
    _refuse_other_media(row, where)
    asked, closing = _messages(row, where)
    images, messages = _placed_images(row, _framed(asked, cfg), where)
    answer, response = _solutions(row, closing, where, need)
    row_id = _row_id(row) or default_id or where
    _refuse_broken_text(messages, row_id, response, where)
    known = {name for names in COLUMNS.values() for name in names}
    return Prompt(
        id=row_id,
        messages=tuple(_without_sources(message) for message in messages),
        images=images,
        answer=answer,
        response=response if isinstance(response, str) else None,
        data_source=str(_column(row, "data_source") or ""),
        extra={k: v for k, v in row.items() if k not in known},
        origin=where,
    )


def _refuse_other_media(row: dict[str, Any], where: str) -> None:
    for name in UNSUPPORTED:
        if any(value is not None for value in _as_list(row.get(name))):
            reason = f"{where}: the row has `{name}`; only pictures are supported"
            raise RowError("media", reason, "media_unsupported")


def _framed(messages: list[Message], cfg: DataConfig) -> list[Message]:
    """With the config's system message, unless there is one, and its text after the question."""
    if cfg.system and messages[0]["role"] != "system":
        system = {"role": "system", "content": [{"type": "text", "text": cfg.system}]}
        messages = [system, *messages]
    if not cfg.suffix:
        return messages
    *before, last = messages
    content = [*last["content"], {"type": "text", "text": cfg.suffix}]
    return [*before, {**last, "content": content}]


def _placed_images(
    row: dict[str, Any], messages: list[Message], where: str
) -> tuple[tuple[Any, ...], list[Message]]:
    """The row's pictures, from its column or out of its messages, as many as have a place there."""
    parts = [part for m in messages for part in m["content"]]
    embedded = [part["source"] for part in parts if part.get("source") is not None]
    images = tuple(
        source.removeprefix("file://") if isinstance(source, str) else source
        for source in _as_list(_column(row, "images")) or embedded
    )
    marks = sum(part["type"] == "image" for part in parts)
    if images and not marks:  # rows that never mark the place: the pictures come first
        first = next(i for i, m in enumerate(messages) if m["role"] == "user")
        content = [{"type": "image"}] * len(images) + messages[first]["content"]
        asked = {**messages[first], "content": content}
        return images, [*messages[:first], asked, *messages[first + 1 :]]
    if marks != len(images):
        reason = f"{len(images)} images but {marks} image placeholders in the prompt"
        raise RowError("image_count", f"{where}: {reason}")
    return images, messages


def _solutions(row: dict[str, Any], closing: str, where: str, need: str) -> tuple[str, Any]:
    """The gold answer and the expert response; `closing` is the last turn of a conversation."""
    answer, given = _answer(row), _column(row, "answer")
    response = _column(row, "response")
    if response is None:
        response = closing or None
    if need == "answer" and row.get("conversations") is not None and given is None:
        answer = closing  # VLM-R1: the last turn is the gold answer
    if need == "answer" and not answer:
        missing = given in (None, [], {}) or not str(given).strip()
        columns = ", ".join(COLUMNS["answer"])
        reason = f"{where}: the answer is empty or missing (columns: {columns})"
        raise RowError("answer", reason, "answer_missing" if missing else "answer_type")
    if need == "response" and not (isinstance(response, str) and response.strip()):
        columns = ", ".join(COLUMNS["response"])
        reason = f"{where}: the expert response is empty or missing (columns: {columns})"
        raise RowError("response", reason, "response_missing")
    return answer, response


def _refuse_broken_text(messages: list[Message], row_id: str, response: Any, where: str) -> None:
    parts = [part for m in messages for part in m["content"]]
    texts = [("prompt", part["text"]) for part in parts if part["type"] == "text"]
    for what, text in [*texts, ("id", row_id), ("response", response)]:
        if isinstance(text, str) and LONE_SURROGATE.search(text):
            reason = f"the {what} holds half a character (a lone surrogate), which no text can"
            raise RowError("schema", f"{where}: {reason}", "text_broken")


def _without_sources(message: Message) -> Message:
    content = [{k: v for k, v in part.items() if k != "source"} for part in message["content"]]
    return {"role": message["role"], "content": content}


def _column(row: dict[str, Any], name: str) -> Any:
    for key in COLUMNS[name]:
        if row.get(key) is not None:
            return row[key]
    return None


def _row_id(row: dict[str, Any]) -> str:
    """The row's own id; in verl's rows the index in `extra_info`, which counts anew in each data
    source.
    """
    own, info = _column(row, "id"), row.get("extra_info")
    if own is None and isinstance(info, dict) and info.get("index") is not None:
        return "/".join(
            str(part) for part in (_column(row, "data_source"), info["index"]) if part is not None
        )
    return "" if own is None else str(own)


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [*value] if isinstance(value, list | tuple) else [value]


def _answer(row: dict[str, Any]) -> str:
    value = _column(row, "answer")
    if isinstance(value, dict):  # verl: {"style": "rule", "ground_truth": ...}
        value = value.get("ground_truth")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        return ""
    return str(value).strip()


def _messages(row: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], str]:
    """Chat messages whose content is a list of text and image parts, from a question, messages, or
    from/value turns.

    Second: the text of a closing turn of the assistant, which is no part of the prompt.
    """
    value = _column(row, "prompt")
    if isinstance(value, str):
        value = _turns_in(value, where) or [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise RowError(
            "schema",
            f"{where}: no prompt (columns: {', '.join(COLUMNS['prompt'])})",
            "prompt_missing",
        )
    messages: list[dict[str, Any]] = []
    for message in value:
        role = ROLES.get(str(message.get("role", message.get("from"))))
        content = message.get("content", message.get("value"))
        if role is None or content is None:
            raise RowError(
                "schema",
                f"{where}: a message needs a role (system, user, assistant) and content",
                "messages_malformed",
            )
        messages.append({"role": role, "content": _parts(content, where)})
    closing: list[str] = []
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        closing.insert(
            0,
            "".join(
                part["text"] for part in messages.pop()["content"] if part["type"] == "text"
            ).strip(),
        )
    if messages[-1]["role"] != "user":
        raise RowError(
            "schema", f"{where}: the last message must be the user's", "messages_malformed"
        )
    if not any(p["type"] == "image" or p["text"].strip() for p in messages[-1]["content"]):
        raise RowError("schema", f"{where}: the prompt is empty", "prompt_empty")
    return messages, "\n".join(closing)


def _turns_in(text: str, where: str) -> list[dict[str, Any]] | None:
    """The messages that a text encodes as JSON (MM-EUREKA, lmm-r1); None for a text that is a
    question.
    """
    if not re.match(r"\s*\[\s*\{", text):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        if re.match(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]""", text):
            problem = (
                f"{where}: the prompt looks like messages, but is not JSON: {text.strip()[:40]}..."
            )
            raise RowError("schema", problem, "messages_malformed") from None
        return None
    return (
        turns
        if all(isinstance(turn, dict) and {"content", "value"} & turn.keys() for turn in turns)
        else None
    )


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        pieces = content.split(IMAGE_MARK)
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            if number:
                parts.append({"type": "image"})
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts or [{"type": "text", "text": ""}]
    if not isinstance(content, list):
        raise RowError(
            "schema",
            f"{where}: message content must be text or a list of parts",
            "messages_malformed",
        )
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += _parts(part["text"], where)
        elif kind in ("image", "image_url"):
            source = part.get("image", part.get("url", part.get("image_url", part.get("path"))))
            parts.append(
                {
                    "type": "image",
                    "source": source.get("url")
                    if isinstance(source, dict) and "url" in source
                    else source,
                }
            )
        else:
            raise RowError(
                "schema",
                f"{where}: a message part is neither text nor an image",
                "messages_malformed",
            )
    return parts
