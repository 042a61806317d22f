"""What is read of a request, and when reading stops."""

from __future__ import annotations

import asyncio
import json
import tempfile

import pytest
from fastapi import Request
from served import BOUNDARY, FORM, form

from sparse_exp.serve.limits import LimitBody, Limits, Refused, refusal
from sparse_exp.serve.uploads import Upload, read_uploads

KIND = FORM["Content-Type"].encode()


class Client:
    """Sends a body in parts, and remembers how many were asked for before the answer and in all."""

    def __init__(
        self, parts: list[bytes], *, length: int | None = None, hangs_up: bool = False, kind: bytes = KIND
    ) -> None:
        how = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
        headers = [(b"content-type", kind), how]
        self.scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
        self._parts, self._hangs_up, self.sent = parts, hangs_up, 0
        self.answer: list[dict] = []
        self.sent_before_answer: int | None = None

    async def receive(self) -> dict:
        if self.sent == len(self._parts):
            assert self._hangs_up, "more was read than was sent"
            return {"type": "http.disconnect"}
        self.sent += 1
        more = self.sent < len(self._parts) or self._hangs_up
        return {"type": "http.request", "body": self._parts[self.sent - 1], "more_body": more}

    async def send(self, message: dict) -> None:
        if not self.answer:
            self.sent_before_answer = self.sent
        self.answer.append(message)

    def ask(self, app, max_bytes: int = 10**6) -> None:
        """Send the request to an application behind the middleware."""
        asyncio.run(LimitBody(app, max_bytes)(self.scope, self.receive, self.send))

    def read(self, **limits) -> list[Upload]:
        """Send it to one that reads images and does not answer."""
        bounds, uploads = Limits(**limits), []

        async def app(scope, receive, send):
            uploads.extend(await read_uploads(Request(scope, receive), bounds, lambda _: None))

        self.ask(app, bounds.max_bytes)
        return uploads


def test_a_body_may_arrive_in_parts_of_any_length():
    body = form(b"one\r\n-- x\r\n--", b"\x00\xff" * 100, name="ä.png")
    for length in (1, 2, 3, 7, 64, 10_000):
        parts = [body[start : start + length] for start in range(0, len(body), length)]
        first, second = Client(parts).read()
        assert (first.name, first.content) == ("ä.png", b"one\r\n-- x\r\n--")
        assert second.content == b"\x00\xff" * 100


def test_a_body_that_says_it_is_too_long_is_not_read():
    client = Client([bytes(10)], length=1001)
    assert client.read(max_bytes=1000) == []
    assert (client.answer[0]["status"], client.sent_before_answer) == (413, 0)
    assert "longer than 1000 bytes" in json.loads(client.answer[1]["body"])["error"]


@pytest.mark.parametrize("length", [None, 10])
def test_a_body_that_becomes_too_long_is_read_no_further(length):
    start = form(b"x")[:-7]
    client = Client([start] + [bytes(100)] * 1000, length=length)
    with pytest.raises(Refused) as refused:
        client.read(max_bytes=1000)
    assert refused.value.status == 413
    assert client.sent <= 11


def test_too_many_parts_are_refused_when_they_begin():
    head = f"--{BOUNDARY}\r\n".encode()
    client = Client([head + b'Content-Disposition: form-data; name="images"\r\n\r\nx\r\n'] * 100)
    with pytest.raises(Refused) as refused:
        client.read(max_files=3)
    assert (refused.value.status, client.sent) == (413, 4)


def test_a_client_that_hangs_up():
    with pytest.raises(Refused, match="closed"):
        Client([form(b"x")[:20]], hangs_up=True).read()


def test_file_names_are_made_harmless():
    named, unnamed = Client([form(b"x", name="a\x07b" + 200 * "c") + b""]).read()[0], None
    assert named.name == "ab" + 98 * "c"
    body = form(b"x").replace(b'; filename="a.png"', b"")
    (unnamed,) = Client([body]).read()
    assert unnamed.name == "image 1"


def test_the_answer_is_whole_before_the_rest_of_the_body_is_thrown_away():
    client = Client([bytes(1000)] * 50)
    client.ask(refusal(413, "Too long."))
    start, content, end = client.answer
    assert client.sent_before_answer == 0
    assert (b"content-length", str(len(content["body"])).encode()) in start["headers"]
    assert (b"connection", b"close") in start["headers"]
    assert (client.sent, end["more_body"]) == (50, False)


def test_after_a_whole_body_the_connection_is_kept():
    client = Client([form(b"x", field="other")])

    async def app(scope, receive, send):
        with pytest.raises(Refused):
            await read_uploads(Request(scope, receive), Limits(), lambda _: None)
        await refusal(422, "No.")(scope, receive, send)

    client.ask(app)
    assert client.answer[0]["status"] == 422
    assert b"connection" not in dict(client.answer[0]["headers"])


def test_without_a_body_the_connection_is_kept():
    client = Client([])
    client.scope["headers"] = []
    client.ask(refusal(503, "Later."))
    assert b"connection" not in dict(client.answer[0]["headers"])
    assert (client.sent, len(client.answer)) == (0, 2)


EVERY_BYTE = bytes(range(256))


@pytest.mark.parametrize("charset", [b"", b"; charset=utf-8", b"; charset=undefined", b'; charset=idna; x="'])
@pytest.mark.parametrize("content", [EVERY_BYTE, "ä€".encode(), "ä€".encode("utf-16")])
def test_a_part_without_a_file_name_is_kept_as_it_is_whatever_the_charset(content, charset):
    body = form(content).replace(b'; filename="a.png"', b"")
    (upload,) = Client([body], kind=KIND + charset).read()
    assert (upload.name, upload.content) == ("image 1", content)


def test_files_stay_in_memory(monkeypatch):
    """The bound on bodies bounds memory, and a disk that is full or read-only does not matter."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    (upload,) = Client([form(bytes(3_000_000))]).read(max_bytes=4_000_000)
    assert upload.content == bytes(3_000_000)
