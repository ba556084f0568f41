"""Opening the pictures that rows name, as untrusted input."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # checked in the header, before anything is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
FETCH_SECONDS = 60.0  # of a download, redirects and all
# What Pillow's readers raise at a damaged file: of the formats above TIFF and GIF fall over their
# own tables.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
)

# at least 48 bytes
BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4}){16,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


class ImageError(Exception):
    """A picture that cannot be used; the message says which and why, `fault` names the defect."""

    def __init__(self, message: str, fault: str = "image_broken") -> None:
        super().__init__(message)
        self.fault = fault


def open_image(source: Any, roots: Sequence[Path], allow_urls: bool = False) -> Image.Image:
    """An RGB picture from a path inside one of `roots`, a URL (if allowed), bytes, base64 text, a
    {"bytes", "path"} dict or a PIL image.

    Raises ImageError for a missing or broken file, one outside the roots, one too large, or a
    format that is not a picture's.
    """
    return decode(*open_header(source, roots, allow_urls))


def open_header(
    source: Any, roots: Sequence[Path], allow_urls: bool = False
) -> tuple[str, Image.Image]:
    """A name for messages, and the picture as its header describes it: nothing is decoded yet.
    Raises ImageError like `open_image`.
    """
    if isinstance(source, Image.Image):
        return "the embedded picture", source
    name, data = read_bytes(source, roots, allow_urls)
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has {len(data)} bytes, more than {MAX_BYTES}", "image_bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is not a readable picture: {error}", "image_pixels") from None
    except UnidentifiedImageError:
        # Pillow says no more than the address of its buffer
        raise ImageError(f"{name} is not a readable picture") from None
    except UNREADABLE as error:
        raise ImageError(f"{name} is not a readable picture: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS} in all",
            "image_pixels",
        )
    return name, image


def decode(name: str, image: Image.Image) -> Image.Image:
    """The picture's pixels as RGB. Raises ImageError where they cannot be read."""
    try:
        return image.convert("RGB")
    except UNREADABLE as error:
        raise ImageError(f"{name} is not a readable picture: {error}") from None


def read_bytes(source: Any, roots: Sequence[Path], allow_urls: bool) -> tuple[str, bytes]:
    """A name for messages, and the encoded picture."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        return "the embedded picture", source
    if not isinstance(source, str):
        raise ImageError(
            f"a picture is given as {type(source).__name__}; expected a path, URL, bytes, base64 "
            "text or a picture",
            "image_source",
        )
    if source.startswith("data:image/") or len(source) > 512:
        return "the base64 picture", decode_base64(source)
    if source.startswith(("http://", "https://")):
        return source, fetch(source, allow_urls)
    try:
        path = locate(source, roots)
    except ImageError:
        if BASE64.fullmatch(source):
            return "the base64 picture", decode_base64(source)
        raise
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ImageError(f"{source} has {size} bytes, more than {MAX_BYTES}", "image_bytes")
        with path.open("rb") as file:
            return source, file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror}") from None


def decode_base64(text: str) -> bytes:
    """Bytes of base64 text, with or without a data-URL head."""
    try:
        return base64.b64decode(
            text.partition(",")[2] if text.startswith("data:") else text, validate=True
        )
    except (binascii.Error, ValueError):
        raise ImageError(
            "the picture's text is neither a path nor base64", "image_source"
        ) from None


def fetch(url: str, allow_urls: bool) -> bytes:
    """Download a picture, where the user allowed it, with a limit on time and size."""
    if not allow_urls:
        raise ImageError(
            f"{url} is a URL: set data.allow_urls=true to download pictures", "image_url"
        )
    import httpx  # here: hardly anybody downloads pictures

    async def download() -> bytes:
        body = b""
        async with (
            asyncio.timeout(FETCH_SECONDS),
            httpx.AsyncClient(follow_redirects=True, max_redirects=5, timeout=None) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
        ):
            response.raise_for_status()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BYTES:
                    break
        return body

    try:
        urlsplit(url).port  # noqa: B018  a ValueError beyond 65535, where sockets raise something else
        with ThreadPoolExecutor(1) as pool:  # the caller's thread may have a loop of its own
            return pool.submit(lambda: asyncio.run(download())).result()
    except TimeoutError:
        raise ImageError(f"{url}: not complete within {FETCH_SECONDS:g} s", "image_url") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"{url}: {type(error).__name__}: {error}", "image_url") from None


def locate(name: str, roots: Sequence[Path]) -> Path:
    """The file of that name inside one of the roots, links resolved."""
    outside = False
    for root in roots:
        base = root.resolve()
        try:
            path = (base / name).resolve()
            if not path.is_relative_to(base):
                outside = True
            elif path.is_file():
                return path
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # the last: a link that leads to itself
            raise ImageError(f"{name[:80]!r} is no file name: {error}", "image_source") from None
    where = ", ".join(str(root) for root in roots) or "no folder"
    if outside:
        raise ImageError(
            f"{name} lies outside {where}: name its folder in data.media_dirs", "image_outside"
        )
    raise ImageError(f"{name} is missing (searched in {where})", "image_missing")
