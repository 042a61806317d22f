"""Bounds on requests, the answer to a refused one, and the middleware that bounds the length of bodies."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DISCARD_SECONDS, _DISCARD_BYTES = 2.0, 64 * 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send.

    Attributes:
        max_bytes: length of a request's body.
        max_pixels: width times height of an image, as its header says.
        max_files: images of one request.
        queue: requests inside the service at once; more get status 503. Together with ``max_bytes`` this
            bounds the memory that bodies can take.
        timeout: seconds from a request's first byte to its answer.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 50_000_000
    max_files: int = 16
    queue: int = 128
    timeout: float = 60.0


class Refused(Exception):
    """A request that gets no detections.

    Args:
        status: of HTTP, 400 to 599.
        message: one line that says what to do.
        retry_after: seconds after which to try again; None where that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The JSON answer ``{"error": message}``."""
    return JSONResponse({"error": message}, status, headers)


class LimitBody:
    """ASGI middleware that refuses bodies that are too long.

    A body is refused by its Content-Length before any of it is read, and otherwise as soon as too much has
    arrived: the application's ``receive`` then raises `Refused`.

    Many clients send the whole body before they read the answer. If the connection were closed meanwhile they
    would report a broken pipe and not the answer. So after an error whose request was not read to its end,
    the rest is received and thrown away for at most 2 s and 64 MB, and then the connection is closed.

    Args:
        app: the application.
        max_bytes: length of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        do = "Send fewer or smaller images, or start the service with a larger --max-bytes."
        self._too_long = f"The body is longer than {max_bytes} bytes. {do}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body bounded."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("Content-Length", "")
        received, closing = 0, False
        unread = bool(length) or "Transfer-Encoding" in headers  # without either there is no body

        async def counted() -> Message:
            nonlocal received, unread
            message = await receive()
            received += len(message.get("body", b""))
            unread = message.get("more_body", False)
            if received > self._max_bytes:
                raise Refused(413, self._too_long)
            return message

        async def answer(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and message["status"] >= 400 and unread:
                closing = True
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif closing and not message.get("more_body", False):
                # By its Content-Length the answer is complete for the client, and for the server it is not.
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        refused = length.isdecimal() and int(length) > self._max_bytes
        app = refusal(413, self._too_long) if refused else self._app
        await app(scope, counted, answer)


async def _discard(receive: Receive) -> None:
    """Receive what a client goes on sending and throw it away, within bounds."""
    discarded, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while more and discarded < _DISCARD_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)
