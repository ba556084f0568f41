"""A page as one file that opens from disk: data that no HTML parser can mistake for markup, and a
policy that lets only our scripts run.
"""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlfr_vlm.errors import UserError


def page(
    template: str, title: str, style: str, data: Sequence[str], scripts: Mapping[str, str]
) -> str:
    """The template, which is the body, in its frame and with its parts. `scripts`: by placeholder;
    the browser runs these and nothing else.
    """
    frame = asset("frame.html").replace("{{content}}", asset(template))
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src "
        f"{' '.join(map(_digest, scripts.values()))}"
    )
    parts = {
        "title": html.escape(shown(title)),
        "policy": policy,
        "style": style,
        "data": "\n".join(data),
        **scripts,
    }
    # one pass: data is never searched for placeholders
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], frame)


def write_page(path: Path, text: str) -> Path:
    """Write it whole or not at all. Raises UserError where it cannot be written; a full disk stays
    an OSError.
    """
    # two writers, such as a run and a user, do not mix
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{path} cannot be written: {error.strerror}; --out FILE puts it elsewhere"
        ) from None
    return path


def live(text: str, script: str) -> str:
    """A page with one more script, which may ask the server that the page came from, and nobody
    else.
    """
    head, _, rest = text.partition("script-src ")  # the first one is the policy's
    body, _, end = rest.rpartition("</body>")
    return (
        f"{head}connect-src 'self'; script-src {_digest(script)} "
        f"{body}<script>{script}</script>\n</body>{end}"
    )


def json_text(tree: Any) -> str:
    """Compact JSON, dataclasses in it by their fields."""
    return json.dumps(tree, separators=(",", ":"), allow_nan=False, default=_fields)


def _fields(value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    raise TypeError(f"{type(value).__name__} is no JSON")


def json_block(name: str, tree: Any) -> str:
    """JSON in a script element: with no `<` in it, nothing ends the element or opens a comment."""
    text = json_text(tree).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def text_block(name: str, text: str) -> str:
    """Base64 or a data URL, in which no `<` occurs, in a script element."""
    return f'<script type="text/plain" id="{name}">{text}</script>'


def compress(texts: Sequence[str]) -> str:
    """A JSON list of JSON texts, gzipped (mtime 0: same input, same page), as base64: nothing in it
    can be mistaken for HTML.
    """
    return base64.b64encode(gzip.compress(f"[{','.join(texts)}]".encode(), 6, mtime=0)).decode()


def shown(name: str) -> str:
    """A name that can be written as UTF-8, whatever bytes or lone surrogates it holds."""
    return name.encode("utf-8", "replace").decode()


def asset(name: str) -> str:
    """A file of this package."""
    return (files("rlfr_vlm.report") / "web" / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """The script that draws curves, from plotly's wheel. Raises UserError where it is not
    installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "report: plotly, which draws the curves, is not installed: `pip install plotly`"
        ) from None
    return get_plotlyjs()


def _digest(script: str) -> str:
    """The script's name in the page's content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
