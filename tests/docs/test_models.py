"""docs/models.md claims for each family what a test proves of it: no more, and no less."""

import ast
import re
from pathlib import Path

import pytest

from rlfr_vlm.models.families import FAMILIES
from tests.docs.pages import DOCS, ROOT

TEXT = (DOCS / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(?!model_type)(\w+)` \|(.*)\|$", TEXT, re.MULTILINE)
CELLS = {name: [cell.strip() for cell in rest.split("|")] for name, rest in ROWS}
CLAIMS = {
    int(number): place
    for number, place in re.findall(
        r"^(\d)\. [^`]*?(?:`[^`:]*`[^`]*?)*`(tests/\S+::\w+)`", TEXT, re.MULTILINE
    )
}


def assignments(path: Path) -> dict[str, ast.AST]:
    """What a module's names stand for, those that it imports from other tests too."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            other = ROOT / f"{node.module.replace('.', '/')}.py"
            if other.is_file():
                theirs = assignments(other)
                found |= {a.name: theirs[a.name] for a in node.names if a.name in theirs}
        elif isinstance(node, ast.Assign):
            found |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
    return found


def families_in(node: ast.AST, names: dict[str, ast.AST]) -> set[str]:
    """The families that an expression spells, names looked up."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and part.value in FAMILIES:
            found.add(part.value)
        elif isinstance(part, ast.Name) and part.id in names:
            found |= families_in(names[part.id], names)
    return found


def proven(place: str) -> set[str]:
    """The families that a test is parametrised with, or a constant of a test module lists."""
    file, _, name = place.partition("::")
    names = assignments(ROOT / file)
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            marks = [families_in(mark, names) for mark in node.decorator_list]
            return set().union(*marks)
    return families_in(names[name], names)


def test_every_family_has_its_row():
    assert set(CELLS) == set(FAMILIES)
    assert {name for name, cells in CELLS.items() if cells[1]} == {
        name for name, family in FAMILIES.items() if family.vision
    }


def test_every_column_names_its_test():
    assert sorted(CLAIMS) == list(range(1, 10))
    assert all(len(cells) == 2 + len(CLAIMS) for cells in CELLS.values())


@pytest.mark.parametrize("number", sorted(CLAIMS))
def test_a_claim_is_what_its_test_proves(number):
    claimed = {name for name, cells in CELLS.items() if cells[1 + number] == "✓"}
    assert claimed == proven(CLAIMS[number]), CLAIMS[number]
