"""How many rows a data file has, as far as that is known without reading them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlfr_vlm.errors import UserError
from rlfr_vlm.planning.wording import number


@dataclass(frozen=True)
class RowCount:
    """How many rows a data file has, as far as can be told without downloading or checking them."""

    count: int | None
    text: str


def count_rows(source: str, limit: int | None = None) -> RowCount:
    """Rows of a data file, good and bad ones, at most `limit`. Raises UserError for one that cannot
    be read.
    """
    path = Path(source)
    if not path.exists():
        local = path.suffix or source.startswith((".", "/"))
        return RowCount(
            None,
            f"rows unknown: {source} {'is not there yet' if local else 'is read from the hub'}",
        )
    if path.suffix not in ROW_FILES or not path.is_file():
        raise UserError(f"data file {source}: expected .jsonl, .json, .parquet or .arrow")
    try:
        found = ROW_FILES[path.suffix](path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"data file {source} cannot be read as {path.suffix}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    except ImportError:
        return RowCount(
            None,
            f"rows unknown: {source}: reading Parquet and Arrow needs the extra: pip install "
            "'rlfr-vlm[data]'",
        )
    count = min(found, limit or found)
    return RowCount(
        count, f"{number(count)}{f' of {number(found)}' if count < found else ''} rows: {source}"
    )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _count_list(path: Path) -> int:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("expected a list of rows")
    return len(rows)


def _count_parquet(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(path).num_rows)


def _count_arrow(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(file))


ROW_FILES = {
    ".jsonl": _count_lines,
    ".json": _count_list,
    ".parquet": _count_parquet,
    ".arrow": _count_arrow,
}
