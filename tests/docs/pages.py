"""The pages of the documentation, read as text: their code blocks, their links, their words."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *kinds: str) -> list[str]:
    """Code blocks of docs/PAGE of these kinds, in order; all of them where none is named."""
    found = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    return [text for kind, text in found if not kinds or kind in kinds]


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def source() -> str:
    """All of the package's Python, with the strings that continue on a further line joined."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "rlfr_vlm").rglob("*.py"))]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def resolve(place: str) -> object:
    """`rlfr_vlm/a/b.py::name.attribute` as an object. Raises where the file, or the name in it, is
    not there.
    """
    file, _, name = place.partition("::")
    assert (ROOT / file).is_file(), f"{place}: no such file"
    module = file.removesuffix(".py").removesuffix("/__init__")
    found: object = importlib.import_module(module.replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    return found
