"""What goes to a chat server and comes back: requests, replies, failures, the address and the key.
Nothing here sends.
"""

from __future__ import annotations

import base64
import contextlib
import io
import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from rlfr_vlm.errors import UserError
from rlfr_vlm.types import FinishReason

if TYPE_CHECKING:
    from PIL.Image import Image

FailureKind = Literal["timeout", "connection", "status", "body", "refused", "breaker"]


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be continued. Content is text, or parts of {"type": "text"} and {"type":
    "image_url"} (see `data_url`).
    """

    messages: Sequence[dict[str, Any]]
    temperature: float | None = None  # None: the server's default, here and below
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    # further fields of the request, as they are
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> bytes:
        """As it is sent."""
        settings = {
            name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "seed")
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return json.dumps(
            {"model": model, "messages": self.messages, **given, **self.extra}
        ).encode()


@dataclass(frozen=True)
class ChatReply:
    """What the server wrote."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int  # 0 where the server does not tell, as below
    response_tokens: int
    seconds: float = 0.0  # with all attempts and the waits between them
    attempts: int = 1


@dataclass(frozen=True)
class Failure:
    """Why there is no reply: `refused` was not tried again, `breaker` was given up with the
    server.
    """

    kind: FailureKind
    message: str
    attempts: int = 1
    seconds: float = 0.0
    status: int | None = None  # of HTTP


@dataclass(frozen=True)
class Fault:
    """What went wrong in one attempt."""

    kind: FailureKind
    message: str
    retry: bool = False
    status: int | None = None
    after: float | None = None  # seconds that the server asks to wait


class Secret:
    """A key that shows itself only where it is asked to: not in repr, str, format, vars, pickles,
    or tracebacks with local variables.
    """

    __slots__ = ("reveal",)

    def __init__(self, value: str) -> None:
        self.reveal = lambda: value

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not written anywhere")


def checked_address(given: str | None, name: str) -> tuple[str, bool]:
    """(base address, whether it is this machine). UserError where it is missing, would send in the
    clear, or has secrets in it.
    """
    if not given:
        raise UserError(
            f"{name}.api_base: no server is named; set it to http(s)://HOST:PORT/v1, set "
            f"OPENAI_API_BASE, or set {name}.serve to a model"
        )
    base = given.strip().rstrip("/").removesuffix("/chat/completions")
    parts = urlsplit(base)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{name}.api_base: an address with a user, password, `?` or `#` in it; the key belongs "
            f"into {name}.key_env's variable"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{name}.api_base: `{base}` is not of the form http(s)://HOST:PORT/v1")
    loopback = is_loopback(parts.hostname)
    if parts.scheme == "http" and not loopback:
        tunnel = f"ssh -L 8000:127.0.0.1:{parts.port or 80} {parts.hostname}"
        raise UserError(
            f"{name}.api_base: {base} would send prompts and key in the clear; use https, or a "
            f"tunnel: `{tunnel}` and http://127.0.0.1:8000/v1"
        )
    return base, loopback


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def data_url(image: Image) -> str:
    """A picture as it stands in {"type": "image_url", "image_url": {"url": ...}}: PNG, every pixel
    as it is.
    """
    target = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(
        target, "PNG"
    )
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def read_reply(body: bytes) -> ChatReply | Fault:
    """The first choice of a chat completion, if the body is one."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        return Fault("body", f"not a chat completion: {_first_problem(error)}", retry=True)
    choice, usage = completion.choices[0], completion.usage or _Usage()
    text, reason = choice.message.content, choice.finish_reason
    if reason == "content_filter":
        return Fault("refused", "the server's content filter")
    if reason not in ("stop", "length") or (text is None and reason == "stop"):
        return Fault(
            "body",
            f"a completion that ended with `{reason}` and has {'no' if text is None else 'a'} text",
            retry=True,
        )
    return ChatReply(
        text or "",
        "length" if reason == "length" else "stop",
        usage.prompt_tokens,
        usage.completion_tokens,
    )


def read_models(body: bytes) -> list[str] | Fault:
    """Names that a server lists."""
    try:
        return [model.id for model in _Models.model_validate_json(body).data]
    except ValidationError as error:
        return Fault("body", f"not a list of models: {_first_problem(error)}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}"


def server_words(body: bytes) -> str:
    """What an error reply says, out of the usual JSON shapes or as it is."""
    text = body.decode(errors="replace")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "detail", "message"):
        if isinstance(tree, dict) and tree.get(key):
            tree = tree[key]
    return tree if isinstance(tree, str) else json.dumps(tree)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not header:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header.strip()):
        return float(header.strip())
    try:
        when = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    return max(
        0.0,
        ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds(),
    )
