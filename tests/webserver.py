"""A web server of our own, which stands in for the places that checkpoints are fetched from."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CONTENT = b"".join(b"weights %06d " % i for i in range(25_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves ``content`` at every path but some.

    /missing is not there, /slow takes its time, /gone answers 503, /moved sends to /w.pt.

    Attributes:
        requests: paths asked for, in order.
        ranges: the Range header of each, or None.
        files: content by path, instead of ``content``.
        posts: functions that answer a POST, by path: from its JSON to the answer's.
        tag: sent as ETag; "" for none.
        knows_ranges: whether it answers a request for a part with that part.
        hangs_up: whether it stops after half of what it promised.
    """

    def __init__(self) -> None:
        self.content, self.tag, self.knows_ranges, self.hangs_up = CONTENT, '"one"', True, False
        self.requests: list[str] = []
        self.ranges: list[str | None] = []
        self.files: dict[str, bytes] = {}
        self.posts: dict[str, Callable[[dict], object]] = {}
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_GET(self) -> None:
        owner, path = self.owner, self.path.partition("?")[0]
        owner.requests.append(self.path)
        owner.ranges.append(self.headers.get("Range"))
        if path in ("/missing", "/gone"):
            self.send_error(404 if path == "/missing" else 503)
            return
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", f"{owner.url}/w.pt")
            self.end_headers()
            return
        if path == "/slow":
            time.sleep(0.5)
        self._send(owner.files.get(path, owner.content))

    def _send(self, content: bytes) -> None:
        owner, asked = self.owner, self.headers.get("Range")
        same = self.headers.get("If-Range", owner.tag) == owner.tag
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and same and owner.knows_ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if owner.tag:
            self.send_header("ETag", owner.tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start : len(content) // 2 if owner.hangs_up else len(content)])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.requests.append(self.path)
        if self.path not in self.owner.posts:
            self.send_error(404)
            return
        answer = json.dumps(self.owner.posts[self.path](asked)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that is asked by tests and by what they run."""
    server = Server()
    yield server
    server.close()
