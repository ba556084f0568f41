"""Pictures as a page carries them: data URLs, each content once, large ones made smaller."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from pathlib import Path
from typing import NotRequired, TypedDict

from PIL import Image

SHOWN_AS_THEY_ARE = ("PNG", "JPEG", "GIF", "WEBP")
LEAST_SIDE = 192  # pixels; no picture is made smaller than that


class PictureData(TypedDict):
    """What the page knows of a picture: where it carries it, or the file that it left out."""

    path: str  # as written
    key: NotRequired[str | None]  # None: there is no picture
    file: NotRequired[str]  # beside the page


def load_picture(path: Path, root: Path, most_bytes: int, most_side: int) -> tuple[str, str] | None:
    """(key of the content, data URL); None for what lies outside `root` or is no picture.

    A file of more than `most_bytes` is drawn again with sides of at most `most_side` pixels, and
    fewer until it fits.
    """
    try:
        path = path.resolve()
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            return None
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            kind = picture.format or ""
            picture.load()
            if len(content) > most_bytes or kind not in SHOWN_AS_THEY_ARE:
                content, kind = _smaller(picture, most_bytes, most_side), "WEBP"
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # what Pillow raises for files that are no pictures
        return None
    key = hashlib.sha256(content).hexdigest()[:16]
    return key, f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def _smaller(picture: Image.Image, most_bytes: int, side: int) -> bytes:
    picture = picture.convert(
        "RGBA" if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA") else "RGB"
    )
    probe = picture.copy()
    probe.thumbnail((LEAST_SIDE, LEAST_SIDE))
    # of the smallest version; a larger one takes fewer bytes per pixel
    excess = len(_webp(probe)) / most_bytes
    side = min(side, max(LEAST_SIDE, int(1.15 * max(probe.size) / math.sqrt(excess))))
    while True:
        picture.thumbnail((side, side))
        content = _webp(picture)
        excess = len(content) / most_bytes
        if excess <= 1 or max(picture.size) <= LEAST_SIDE:
            return content
        side = max(LEAST_SIDE, int(0.95 * max(picture.size) / math.sqrt(excess)))


def _webp(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80, method=2)
    return out.getvalue()
