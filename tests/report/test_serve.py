"""The served page: loopback only, nothing but the page and its stamp, built again while a run
writes, and an open page that follows.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from rlfr_vlm.errors import UserError
from rlfr_vlm.report import serve as module
from rlfr_vlm.report.html import write_report
from rlfr_vlm.report.serve import Pages, Server, fingerprint
from tests.report.browser import needs_browser
from tests.report.test_report import make_run, metrics_row


@contextmanager
def serving(folder: Path, complaints: list[str] | None = None):
    said = [] if complaints is None else complaints
    server = Server(
        0, lambda: Pages([folder], lambda path: write_report(folder, path), said.append)
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("served") / "run", steps=4)
    (run / "secret.txt").write_text("nobody reads this")
    with serving(run) as server:
        yield server, run


def ask(
    server: Server, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True)
        if host != "":
            connection.putheader("Host", host or f"127.0.0.1:{server.port}")
        connection.endheaders()
        answer = connection.getresponse()
        return (
            answer.status,
            {key.lower(): value for key, value in answer.getheaders()},
            answer.read(),
        )


def raw(server: Server, request: bytes) -> bytes:
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def listeners(port: int) -> set[str]:
    """Addresses that sockets of this machine listen on at a port, from the kernel's own list."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == port:
                found.add(local.split(":")[0])
    return found


def grow(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_row(random.Random(step), step, 0.8)) + "\n")


# Who is answered, and with what.


@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the kernel's list of sockets is read from /proc"
)
def test_it_listens_on_the_loopback_address_alone(served):
    server, _ = served
    assert listeners(server.port) == {"0100007F"}  # 127.0.0.1 as the kernel writes it


