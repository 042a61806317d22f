"""Bounds on requests, the answer to a refused one, and the middleware that bounds the length of bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from contextlib import suppress
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE = 5.0  # seconds
_OPEN_PATHS = ("/live", "/ready")
_DISCARD_SECONDS, _DISCARD_BYTES = 2.0, 64 * 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send.

    Attributes:
        max_bytes: length of a request's body.
        max_pixels: width times height, as their headers say, of all images of a request together; and of all
            images that are being decoded at once.
        max_files: images of one request.
        formats: kinds of images, some of `sparse_exp.data.images.IMAGE_FORMATS`.
        queue: requests whose body is there and that have no answer yet; more get status 503.
        timeout: seconds from a request's first byte to its answer.
        min_rate: bytes per second that a body must arrive with, after its first `PATIENCE` seconds.
        engine_timeout: seconds that a batch may be in the engine, before the engine counts as hanging.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 25_000_000
    max_files: int = 16
    formats: tuple[str, ...] = ("JPEG", "PNG")
    queue: int = 128
    timeout: float = 60.0
    min_rate: int = 10_000
    engine_timeout: float = 60.0

    @property
    def all_bytes(self) -> int:
        """Of all bodies in memory together, those that are still arriving included."""
        return self.queue * self.max_bytes


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


class Budget:
    """An amount of something, of which parts are taken and given back; who asks first is served first.

    Args:
        amount: of it, at least 0.
    """

    def __init__(self, amount: int) -> None:
        self._left, self._turn, self._given = amount, asyncio.Lock(), asyncio.Event()

    async def take(self, amount: int) -> None:
        """Wait until so much is left, and take it; it must not be more than there is in all."""
        async with self._turn:
            while self._left < amount:
                self._given.clear()
                await self._given.wait()
            self._left -= amount

    def give(self, amount: int) -> None:
        """Give back what was taken."""
        self._left += amount
        self._given.set()


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


class RequireKey:
    """ASGI middleware that asks every request for a key, but those for ``/live`` and ``/ready``.

    The key stands in the header ``X-API-Key``, or behind ``Bearer`` in ``Authorization``. How long the
    comparison takes says nothing about the key.

    Args:
        app: the application.
        key: the key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._digest = app, hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with the key on, and refuse others before their body is read."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._is_shown(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        do = "Send it in the header X-API-Key, or in Authorization as Bearer KEY."
        answer = refusal(401, f"The key is missing or wrong. {do}", {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _is_shown(self, headers: Headers) -> bool:
        kind, _, token = headers.get("Authorization", "").partition(" ")
        shown = headers.get("X-API-Key") or (token.strip() if kind.lower() == "bearer" else "")
        # Headers are decoded as Latin-1. Digests are compared, as they are all of one length.
        return hmac.compare_digest(hashlib.sha256(shown.encode("latin-1")).digest(), self._digest)
