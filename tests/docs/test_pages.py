"""Every page: links lead somewhere, commands parse, configs load, prose has no date of its own."""

import re
import shlex

import pytest
import yaml

from rlfr_vlm.arguments import build_parser
from rlfr_vlm.config import Config, parse_config
from rlfr_vlm.data.prompts import COLUMNS
from scripts.config_reference import sections
from tests.docs.pages import BLOCK, DOCS, PAGES, ROOT, blocks, prose

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DATED = re.compile(
    r"\b(yet|until now|now|(?<!stand )still|currently|at the moment|so far|recently)\b", re.I
)
# What was measured, and when: these tell earlier figures from later ones.
RECORDS = {"performance.md", "flow_signal.md", "reliability_results.md"}
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def anchors(text: str) -> set[str]:
    """The places of a page that a link can name, as GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


@each_page
def test_relative_links_lead_somewhere(path):
    for link in LINK.findall(prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_knows_every_page():
    linked = set(LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {p.name for p in DOCS.glob("*.md")} - {"index.md"} <= linked


@each_page
def test_prose_holds_no_dated_sentence(path):
    if path.name not in RECORDS:
        code = re.sub(r"`[^`]*`", "", prose(path))
        found = [line for line in code.splitlines() if DATED.search(line)]
        assert not found, found


def commands(path) -> list[list[str]]:
    """Every command of ours in a page's blocks, as words; those with a placeholder for many words
    are left to the reader.
    """
    found = []
    for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if kind in ("sh", "console"):
            for part in re.split(r"\n|;", text.replace("\\\n", "")):
                words = [w for w in shlex.split(part, comments=True) if w != "&"]
                if "rlfr_vlm.cli" in words:
                    words = ["rlfr-vlm", *words[words.index("rlfr_vlm.cli") + 1 :]]
                if words[:1] == ["rlfr-vlm"] and "..." not in words and "VERB" not in words:
                    found.append(words[1:])
    return found


@each_page
def test_commands_parse(path):
    for words in commands(path):
        build_parser().parse_args(words)


def test_the_readme_is_short_and_its_config_loads():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    (config,) = [found for kind, found in BLOCK.findall(text) if kind == "yaml"]
    cfg = parse_config(yaml.safe_load(config))
    assert cfg.flow is not None and cfg.flow.profile == "informed"


def test_the_columns_of_a_row_are_those_that_are_read():
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", (DOCS / "data.md").read_text(), re.M)
    told = {name: (name, *re.findall(r"`(\w+)`", others)) for name, others in rows}
    assert {name: set(names) for name, names in told.items()} == {
        name: set(names) for name, names in COLUMNS.items()
    }
    assert len(blocks("data.md", "json")) == 1


def test_the_index_names_every_verb():
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    (line,) = (row for row in text.splitlines() if "VERB --help" in row)
    assert set(re.findall(r"`([\w-]+)`", line)) == set(subparsers.choices)


def keys() -> set[str]:
    """Every dotted place of the config tree, sections too."""
    found = set(Config.model_fields)
    for path, section, _ in sections(Config):
        found |= {path, *(f"{path}.{name}" for name in section.model_fields)}
    return found


@each_page
def test_settings_that_prose_names_are_settings(path):
    known = keys()
    named = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", prose(path))
    strange = [
        name
        for name in named
        if name.partition(".")[0] in Config.model_fields
        and name not in known
        and not name.endswith((".md", ".py", ".yaml", ".json", ".jsonl", ".parquet"))
    ]
    assert not strange, strange


def test_the_rooms_of_the_architecture_are_there_and_all_of_them():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## Decisions")]
    named = set(re.findall(r"`([\w/.]+(?:/|\.py))`", table))
    package = ROOT / "rlfr_vlm"
    assert all((package / name).exists() for name in named), named
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert rooms <= named
