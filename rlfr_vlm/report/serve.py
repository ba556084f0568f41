"""`rlfr-vlm report RUN --serve`: the page of a live run on this machine's loopback address, built
again while the run writes.

Nothing is reachable but the pages and the stamp of the newest: no path leads to a file. Requests
that name another host than the loopback are refused, so that no page on the web can read a run
through a name that it resolves to 127.0.0.1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rlfr_vlm.errors import UserError
from rlfr_vlm.report.comparison_page import write_comparison
from rlfr_vlm.report.during import FAILURES
from rlfr_vlm.report.evaluation import find_benchmarks
from rlfr_vlm.report.html import EVALUATION_PAGE, write_report
from rlfr_vlm.report.template import asset, live

ADDRESS = "127.0.0.1"
LOOK_S = 2.0  # between two looks at the files
REST = 4  # times its own duration that pass before a page is built again
TIMEOUT_S = 30.0  # for a request to arrive
WATCHED = (
    "",
    "rollouts",
    "eval",
    "checkpoints",
    "flow",
)  # folders of a run, by their files' names, sizes and times; benchmarks too
PAGES = {"/": "report.html", f"/{EVALUATION_PAGE}": EVALUATION_PAGE}
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Pages:
    """The newest pages of some folders, built on demand and one at a time."""

    def __init__(
        self,
        folders: Sequence[Path],
        write: Callable[[Path], Path],
        complain: Callable[[str], None],
    ) -> None:
        """write: builds the page at a path, and may put EVALUATION_PAGE beside it. Raises UserError
        where the first one cannot be built.
        """
        self.folders, self.write, self.complain = folders, write, complain
        self._lock = threading.Lock()
        self._complaint = ""
        self._seen = fingerprint(folders)
        self._look_at = 0.0
        self.stamp, self._texts = self._build()

    def current(self) -> str:
        """The stamp of the newest page, which is built again first where files have changed and the
        last time is long enough ago.
        """
        # while one is built, the others are told of the last one
        if self._lock.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._lock.release()
        return self.stamp

    def text(self, path: str) -> bytes | None:
        """A page; None where there is none at this path."""
        return self._texts.get(path)

    def _refresh(self) -> None:
        if time.monotonic() < self._look_at:
            return
        seen = fingerprint(self.folders)
        start = time.monotonic()
        if seen != self._seen:
            try:
                self._seen, (stamp, texts) = seen, self._build()
            except FAILURES as error:
                self._say(f"the page was not built again: {error or type(error).__name__}")
            else:
                self._texts, self.stamp, self._complaint = texts, stamp, ""
        took = time.monotonic() - start
        self._look_at = start + took + max(LOOK_S, REST * took)

    def _say(self, complaint: str) -> None:
        if complaint != self._complaint:
            self.complain(complaint)
        self._complaint = complaint

    def _build(self) -> tuple[str, dict[str, bytes]]:
        with tempfile.TemporaryDirectory(prefix="rlfr_vlm_report_") as scratch:
            self.write(Path(scratch) / PAGES["/"])
            found = {path: Path(scratch) / name for path, name in PAGES.items()}
            texts = {
                path: file.read_text(encoding="utf-8")
                for path, file in found.items()
                if file.exists()
            }
        stamp = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
        script = (
            f"const PAGE_STAMP = {json.dumps(stamp)};\nconst LOOK_MS = "
            f"{1000 * LOOK_S:.0f};\n{asset('live.js')}"
        )
        return stamp, {path: live(text, script).encode() for path, text in texts.items()}


def fingerprint(folders: Sequence[Path]) -> str:
    """Changes when a run writes something that its page shows."""
    return hashlib.sha256(
        "\n".join(line for folder in folders for line in _files(folder)).encode(
            "utf-8", "surrogateescape"
        )
    ).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for place in [*(folder / name for name in WATCHED), *find_benchmarks(folder)]:
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:  # not there yet, or no more
            yield f"{place}: {error.strerror}"
            continue
        for entry in entries:
            if entry.name.endswith((".tmp", ".lock")) or entry.name in PAGES.values():
                continue
            try:
                found = entry.stat()
            except OSError:
                continue  # removed meanwhile
            changes = "" if entry.is_dir() else f" {found.st_size} {found.st_mtime_ns}"
            yield f"{place}/{entry.name}{changes}"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the pages and the stamp."""

    server: Server
    server_version = "rlfr_vlm"
    sys_version = ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        """A page or the stamp."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """The same without its content."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if self.headers.get_all("Host") not in self.server.hosts:
            self._send(
                HTTPStatus.FORBIDDEN,
                b"this page is served to 127.0.0.1 and localhost only\n",
                "text/plain",
                with_body,
            )
            return
        path = self.path.partition("?")[0]
        if path == "/stamp":
            self._send(HTTPStatus.OK, self.server.pages.current().encode(), "text/plain", with_body)
        elif (text := self.server.pages.text(path)) is not None:
            self._send(HTTPStatus.OK, text, "text/html", with_body)
        else:
            self._send(
                HTTPStatus.NOT_FOUND, b"only / and /stamp are served\n", "text/plain", with_body
            )

    def _send(self, status: HTTPStatus, content: bytes, kind: str, with_body: bool) -> None:
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(content)),
                **HEADERS,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the reader has left

    def log_message(self, format: str, *values: object) -> None:
        """Requests are not logged."""


class Server(ThreadingHTTPServer):
    """On the loopback address only."""

    daemon_threads = True

    def __init__(self, port: int, pages: Callable[[], Pages]) -> None:
        """port: 0 for a free one. Raises UserError where the port cannot be had."""
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            what = (
                "is in use"
                if in_use
                else f"cannot be used: {getattr(error, 'strerror', None) or error}"
            )
            raise UserError(
                f"--port {port} {what}; name another one, or leave it out for a free one"
            ) from None
        self.port = int(self.socket.getsockname()[1])
        self.hosts = [[f"{name}:{self.port}"] for name in (ADDRESS, "localhost")]
        if self.port == 80:
            self.hosts += [[ADDRESS], ["localhost"]]
        try:
            self.pages = pages()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{ADDRESS}:{self.port}/"


def serve(folders: Sequence[Path], port: int = 0, say: Callable[[str], None] = print) -> int:
    """Serve the page of a run, or the comparison of several, until interrupted. Returns the exit
    code.

    Raises UserError where a folder is missing or the port is taken.
    """

    def write(path: Path) -> Path:
        return (
            write_report(folders[0], path) if len(folders) == 1 else write_comparison(folders, path)
        )

    try:
        server = Server(
            port,
            lambda: Pages(folders, write, lambda text: print(f"warning: {text}", file=sys.stderr)),
        )
    except KeyboardInterrupt:
        return 0
    try:
        say(f"{server.url} (on this machine only; Ctrl-C ends it)")
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
