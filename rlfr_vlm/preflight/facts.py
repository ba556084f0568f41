"""What goes to the processes that look at rows, and what comes back: light, for the side that only
puts it together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from rlfr_vlm.data.rows import Unreadable

Role = Literal["train", "eval", "expert"]
Notice = tuple[str, str]  # kind, reason


@dataclass(frozen=True)
class Task:
    """A row to look at."""

    number: int  # among the rows of its file, from 0
    name: str  # as `read_rows` calls it
    where: str  # for messages
    row: dict[str, Any] | None
    problem: Unreadable | None


@dataclass(frozen=True)
class Facts:
    """What is known of a row once it has been looked at."""

    number: int
    name: str
    where: str
    id: str = ""
    notices: tuple[Notice, ...] = ()
    parsed: bool = False  # whether training gets as far as its id, gold answer and pictures
    tokens: int | None = None  # of the prompt, pictures included
    text: bytes = b""  # digest of the question
    text_length: int = 0
    # digests of their pixels; None where one cannot be opened
    pictures: tuple[bytes, ...] | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    num_pictures: int = 0
    marked: bool = True  # whether the row says where its pictures go
    answer: str = ""
    response: str | None = None  # of expert rows


def digest_of(data: bytes) -> bytes:
    """16 bytes that stand for these."""
    return hashlib.blake2b(data, digest_size=16).digest()
