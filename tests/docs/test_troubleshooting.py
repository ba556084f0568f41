"""docs/troubleshooting.md quotes what the package really says."""

import re

import pytest

from rlfr_vlm.arguments import build_parser
from rlfr_vlm.config import MonitorsConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.run.monitors import CHECKS
from tests.docs.pages import DOCS, blocks, source

TEXT = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = [" ".join(line[2:].split()) for line in TEXT.splitlines() if line.startswith("> ")]
EXIT_CODES = {0, 2, 3, 4, 5, 75, 130}


def fragments(quote: str) -> list[str]:
    """The fixed parts of a message, as the source spells them."""
    found = [part.strip(" `;:,()") for part in quote.split("…")]
    return [part for part in found if len(part) > 3]


@pytest.fixture(scope="module")
def spelt():
    return " ".join(source().split())


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_source(quote, spelt):
    assert fragments(quote), "nothing of it is fixed"
    for part in fragments(quote):
        assert part in spelt, part


def test_negative_control_a_message_that_nobody_says_is_not_found(spelt):
    assert not any(part in spelt for part in fragments("the moon of … is made of cheese"))


def test_every_exit_code_is_told():
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    assert told == EXIT_CODES
    errors = {error.exit_code for error in all_errors(UserError)}
    assert errors | {0, 75, 130} == EXIT_CODES


def all_errors(kind: type) -> set:
    """A class and everything below it."""
    return {kind}.union(*(all_errors(below) for below in kind.__subclasses__()))


def test_every_monitor_is_one_of_the_config():
    """What the page says of monitors is worth nothing where the names are not the config's."""
    named = set(re.findall(r"monitors\.(\w+)=", TEXT))
    assert named <= set(MonitorsConfig.model_fields)
    assert set(CHECKS) <= set(MonitorsConfig.model_fields)


def test_its_commands_parse():
    for line in "".join(blocks("troubleshooting.md", "sh")).splitlines():
        words = line.partition("#")[0].split()
        if words[0] == "rlfr-vlm":
            build_parser().parse_args(words[1:])
