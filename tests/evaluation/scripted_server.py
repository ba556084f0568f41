"""A real chat server on loopback whose answers and faults follow a script: what happens to a
request depends on its prompt and on how often that prompt was sent, not on the order of arrival.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Faults after which the same request can succeed.
TRANSIENT = (
    "429",
    "429-bare",
    "500",
    "502",
    "slow",
    "dribble",
    "garbage",
    "half",
    "reset",
    "empty",
    "null",
    "huge",
    "gzip",
)


def echo(request: dict) -> str:
    """The last user text back."""
    return str(request["messages"][-1]["content"])


class ScriptedServer:
    """Use as a context manager. `faults` maps a kind to the share of requests that meet it, or is a
    function of (prompt, how often before).
    """

    def __init__(
        self,
        answer: Callable[[dict], str] = echo,
        faults: dict[str, float] | Callable[[str, int], str | None] | None = None,
        seed: int = 0,
        models: tuple[str, ...] | None = ("scripted",),
        key: str | None = None,
        elsewhere: str = "",
        retry_after: str = "0.02",
        pause: float = 0.0,
    ) -> None:
        """models: what /models lists, None: 404. key: what is required. elsewhere: where `redirect`
        points. pause: seconds before an answer.
        """
        self.answer, self.faults, self.seed, self.models, self.key = (
            answer,
            faults or {},
            seed,
            models,
            key,
        )
        self.elsewhere, self.retry_after, self.pause = elsewhere, retry_after, pause
        self.count: Counter[str] = Counter()  # requests by prompt
        self.answered: Counter[str] = Counter()  # good replies by prompt
        self.met: Counter[str] = Counter()  # faults
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> ScriptedServer:
        script = self

        class Handler(_Handler):
            server_script = script

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """Clients hang up on us: that is the point."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.api_base = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, prompt: str, before: int) -> str | None:
        """The fault that a prompt meets when it was sent `before` times before."""
        if callable(self.faults):
            return self.faults(prompt, before)
        digest = hashlib.sha256(f"{self.seed}|{before}|{prompt}".encode()).digest()
        where = int.from_bytes(digest[:8], "big") / 2**64
        for kind, share in self.faults.items():
            if where < share:
                return kind
            where -= share
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_script: ScriptedServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        script = self.server_script
        with script.lock:
            script.paths.append(self.path)
            script.headers.append(dict(self.headers))
        if not self.path.endswith("/models") or script.models is None:
            self.reply(404, {"error": {"message": "no such thing"}})
        elif self.authorised():
            self.reply(200, {"object": "list", "data": [{"id": name} for name in script.models]})

    def do_POST(self) -> None:
        script = self.server_script
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(request["messages"])
        with script.lock:
            before = script.count[prompt]
            script.count[prompt] += 1
            script.bodies.append(request)
            script.headers.append(dict(self.headers))
            script.paths.append(self.path)
            script.in_flight += 1
            script.most_in_flight = max(script.most_in_flight, script.in_flight)
        try:
            if not self.authorised():
                return
            if script.models is not None and request["model"] not in script.models:
                self.reply(
                    404, {"error": {"message": f"The model `{request['model']}` does not exist."}}
                )
                return
            script.closing.wait(script.pause)
            kind = script.fault(prompt, before)
            if kind is None:
                self.reply(200, completion(script.answer(request)))
                with script.lock:
                    script.answered[prompt] += 1
            else:
                with script.lock:
                    script.met[kind] += 1
                self.misbehave(kind)
        finally:
            with script.lock:
                script.in_flight -= 1

    def authorised(self) -> bool:
        script = self.server_script
        if script.key is None or self.headers.get("Authorization") == f"Bearer {script.key}":
            return True
        # A server that repeats what it was given, key and all.
        self.reply(
            401,
            {
                "error": {
                    "message": f"Incorrect API key provided: {self.headers.get('Authorization')}"
                }
            },
        )
        return False

    def reply(self, status: int, tree: object, **headers: str) -> None:
        self.send(status, json.dumps(tree).encode(), "application/json", headers)

    def send(
        self,
        status: int,
        body: bytes,
        kind: str,
        headers: dict[str, str],
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def misbehave(self, kind: str) -> None:
        script = self.server_script
        good = json.dumps(completion("late")).encode()
        if kind == "429":
            self.reply(429, {"error": {"message": "slow down"}}, Retry_After=script.retry_after)
        elif kind == "429-bare":
            self.reply(429, {"error": {"message": "slow down"}})
        elif kind == "500":
            self.reply(500, {"detail": "out of luck"})
        elif kind == "502":
            self.send(502, b"<html><h1>Bad\n\nGateway</h1></html>", "text/html", {})
        elif kind == "400":
            self.reply(400, {"error": {"message": "too long " * 1000}})
        elif kind == "redirect":
            self.send(307, b"", "text/plain", {"Location": script.elsewhere})
        elif kind == "slow":
            script.closing.wait(30)
            self.close_connection = True
        elif kind == "dribble":
            self.send(200, b"", "application/json", {}, length=len(good))
            for byte in good:
                if script.closing.wait(0.05):
                    break
                self.wfile.write(bytes([byte]))
        elif kind == "garbage":
            self.send(200, b'{"choices": [{"mess', "application/json", {})
        elif kind == "half":
            self.send(200, good[:20], "application/json", {}, length=len(good))
            self.close_connection = True
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif kind == "empty":
            self.reply(200, {"choices": []})
        elif kind == "null":
            self.reply(200, completion(None))
        elif kind == "huge":
            self.send(200, b'{"choices": "' + b"x" * (3 << 20) + b'"}', "application/json", {})
        elif kind == "gzip":
            self.send(
                200,
                gzip.compress(b" " * (50 << 20), 1),
                "application/json",
                {"Content-Encoding": "gzip"},
            )
        else:
            raise ValueError(kind)


def completion(text: str | None, reason: str = "stop") -> dict:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "created": int(time.time()),
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def judged(request: dict) -> tuple[str, dict[str, str]]:
    """(code, the four texts) of a judge's prompt."""
    text = request["messages"][-1]["content"]
    code = re.search(r"(\w+):0 if they do not\.$", text)[1]
    return code, dict(
        re.findall(rf"\[{code} ([a-z ]+)\]\n(.*?)\n\[/{code} \1\]", text, flags=re.DOTALL)
    )


def right_verdict(request: dict) -> str:
    """What a good judge says: equal texts agree. To a probe it says yes."""
    if "if they do not." not in request["messages"][-1]["content"]:
        return "Yes."
    code, shown = judged(request)
    return f"They were compared.\n{code}:{int(shown['final answer'] == shown['reference answer'])}"
