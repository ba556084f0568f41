"""Pictures that rows name: downloads have limits, and every way in which a file or an address can
fail is an ImageError.
"""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from rlfr_vlm.data import images
from rlfr_vlm.data.images import ImageError, open_image


def png(size=(56, 56)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def address():
    """Of a server on loopback: /good.png, /moved, /round (redirects for ever), /big, and /slow, a
    byte every 50 ms for a minute.
    """
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            body = {"/good.png": png(), "/big": b"x" * 3000, "/slow": b""}.get(self.path)
            if body is None:
                self.send_response(302 if self.path in ("/moved", "/round") else 404)
                self.send_header("Location", "/good.png" if self.path == "/moved" else self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) or 1200))
            self.end_headers()
            self.wfile.write(body)
            while self.path == "/slow" and not closing.wait(0.05):
                self.wfile.write(b"x")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """Clients hang up: that is the point."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    closing.set()
    server.shutdown()
    server.server_close()


def test_a_picture_is_downloaded_where_that_is_allowed(address, tmp_path):
    for path in ("good.png", "moved"):
        assert open_image(f"{address}/{path}", [tmp_path], allow_urls=True).size == (56, 56)
    with pytest.raises(ImageError, match=r"data\.allow_urls"):
        open_image(f"{address}/good.png", [tmp_path])


def test_a_download_has_limits(address, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.5)
    monkeypatch.setattr(images, "MAX_BYTES", 2000)
    start = time.monotonic()
    for path, message in (
        ("slow", "not complete within 0.5 s"),
        ("big", "more than 2000"),
        ("round", "redirects"),
        ("gone", "404"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(f"{address}/{path}", [tmp_path], allow_urls=True)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url",
    [
        "http://a b/",
        "http://[::1/",
        "http://\u00fc\0/",
        "http://127.0.0.1:99999/",
        "http://",
        "http://127.0.0.1:1/x",
        "https://\ud800/",
    ],
)
def test_an_address_that_leads_nowhere_is_an_image_error(tmp_path, url):
    with pytest.raises(ImageError):
        open_image(url, [tmp_path], allow_urls=True)


def test_a_link_to_itself_and_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match=r"'loop\.png' is no file name: Symlink loop"):
        open_image("loop.png", [tmp_path])
    with pytest.raises(ImageError, match="mem cannot be read: Input/output error"):
        open_image("mem", [images.Path("/proc/self")])  # by nobody, not even by root
