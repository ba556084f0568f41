"""Rows of a data set as they lie in a file or on the hub, whatever their columns mean."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.errors import UserError

# of objects and lists in one another; a row needs six, and what walks over it is recursive
MAX_NESTING = 100


@dataclass(frozen=True)
class Unreadable:
    """Why a line is no row."""

    fault: str
    reason: str

    def __str__(self) -> str:
        return self.reason


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


def row_origin(source: str, name: str) -> str:
    """What messages call a row: the path of its file, and its line or index in it."""
    return str(Path(source).with_name(name)) if Path(source).exists() else name