def test_the_page_and_its_stamp_are_served_and_the_page_may_ask_its_own_server_alone(served):
    server, run = served
    status, headers, content = ask(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (
        headers["x-frame-options"],
        headers["cache-control"],
        headers["x-content-type-options"],
    ) == ("DENY", "no-store", "nosniff")
    text = content.decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert re.findall(r"(?:default|connect)-src [^;]*", policy) == [
        "default-src 'none'",
        "connect-src 'self'",
    ]
    stamp = ask(server, "/stamp")[2].decode()
    assert f'const PAGE_STAMP = "{stamp}";' in text
    assert ask(server, "/?x=1")[2] == content
    written = write_report(run).read_text()
    assert "connect-src" not in written
    assert "PAGE_STAMP" not in written
    (run / "report.html").unlink()


def test_serving_writes_nothing_into_the_run(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    before = fingerprint([run])
    with serving(run) as server:
        assert ask(server, "/")[0] == 200
    assert fingerprint([run]) == before
    assert not (run / "report.html").exists()


def test_head_answers_without_content_and_other_methods_are_refused(served):
    server, _ = served
    status, headers, content = ask(server, "/", "HEAD")
    assert (status, content) == (200, b"")
    assert int(headers["content-length"]) == len(ask(server, "/")[2])
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"):
        assert ask(server, "/", method)[0] == 501


TRAVERSALS = (
    "/metrics.jsonl",
    "/secret.txt",
    "/../secret.txt",
    "/..%2fsecret.txt",
    "/%2e%2e/secret.txt",
    "/./secret.txt",
    "//secret.txt",
    "/stamp/../secret.txt",
    "/..\\secret.txt",
    "/%00",
    "/report.html",
    "/rollouts/",
    "secret.txt",
    "http://127.0.0.1/secret.txt",
    "/?/../secret.txt#/",
    "/evaluation.html",
    "/stamp/",
    "/etc/passwd",
    "file:///etc/passwd",
)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_to_a_file(served, path):
    server, _ = served
    answer = raw(server, f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
    status = int(answer.split()[1])
    assert status == (200 if path.startswith("/?") else 404)
    assert b"nobody reads this" not in answer
    assert b"root:x:0" not in answer


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        "localhost.:{port}",
        "",
        "0:{port}",
    ],
)
def test_another_host_than_the_loopback_is_refused(served, host):
    """A name of the web that resolves to 127.0.0.1 must not read the run (DNS rebinding)."""
    server, _ = served
    for path in ("/", "/stamp"):
        status, _, content = ask(server, path, host=host.format(port=server.port))
        assert status == 403
        assert len(content) < 100
    assert ask(server, "/stamp", host=f"localhost:{server.port}")[0] == 200


def test_two_host_headers_and_garbage_are_refused(served):
    server, _ = served
    own = f"Host: 127.0.0.1:{server.port}\r\n".encode()
    assert (
        b" 403 "
        in raw(server, b"GET /stamp HTTP/1.1\r\n" + own + b"Host: evil.example\r\n\r\n").split(
            b"\r\n"
        )[0]
    )
    for request in (
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"",
    ):
        assert b"PAGE_STAMP" not in raw(server, request)
    assert ask(server, "/stamp")[0] == 200


# When it is built.


def test_the_stamp_changes_when_the_run_writes_and_only_then(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    monkeypatch.setattr(module, "REST", 0)
    run = make_run(tmp_path / "run", steps=3)
    written = []

    def write(path: Path) -> Path:
        written.append(path)
        path.write_text(f'<meta content="script-src "><body>{len(written)}</body>')
        return path

    pages = Pages([run], write, print)
    first = pages.current()
    assert pages.current() == first
    assert len(written) == 1
    grow(run, 4)
    second = pages.current()
    assert second != first
    (run / "rollouts/step_000004.jsonl").write_text("{}\n")
    assert pages.current() not in (first, second)
    (run / "report.html").write_text("as training writes it")
    (run / "report.html.7.tmp").write_text("")
    pages.current()
    assert len(written) == 3
    assert not any(path.exists() for path in written)


def test_an_evaluation_is_watched_too(tmp_path):
    for place in ("math500", "eval/step_000004/math500"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "protocol.json").write_text("{}")
        before = fingerprint([tmp_path])
        (tmp_path / place / "ledger.jsonl").write_text("{}\n")
        assert fingerprint([tmp_path]) != before


def test_a_page_that_takes_long_is_built_seldom(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    run = make_run(tmp_path / "run", steps=3)
    times = []

    def write(path: Path) -> Path:
        time.sleep(0.2)
        times.append(time.monotonic())
        path.write_text(f'<meta content="script-src "><body>{len(times)}</body>')
        return path

    pages = Pages([run], write, print)
    end = time.monotonic() + 2.5
    step = 3
    while time.monotonic() < end:
        grow(run, step := step + 1)
        pages.current()
        time.sleep(0.02)
    assert 2 <= len(times) <= 4
    assert all(b - a >= 0.2 * (1 + module.REST) * 0.9 for a, b in itertools.pairwise(times[1:]))


def test_a_run_that_vanishes_leaves_the_last_page_and_one_complaint(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    monkeypatch.setattr(module, "REST", 0)
    run = make_run(tmp_path / "run", steps=3)
    complaints: list[str] = []
    with serving(run, complaints) as server:
        stamp, page = ask(server, "/stamp")[2], ask(server, "/")[2]
        shutil.rmtree(run)
        assert [ask(server, "/stamp")[2] for _ in range(3)] == [stamp] * 3
        assert ask(server, "/")[2] == page
    assert len(complaints) == 1
    assert "there is no run folder" in complaints[0]


# On the command line.


def start(*arguments: str | Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "rlfr_vlm.cli", "report", *map(str, arguments), "--serve"]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # what the background of a shell starts ignores it
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heard,
    )
    return process, process.stdout.readline()


def test_the_command_serves_until_ctrl_c_and_ends_quietly(tmp_path):
    one, two = (make_run(tmp_path / name, steps=3) for name in ("one", "two"))
    for folders, title in (([one], b"<title>one "), ([one, two], b"<title>comparison of 2 runs ")):
        process, said = start(*folders)
        url = re.match(r"http://127\.0\.0\.1:(\d+)/ ", said)
        assert url, process.communicate(timeout=20)
        with closing(
            http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=20)
        ) as connection:
            connection.request("GET", "/")
            assert title in connection.getresponse().read()
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_port_in_use_and_a_port_that_is_none_are_user_errors(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        process, _ = start(run, "--port", str(port))
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (2, "")
        assert (
            err
            == f"rlfr-vlm report: --port {port} is in use; name another one, or leave it out for a "
            "free one\n"
        )
    with pytest.raises(UserError, match="--port 70000 cannot be used"):
        Server(70000, lambda: None)


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    process, _ = start(tmp_path / "nothing")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert "there is no run folder" in err
    assert "Traceback" not in err


# In a browser.


def until(page, condition: str, seconds: float = 15) -> None:
    """Wait for a condition. Playwright's own way evaluates text in the page, which the page's
    policy forbids.
    """
    from playwright.sync_api import Error

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if page.evaluate(condition):
                return
        except Error:
            pass  # the page is being loaded again
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {condition}")


@needs_browser
def test_an_open_page_follows_a_run_that_grows_and_keeps_its_view(tmp_path, chromium, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.5)
    run = make_run(tmp_path / "run", steps=8)
    (run / "config.resolved.yaml").write_text(
        "train:\n  steps: 20\n" + "".join(f"line_{n}: {n}\n" for n in range(200))
    )
    complaints: list[str] = []
    with serving(run) as server:
        context = chromium.new_context(viewport={"width": 1200, "height": 500})
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#live[data-state=finished]")
        assert "step 8 of 20" in page.inner_text("#run-state")
        page.click("details summary >> text=Config")
        page.evaluate("scrollTo(0, 300)")
        until(page, "scrollY === 300")
        grow(run, 9)
        until(page, "document.getElementById('run-state').textContent.includes('step 9 of 20')")
        until(page, "scrollY === 300")
        assert page.evaluate("[...document.querySelectorAll('details')].map((box) => box.open)")[0]
        page.click("#tab-curves")
        page.wait_for_selector("#curves[data-drawn]")
        page.evaluate("""() => {
            const slider = document.getElementById("smoothing");
            slider.value = 0.3;
            slider.dispatchEvent(new Event("input", { bubbles: true }));
            scrollTo(0, 400);
        }""")
        grow(run, 10)
        until(page, "document.getElementById('run-state').textContent.includes('step 10 of 20')")
        until(page, "!document.getElementById('curves').hidden && scrollY === 400")
        assert page.evaluate(
            "[document.getElementById('smoothing').value, runCharts.look.smoothing]"
        ) == ["0.3", 0.3]
        # What a reader looks at closely is left alone until the reader is done.
        page.evaluate("getSelection().selectAllChildren(document.querySelector('#curves h2'))")
        grow(run, 11)
        page.wait_for_selector("#live[data-state=open]")
        assert "step 10 of 20" in page.inner_text("#run-state")
        page.evaluate("getSelection().removeAllRanges()")
        until(page, "document.getElementById('run-state').textContent.includes('step 11 of 20')")
        assert not complaints
        assert {
            url.split("/", 3)[2] for url in asked if not url.startswith(("data:", "blob:"))
        } == {f"127.0.0.1:{server.port}"}
    until(page, "document.getElementById('live').textContent.includes('has ended')")
    context.close()
