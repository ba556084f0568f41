"""docs/add_an_engine.md: its outline is the protocol, and the places that it names are there."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from rlfr_vlm.rollout.engine import RolloutEngine, SamplingConfig
from rlfr_vlm.types import EncodedPrompt, RolloutGroup
from tests.docs.pages import DOCS, ROOT, blocks, resolve

PAGE = "add_an_engine.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")


def methods(kind: type) -> dict[str, list[str]]:
    """Public methods of a class and the names of their parameters."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in found
        if not name.startswith("_")
    }


def test_its_outline_is_the_protocol():
    space = {
        found.__name__: found
        for found in (SamplingConfig, EncodedPrompt, RolloutGroup, Mapping, Sequence, Tensor)
    } | {"Any": Any}
    (outline,) = blocks(PAGE, "python")
    exec(outline, space)
    assert methods(space["MyEngine"]) == methods(RolloutEngine)
    assert isinstance(space["MyEngine"].name, str)


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(rlfr_vlm/\S+?|tests/\S+?)`", TEXT))))
def test_places_are_there(place):
    if "::" in place:
        assert resolve(place) is not None
    else:
        assert (ROOT / place).is_file()
