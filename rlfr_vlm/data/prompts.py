"""Rows of a data set -> Prompt: JSONL, JSON, Parquet or a hub name, under every column name that
users have.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.config import DataConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import Prompt

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
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# of objects and lists in one another; a row needs six, and what walks over it is recursive
MAX_NESTING = 100


def printable(text: str) -> str:
    """Text of a row for a message: what steers a terminal, turns its direction or cannot be encoded
    is shown as its escape.
    """
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


class RowError(Exception):
    """A row that cannot be used. `kind` is a short class for counting, `fault` names the defect
    (rlfr_vlm.preflight.kinds lists them); the message says what is wrong and where.
    """

    def __init__(self, kind: str, message: str, fault: str = "") -> None:
        super().__init__(printable(message))
        self.kind = kind
        self.fault = fault or kind


@dataclass(frozen=True)
class Unreadable:
    """Why a line is no row."""

    fault: str
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    id: str
    kind: str
    reason: str


class BadRows:
    """What happens to rows that cannot be used: stop at the first, or skip, record and count
    them.
    """

    def __init__(
        self, cfg: DataConfig, record: Path | None = None, switch: str = "data.on_bad_row=skip"
    ) -> None:
        """record: where skipped rows are written down. switch: what the user has to write for rows
        to be skipped.
        """
        self.stop, self.switch = cfg.on_bad_row == "stop", switch
        self.max_frac = cfg.max_bad_frac
        self.record = record
        self.rows: list[BadRow] = []
        self.total = 0  # rows of the data set

    def add(self, row_id: str, error: RowError, total: int) -> None:
        """Raises UserError with `on_bad_row=stop`, or when more than `max_bad_frac` of all rows are
        bad.

        total: rows that the caller looks at. A later look is at those that earlier ones left: the
            first is at all of them.
        """
        if self.stop:
            raise UserError(f"{error} ({self.switch} leaves such rows out)")
        row = BadRow(row_id, error.kind, str(error))
        self.rows.append(row)
        if self.record is not None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with self.record.open("a") as file:
                file.write(json.dumps(row.__dict__) + "\n")
        self.total = max(self.total, total)
        if len(self.rows) > self.max_frac * self.total:
            raise UserError(
                f"{len(self.rows)} bad rows of {self.total} exceed "
                f"data.max_bad_frac={self.max_frac}; the last: {error}"
            )


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any] | None, Unreadable | None]]:
    """Rows of a file or hub data set as (name, row, problem); `row` is None where the line is not a
    JSON object, and `problem` says why.
    """
    path = Path(source)
    if not path.exists():
        if path.suffix or source.startswith((".", "/")):
            raise UserError(f"data file {source} does not exist")
        yield from _hub_rows(source)
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            # split at \n only: the line separators of Unicode may stand in strings
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield (f"{path.name}:{number}", *_json_row(line))
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"data file {source} is not JSON: {error}") from None
        if not isinstance(rows, list):
            raise UserError(f"data file {source}: expected a list of rows")
        for number, row in enumerate(rows):
            yield (f"{path.name}[{number}]", *_object(row, "not an object"))
    elif path.suffix in (".parquet", ".arrow"):
        for number, row in enumerate(_table_rows(path)):
            yield f"{path.name}[{number}]", row, None
    else:
        raise UserError(f"data file {source}: expected .jsonl, .json, .parquet or .arrow")


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, or of an Arrow file as `datasets.save_to_disk` writes it; never the
    whole file: some hold millions.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"data file {path}: reading Parquet and Arrow needs the extra: pip install "
            "'rlfr-vlm[data]'"
        ) from None
    try:
        for batch in (
            parquet.ParquetFile(path).iter_batches(batch_size=256)
            if path.suffix == ".parquet"
            else pa.ipc.open_stream(path)
        ):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"data file {path} is not readable {path.suffix[1:].capitalize()}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def _json_row(line: bytes) -> tuple[dict[str, Any] | None, Unreadable | None]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return None, Unreadable("utf8_invalid", f"not JSON: {error}")
    except (ValueError, RecursionError) as error:
        return None, Unreadable("json_invalid", f"not JSON: {error}")
    return _object(row, "not a JSON object", line.count(b"[") + line.count(b"{"))


def _object(
    value: Any, otherwise: str, opened: int = MAX_NESTING + 1
) -> tuple[dict[str, Any] | None, Unreadable | None]:
    """A value of JSON as a row. opened: how many objects and lists it holds, at most."""
    if not isinstance(value, dict):
        return None, Unreadable("not_object", otherwise)
    level: list[Any] = [value] if opened > MAX_NESTING else []
    for _ in range(MAX_NESTING):
        level = [
            part
            for nest in level
            for part in (nest.values() if isinstance(nest, dict) else nest)
            if isinstance(part, dict | list)
        ]
    return (
        (None, Unreadable("json_invalid", f"nested more than {MAX_NESTING} deep"))
        if level
        else (value, None)
    )


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any] | None, Unreadable | None]]:
    try:
        from datasets import load_dataset
        from datasets.table import embed_table_storage
    except ImportError:
        raise UserError(
            f"data `{source}` is no file; for a hub data set install the extra: pip install "
            "'rlfr-vlm[data]'"
        ) from None
    full_name, _, split = source.partition("@")
    name, _, subset = full_name.partition(":")
    try:
        rows = load_dataset(name, subset or None, split=split or "train")
    # the hub client raises many kinds; all mean that the data set is not to be had
    except Exception as error:
        raise UserError(
            f"data set {source} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    number = 0
    for table in rows.with_format("arrow").iter(batch_size=256):
        # pictures stay the bytes that were published, undecoded
        for row in embed_table_storage(table).to_pylist():
            yield f"{source}[{number}]", row, None
            number += 1


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


def row_origin(source: str, name: str) -> str:
    """What messages call a row: the path of its file, and its line or index in it."""
    return str(Path(source).with_name(name)) if Path(source).exists() else name


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
    for name in UNSUPPORTED:
        if any(value is not None for value in _as_list(row.get(name))):
            raise RowError(
                "media",
                f"{where}: the row has `{name}`; only pictures are supported",
                "media_unsupported",
            )
    images = _as_list(_column(row, "images"))
    messages, closing = _messages(row, where)
    if cfg.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": cfg.system}]})
    if cfg.suffix:
        messages[-1] = {
            **messages[-1],
            "content": [*messages[-1]["content"], {"type": "text", "text": cfg.suffix}],
        }
    embedded = [
        part["source"] for m in messages for part in m["content"] if part.get("source") is not None
    ]
    if embedded and not images:
        images = embedded
    images = [
        source.removeprefix("file://") if isinstance(source, str) else source for source in images
    ]
    marks = sum(part["type"] == "image" for m in messages for part in m["content"])
    if images and not marks:  # rows that never mark the place: the pictures come first
        first = next(i for i, m in enumerate(messages) if m["role"] == "user")
        messages[first] = {
            **messages[first],
            "content": [{"type": "image"}] * len(images) + messages[first]["content"],
        }
    elif marks != len(images):
        raise RowError(
            "image_count",
            f"{where}: {len(images)} images but {marks} image placeholders in the prompt",
        )
    answer = _answer(row)
    response = _column(row, "response")
    response = closing or None if response is None else response
    if need == "answer" and row.get("conversations") is not None and _column(row, "answer") is None:
        answer = closing  # VLM-R1: the last turn is the gold answer
    if need == "answer" and not answer:
        given = _column(row, "answer")
        fault = (
            "answer_missing" if given in (None, [], {}) or not str(given).strip() else "answer_type"
        )
        raise RowError(
            "answer",
            f"{where}: the answer is empty or missing (columns: {', '.join(COLUMNS['answer'])})",
            fault,
        )
    if need == "response" and not (isinstance(response, str) and response.strip()):
        columns = ", ".join(COLUMNS["response"])
        raise RowError(
            "response",
            f"{where}: the expert response is empty or missing (columns: {columns})",
            "response_missing",
        )
    row_id = _row_id(row) or default_id or where
    texts = [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]
    for what, text in [
        *(("prompt", text) for text in texts),
        ("id", row_id),
        ("response", response),
    ]:
        if isinstance(text, str) and LONE_SURROGATE.search(text):
            raise RowError(
                "schema",
                f"{where}: the {what} holds half a character (a lone surrogate), which no text can",
                "text_broken",
            )
    known = {name for names in COLUMNS.values() for name in names}
    clean = tuple(
        {
            "role": m["role"],
            "content": [{k: v for k, v in p.items() if k != "source"} for p in m["content"]],
        }
        for m in messages
    )
    return Prompt(
        id=row_id,
        messages=clean,
        images=tuple(images),
        answer=answer,
        response=response if isinstance(response, str) else None,
        data_source=str(_column(row, "data_source") or ""),
        extra={k: v for k, v in row.items() if k not in known},
        origin=where,
    )


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


class PromptStream:
    """Prompts in a seeded order, a new one each epoch, from a position that a checkpoint can
    hold.
    """

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0  # rows drawn since the start

    def draw(self) -> int:
        """Index of the next row."""
        epoch, offset = divmod(self.position, self.size)
        self.position += 1
        if not self.shuffle:
            return offset
        import torch  # here: who only reads rows need not wait for it

        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = (
                epoch,
                torch.randperm(self.size, generator=generator).tolist(),
            )
        return self._order[offset]
