"""The responses of a step in a file of `rollouts/`: JSON lines, or a Parquet table with the same
columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = (
    "prompt_id",
    "data_source",
    "question",
    "answer",
    "response",
    "prediction",
    "verdict",
    "reason",
    "finish_reason",
)
WHOLE = ("step", "sample_index", "policy_version")
TEXT_LISTS = ("images", "tokens")
NUMBER_LISTS = ("logprobs", "advantages", "flow_rewards", "deviations", "entropy", "latent")


def write_rollouts(folder: Path, step: int, lines: Sequence[str], form: str) -> Path:
    """Write `step_N` of a `rollouts` folder. lines: a JSON object each; form: jsonl or parquet.
    Returns the file; one of the other form goes.
    """
    folder.mkdir(exist_ok=True)
    path, other = (
        folder / f"step_{step:06d}.{suffix}"
        for suffix in (form, "jsonl" if form == "parquet" else "parquet")
    )
    if form == "parquet":
        _write_table([json.loads(line) for line in lines], path)
    else:
        path.write_text("".join(lines))
    other.unlink(missing_ok=True)
    return path


def _write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Columns as in the JSON lines; those without a simple type (`parts`, `attention`) are JSON
    text.
    """
    import pyarrow as pa
    from pyarrow import parquet

    types = (
        dict.fromkeys(WHOLE, pa.int64())
        | dict.fromkeys(TEXTS, pa.string())
        | {"reward": pa.float64()}
    )
    types |= dict.fromkeys(TEXT_LISTS, pa.list_(pa.string())) | dict.fromkeys(
        NUMBER_LISTS, pa.list_(pa.float64())
    )
    names = list(dict.fromkeys(name for row in rows for name in row))
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    cells = [{name: _cell(row.get(name), name in types) for name in names} for row in rows]
    temporary = path.with_suffix(".tmp")  # half a table cannot be read at all
    parquet.write_table(
        pa.Table.from_pylist(cells, schema=schema),
        temporary,
        compression="zstd",
        write_page_checksum=True,
    )
    temporary.replace(path)


def _cell(value: Any, simple: bool) -> Any:
    """A value as its column has it: halves of surrogate pairs, which JSON can hold and UTF-8
    cannot, are replaced.
    """
    if value is not None and not simple:
        return json.dumps(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [_cell(each, simple) for each in value] if isinstance(value, list) else value
