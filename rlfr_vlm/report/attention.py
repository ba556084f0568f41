"""Where tokens looked, as a run wrote it: checked, and no more of it than the page has room for."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

from rlfr_vlm.report.reading import FileNote, as_number
from rlfr_vlm.report.run_files import Group, Response

ATTENTION_BYTES = 2_000_000  # of the page
MAX_SIDE = 64  # cells of a grid; the trainer writes at most 16
MAX_CELLS = 2**23  # bytes that one response may unpack to


class AttentionData(TypedDict):
    """Where a response's tokens looked, as the page reads it."""

    grids: list[tuple[int, int]]  # rows and columns of each picture
    cells: str  # a byte per token and cell: base64 of zlib
    share: list[float]  # of each token's attention that is on the pictures


def checked(value: Any, num_tokens: int, num_pictures: int) -> AttentionData | None:
    """The field `attention` of a row as the page reads it; None where it does not fit its tokens
    and pictures.

    No more is unpacked than the T x C bytes that there should be.
    """
    if not isinstance(value, dict):
        return None
    grids, cells, share = value.get("grids"), value.get("cells"), value.get("share")
    if not isinstance(grids, list) or len(grids) != num_pictures or not all(map(_is_grid, grids)):
        return None
    if not isinstance(share, list) or len(share) != num_tokens:
        return None
    shares = [
        number for each in share if (number := as_number(each)) is not None and 0 <= number <= 1.01
    ]  # rounding
    size = num_tokens * sum(rows * columns for rows, columns in grids)
    if (
        len(shares) < num_tokens
        or not 0 < size <= MAX_CELLS
        or not isinstance(cells, str)
        or len(cells) > 2 * size + 100
    ):
        return None
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(base64.b64decode(cells, validate=True), size + 1)
    except (ValueError, zlib.error):
        return None
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        return None
    return {"grids": grids, "cells": cells, "share": [round(each, 4) for each in shares]}


def _is_grid(grid: Any) -> bool:
    return (
        isinstance(grid, list)
        and len(grid) == 2
        and all(type(side) is int and 1 <= side <= MAX_SIDE for side in grid)
    )


class AttentionBudget:
    """Shares out the room for attention among a run's steps."""

    def __init__(self, num_steps: int, budget: int = ATTENTION_BYTES) -> None:
        """No step takes more than its share, but for its first response."""
        self.left, self.share = budget, budget // max(1, num_steps)
        self.misfits = self.num_left_out = 0

    def keep(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """A step's groups, with the attention of as many responses as there is room for, and of the
        others none.
        """
        room = step = min(self.left, self.share)
        kept = []
        for group in groups:
            responses = []
            for response in group.responses:
                found = self._check(response, len(group.images))
                cost = _cost(found)
                # the first one may take more than the step's share
                if found is not None and cost > (self.left if room == step else room):
                    self.num_left_out += 1
                    found, cost = None, 0
                self.left, room = self.left - cost, room - cost
                responses.append(replace(response, attention=found))
            kept.append(replace(group, responses=tuple(responses)))
        return tuple(kept)

    def _check(self, response: Response, num_pictures: int) -> AttentionData | None:
        if response.attention is None:
            return None
        found = checked(response.attention, len(response.tokens), num_pictures)
        self.misfits += found is None
        return found

    def problems(self) -> list[FileNote]:
        """One line for everything that did not fit."""
        if not self.misfits:
            return []
        return [
            FileNote(
                "damaged",
                "rollouts",
                f"{self.misfits} responses have attention that does not fit their tokens and "
                "pictures; left out",
            )
        ]


def _cost(attention: AttentionData | None) -> int:
    """Bytes of the page: gzip undoes most of base64, which the page puts on again."""
    return 0 if attention is None else len(attention["cells"]) + 5 * len(attention["share"])
