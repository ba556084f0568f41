"""docs/reliability_results.md from the figures of a run of the reliability tests.

python -m tests.reliability.results FIGURES.jsonl docs/reliability_results.md
"""

import json
import re
import sys
from pathlib import Path

HEAD = """# Reliability: measured

Written by `make test-reliability`: the tests marked `reliability`, in full, on the machine named below. The lines are those of the contract in
[reliability.md](reliability.md).

| | figure | test | seconds |
|---|---|---|---|
"""


def order(line: dict) -> tuple[int, str]:
    """R2 before R10."""
    number = re.search(r"\d+", line["id"])
    return (int(number[0]) if number else 10**6, line["test"])


def page(lines: list[dict], machine: str) -> str:
    """The page of these figures."""
    newest = {(line["id"], line["test"]): line for line in lines}
    rows = [
        f"| {line['id']} | {line['figure']} | `{line['test']}` | {line['seconds']:g} |\n"
        for line in sorted(newest.values(), key=order)
    ]
    return HEAD + "".join(rows) + f"\n{machine}\n"


def main() -> None:
    """Command line."""
    from rlfr_vlm.storage.state import environment

    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    source, target = map(Path, sys.argv[1:])
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    target.write_text(page(lines, f"Python {found['python']}; {versions}; {found['device']}."))


if __name__ == "__main__":
    main()
