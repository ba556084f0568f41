"""What validate writes: quarantine.jsonl, warnings.jsonl, validate.json, and copies of the data
without the quarantined rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlfr_vlm.errors import UserError
from rlfr_vlm.preflight.facts import Role
from rlfr_vlm.preflight.scan import FileScan


def write_findings(
    folder: Path, data: Mapping[str, Any], scans: Mapping[Role, FileScan]
) -> list[Path]:
    """One line per finding, errors and warnings apart, and everything as data. Returns the
    files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, severity in (("quarantine.jsonl", "error"), ("warnings.jsonl", "warning")):
        lines = [
            asdict(found)
            for scan in scans.values()
            for found in scan.findings
            if found.severity == severity
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(folder / name)
    (folder / "validate.json").write_text(json.dumps(data, indent=1) + "\n")
    return [*files, folder / "validate.json"]


def check_copies(sources: Mapping[Role, str], folder: Path) -> None:
    """Raises UserError where a copy cannot be made, before anything is read."""
    names: dict[str, str] = {}
    for source in sources.values():
        path = Path(source)
        if not path.exists():
            raise UserError(f"--clean copies files, but {source} is none")
        if names.setdefault(path.name, str(path.resolve())) != str(path.resolve()):
            raise UserError(
                f"--clean: two data files are called {path.name}: validate them one at a time"
            )
        if path.parent.resolve() == (folder / "clean").resolve():
            raise UserError(f"--clean would write over {source}: choose another --out")


def write_copies(folder: Path, scans: Mapping[Role, FileScan]) -> dict[Role, Path]:
    """A copy of each file without its bad rows, and without those beyond a limit, which nobody
    looked at. Rows keep their content.
    """
    copies: dict[Role, Path] = {}
    bad: dict[str, set[int]] = {}
    rows: dict[str, int] = {}
    for scan in scans.values():  # a file may serve twice
        bad[scan.file] = bad.get(scan.file, set()) | scan.bad
        rows[scan.file] = max(rows.get(scan.file, 0), scan.rows)
    (folder / "clean").mkdir(parents=True, exist_ok=True)
    for role, scan in scans.items():
        source, copy = Path(scan.file), folder / "clean" / Path(scan.file).name
        if scan.rows:
            _copy(source, copy, bad[scan.file], rows[scan.file])
            copies[role] = copy
    return copies


def _copy(source: Path, copy: Path, bad: set[int], rows: int) -> None:
    if source.suffix == ".jsonl":
        seen = 0
        with source.open("rb") as read, copy.open("wb") as written:
            for number, line in enumerate(read, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip() and seen < rows:
                    seen += 1
                    if number not in bad:
                        written.write(line if line.endswith(b"\n") else line + b"\n")
    elif source.suffix == ".json":
        kept = [
            row
            for number, row in enumerate(json.loads(source.read_text(encoding="utf-8-sig"))[:rows])
            if number not in bad
        ]
        copy.write_text(json.dumps(kept, ensure_ascii=True, indent=1) + "\n")
    else:
        _copy_table(source, copy, bad, rows)


def _copy_table(source: Path, copy: Path, bad: set[int], rows: int) -> None:
    """Parquet or Arrow, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    is_parquet = source.suffix == ".parquet"
    file = parquet.ParquetFile(source) if is_parquet else pa.ipc.open_stream(source)
    schema = file.schema_arrow if is_parquet else file.schema
    with (
        parquet.ParquetWriter(copy, schema)
        if is_parquet
        else pa.ipc.new_stream(copy, schema) as written
    ):
        start = 0
        for batch in file.iter_batches(batch_size=256) if is_parquet else file:
            keep = [i for i in range(batch.num_rows) if start + i < rows and start + i not in bad]
            written.write_batch(batch.take(pa.array(keep, pa.int64())))
            start += batch.num_rows


def copied_settings(
    copies: Mapping[Role, Path], scans: Mapping[Role, FileScan], media_dirs: tuple[str, ...]
) -> list[str]:
    """The overrides with which training reads the copies: their pictures lie where they were."""
    folders = dict.fromkeys(
        [*(str(Path(scans[role].file).parent.resolve()) for role in copies), *media_dirs]
    )
    return [
        *(f"data.{role}={path}" for role, path in copies.items()),
        f"data.media_dirs={json.dumps([*folders])}",
    ]
