"""Rollouts that were written as Parquet, as the objects that JSON lines would have given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_COLUMNS = ("parts", "attention")


class UnreadableTable(Exception):
    """Says what is wrong with a file, and what to do."""


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in order. Columns of types that JSON does not have are left out. Raises UnreadableTable;
    OSError where there is no such file.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UnreadableTable("is Parquet: pip install pyarrow to see it") from None
    size = path.stat().st_size
    if size == 0:
        raise UnreadableTable("empty")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = [field.name for field in file.schema_arrow if _plain(field.type, pa)]
            for batch in file.iter_batches(batch_size=64, columns=names):
                for row in batch.to_pylist():
                    yield {
                        name: _decoded(value) if name in JSON_COLUMNS else value
                        for name, value in row.items()
                    }
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UnreadableTable(
            f"not a whole Parquet table: {' '.join(str(error).split())[:200]}"
        ) from None


def _plain(found: Any, pa: Any) -> bool:
    """Whether values of a type are text, numbers, true or false, or lists of them."""
    types = pa.types
    if types.is_list(found) or types.is_large_list(found) or types.is_dictionary(found):
        return _plain(found.value_type, pa)
    return any(
        test(found)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_integer,
            types.is_floating,
            types.is_boolean,
            types.is_null,
        )
    )


def _decoded(value: Any) -> Any:
    """JSON text as what it stands for; anything else, and what is no JSON, as nothing."""
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None
