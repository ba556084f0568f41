"""A client of OpenAI-compatible chat servers: many requests at a time, each of which ends in a
reply or in a named failure.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import httpx

from rlfr_vlm.config import EndpointConfig, JudgeConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.server.wire import (
    ChatReply,
    ChatRequest,
    Failure,
    Fault,
    Secret,
    checked_address,
    data_url,
    read_models,
    read_reply,
    retry_after,
    server_words,
)

__all__ = ["ChatReply", "ChatRequest", "Endpoint", "Failure", "data_url"]

MAX_BODY = 2**20  # bytes of a reply
MAX_WORDS = 300  # characters of a server's words in ours
# before the second attempt, doubled before each further one, give or take a quarter
BACKOFF_SECONDS = 1.0
MAX_WAIT = 60.0  # seconds between two attempts, whatever Retry-After says
# requests given up in a row (or `concurrency`, if that is more) after which the server is not asked
# again
BREAKER = 8
RETRIED = (408, 409, 429)  # and 5xx
HOPELESS = (401, 403, 404)  # for every other request as well
PROBE_RETRIES = 2

_jitter = random.Random()  # the global generator belongs to the trainer
T = TypeVar("T")


class Endpoint:
    """A server and how patiently it is asked. After many requests given up in a row every further
    one fails at once, until `probe`.
    """

    def __init__(self, cfg: EndpointConfig) -> None:
        """Nothing is sent. Raises UserError for an address that is missing or unsafe, a missing
        model name or a missing key.
        """
        self.cfg = cfg
        self.name = "eval.judge" if isinstance(cfg, JudgeConfig) else "eval.endpoint"
        self.api_base, self.loopback = checked_address(
            cfg.api_base or os.environ.get("OPENAI_API_BASE"), self.name
        )
        if not cfg.model:
            raise UserError(
                f"{self.name}.model: name the model as the server knows it ({self.api_base}/models "
                "lists them)"
            )
        self.model = cfg.model
        self._given_up = 0
        self._key()

    @property
    def down(self) -> bool:
        """Whether so many requests failed in a row that no further one is sent."""
        return self._given_up >= max(BREAKER, self.cfg.concurrency)

    def chat(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, ChatReply | Failure]]:
        """(position, outcome) of every request, in order of completion. Requests are drawn as they
        are needed, in the caller's thread.

        A slot is free again once the caller asks for the next outcome: whatever ends this process,
        at most `concurrency` replies are lost.
        """
        numbered = enumerate(requests)
        outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        slots, pending = asyncio.Semaphore(self.cfg.concurrency), 0
        with self._session() as (loop, client):
            while True:
                for index, request in islice(numbered, 2 * self.cfg.concurrency - pending):
                    future = asyncio.run_coroutine_threadsafe(
                        self._ask(client, request, self.cfg.retries, slots), loop
                    )
                    future.add_done_callback(lambda done, index=index: outcomes.put((index, done)))  # type: ignore[misc]
                    pending += 1
                if not pending:
                    return
                index, done = outcomes.get()
                pending -= 1
                yield index, done.result()
                loop.call_soon_threadsafe(slots.release)

    def probe(self) -> None:
        """Ask for the models and for one token, so that a run does not find out later. Raises
        UserError saying what to do.
        """
        self._given_up = 0
        with self._session() as (loop, client):
            problem = asyncio.run_coroutine_threadsafe(self._problem(client), loop).result()
        self._given_up = 0
        if problem:
            raise UserError(f"{self.name}: {self.api_base} {problem}")

    async def _problem(self, client: httpx.AsyncClient) -> str | None:
        """What a probe finds wrong, and what to do about it."""
        retries = min(self.cfg.retries, PROBE_RETRIES)
        models, _ = await self._patiently(client, "GET", "/models", None, read_models, retries)
        served = [] if isinstance(models, Fault) else models  # not every server lets one see a list
        unlisted = (
            f"does not serve `{self.model}` but {', '.join(served[:20])}; set "
            f"{self.name}.model to one of these"
        )
        fault: Fault | Failure
        if isinstance(models, Fault) and models.kind in ("connection", "timeout"):
            fault = models
        # some local servers answer to any name
        elif served and self.loopback and self.model not in served:
            return unlisted
        else:
            hello = ChatRequest(({"role": "user", "content": "Say yes."},), max_tokens=1)
            reply = await self._ask(client, hello, retries, asyncio.Semaphore())
            if isinstance(reply, ChatReply):
                return None
            fault = reply
        if fault.kind in ("connection", "timeout"):
            return (
                f"cannot be reached ({fault.message}); start that server, correct "
                f"{self.name}.api_base, or set {self.name}.serve to a model"
            )
        if fault.status in (401, 403):
            has = (
                f"the key in {self.cfg.key_env}; set it to a valid one"
                if self._key()
                else f"requests without a key; set {self.cfg.key_env}"
            )
            return f"does not accept {has} ({fault.message})"
        if served and self.model not in served:
            return f"{unlisted} ({fault.message})"
        return f"did not answer a test request to `{self.model}`: {fault.message}"

    async def _ask(
        self,
        client: httpx.AsyncClient,
        request: ChatRequest,
        retries: int,
        slots: asyncio.Semaphore,
    ) -> ChatReply | Failure:
        """One request with all its attempts. Its slot is the caller's to give back."""
        await slots.acquire()
        start = time.monotonic()
        outcome, attempts = await self._patiently(
            client, "POST", "/chat/completions", request.body(self.model), read_reply, retries
        )
        seconds = time.monotonic() - start
        if isinstance(outcome, ChatReply):
            self._given_up = 0
            return replace(outcome, seconds=seconds, attempts=attempts)
        self._given_up += outcome.retry or outcome.status in HOPELESS
        return Failure(outcome.kind, outcome.message, attempts, seconds, outcome.status)

    async def _patiently(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        read: Callable[[bytes], T | Fault],
        retries: int,
    ) -> tuple[T | Fault, int]:
        """What `read` makes of the reply, or the last attempt's fault; and the number of
        attempts.
        """
        outcome: T | Fault = Fault(
            "breaker",
            f"{self.api_base} is not asked any more: {self._given_up} requests in a row failed",
        )
        attempts = 0
        while not self.down:
            received = await self._send(client, method, path, body)
            outcome = received if isinstance(received, Fault) else read(received)
            attempts += 1
            if not isinstance(outcome, Fault) or not outcome.retry or attempts > retries:
                break
            await asyncio.sleep(wait_seconds(attempts, outcome.after))
        return outcome, attempts

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, content: bytes | None
    ) -> bytes | Fault:
        """The body of a good reply to one attempt, within the time and the size that it has."""
        try:
            async with (
                asyncio.timeout(self.cfg.timeout),
                client.stream(method, self.api_base + path, content=content) as response,
            ):
                body = await _read_body(response)
        except TimeoutError:
            return Fault("timeout", f"no complete reply within {self.cfg.timeout:g} s", retry=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Fault("connection", self._short(f"{type(error).__name__}: {error}"), retry=True)
        status = response.status_code
        if 300 <= status < 400:
            return Fault(
                "refused",
                f"HTTP {status}: a redirect, which is not followed; set {self.name}.api_base to "
                "where the server is",
                status=status,
            )
        if status >= 400:
            message, again = (
                f"HTTP {status}: {self._short(server_words(body or b''))}",
                status in RETRIED or status >= 500,
            )
            return Fault(
                "status" if again else "refused",
                message,
                again,
                status,
                retry_after(response.headers.get("retry-after")),
            )
        if body is None:
            return Fault(
                "body", f"a reply above {MAX_BODY >> 20} MiB, or a compressed one", retry=True
            )
        return body

    def _key(self) -> Secret | None:
        """The key from the environment. UserError where one is needed and missing, or cannot be
        sent.
        """
        value = "" if self.cfg.serve else os.environ.get(self.cfg.key_env, "").strip()
        if not value and not self.loopback:
            raise UserError(
                f"{self.name}.key_env: {self.api_base} needs a key; put it into the environment "
                f"variable {self.cfg.key_env}"
            )
        if not re.fullmatch(r"[!-~]*", value):
            raise UserError(
                f"{self.name}.key_env: the environment variable {self.cfg.key_env} holds no key "
                "but something with spaces or odd letters"
            )
        return Secret(value) if value else None

    def _short(self, words: str) -> str:
        """Somebody else's words on one line, cut, and without the key in case they repeat it."""
        key = os.environ.get(self.cfg.key_env, "").strip()
        return " ".join((words.replace(key, "<key>") if len(key) >= 8 else words).split())[
            :MAX_WORDS
        ]

    def _client(self) -> httpx.AsyncClient:
        key = self._key()

        def authorise(request: httpx.Request) -> httpx.Request:
            if key:
                request.headers["Authorization"] = f"Bearer {key.reveal()}"
            return request

        return httpx.AsyncClient(
            auth=authorise,
            follow_redirects=False,
            trust_env=not self.loopback,  # proxies are for the world outside
            verify=self.api_base.startswith("https:"),  # reading certificates takes a while
            timeout=None,  # an attempt has one deadline for everything, see _send
            limits=httpx.Limits(max_connections=self.cfg.concurrency),
            headers={
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "rlfr-vlm",
            },
        )

    @contextmanager
    def _session(self) -> Iterator[tuple[asyncio.AbstractEventLoop, httpx.AsyncClient]]:
        """A client, and an event loop for it in a thread of its own; at the end whatever is still
        under way there is cancelled.
        """
        client, loop = self._client(), asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
        thread.start()
        try:
            yield loop, client
        finally:
            asyncio.run_coroutine_threadsafe(_end(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def wait_seconds(attempts: int, after: float | None) -> float:
    """Seconds before another attempt: at least what the server asks for, exponential in the
    attempts, jittered, capped.
    """
    backoff = BACKOFF_SECONDS * 2 ** min(attempts - 1, 30) * _jitter.uniform(0.75, 1.25)
    return min(MAX_WAIT, max(backoff, (after or 0.0) * _jitter.uniform(1.0, 1.1)))


async def _read_body(response: httpx.Response) -> bytes | None:
    """The body, or None where it is too big or packed (and might unpack to anything)."""
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if (
            len(body) > MAX_BODY
            or response.headers.get("content-encoding", "identity") != "identity"
        ):
            return None
    return body


async def _end(client: httpx.AsyncClient) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
