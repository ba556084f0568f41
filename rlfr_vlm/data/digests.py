"""Digests of what RL reads of each row: whether a run goes on with the rows that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlfr_vlm.types import Prompt

SIZE = 8  # bytes of a row's digest


@dataclass(frozen=True)
class RowDigests:
    """Of the rows of a data set, in order."""

    digests: bytes = b""  # SIZE bytes per row
    origins: tuple[str, ...] = ()  # `file:line` of each

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> RowDigests:
        """Of id, messages, pictures, answer, source and further columns. Pictures that the row only
        names are known by that name.
        """
        return cls(
            b"".join(_digest(prompt) for prompt in prompts),
            tuple(prompt.origin for prompt in prompts),
        )

    @property
    def sha256(self) -> str:
        """Of all rows."""
        return hashlib.sha256(self.digests).hexdigest()

    def difference(self, before: bytes) -> str:
        """How these rows differ from those with the digests `before`: the first one that does, by
        name, and the numbers of rows.
        """
        old, new = (
            [row[i : i + SIZE] for i in range(0, len(row), SIZE)] for row in (before, self.digests)
        )
        at = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        counts = f"{len(new)} usable rows, not {len(old)}; " if len(new) != len(old) else ""
        return counts + (
            f"{self.origins[at]} is not what it was"
            if at < len(new)
            else f"those after {self.origins[-1]} are gone"
        )


def _digest(prompt: Prompt) -> bytes:
    read = [
        prompt.id,
        prompt.messages,
        prompt.images,
        prompt.answer,
        prompt.data_source,
        prompt.extra,
    ]
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=_plain).encode()).digest()[:SIZE]


def _plain(value: Any) -> str:
    """What JSON lacks: bytes and pictures by their content, dates and the like by how they are
    written.
    """
    content = (
        value
        if isinstance(value, bytes)
        else value.tobytes()
        if hasattr(value, "tobytes")
        else repr(value).encode()
    )
    return hashlib.sha256(content).hexdigest()
