"""The service's log: lines of text, or of JSON with a request's id in each."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORMATS = ("text", "json")
_ID = "X-Request-ID"
_GOOD_ID = re.compile(r"[\w.:/+=-]{1,64}", re.ASCII)
_LONGEST_PATH, _LONGEST_TEXT = 200, 4000  # characters
_request_id: ContextVar[str] = ContextVar("request_id", default="")
_requests = logging.getLogger(f"{__name__}.requests")


def set_up_log(form: str) -> None:
    """Write the log of this process to standard error.

    Args:
        form: ``text``: warnings, each as its message alone; ``json``: also a line for each request, and what
            the engine prints, each line as a JSON object.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine() if form == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if form == "json":
        logging.getLogger("sparse_exp").setLevel(logging.INFO)
    for name in ("sparse_exp.serve.worker.output", "asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(Sparing())
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told what it would log


class Sparing(logging.Filter):
    """Lets a logger write so many lines a second at most; the next line says how many were left out.

    Args:
        most: lines of a second.
    """

    def __init__(self, most: int = 20) -> None:
        super().__init__()
        self._most, self._second, self._count, self._left_out = most, 0, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        if self._second != int(record.created):
            self._second, self._count = int(record.created), 0
        self._count += 1
        if self._count > self._most:
            self._left_out += 1
            return False
        if self._left_out:
            record.msg = f"{record.getMessage()} ({self._left_out} lines before it were left out)"
            record.args, self._left_out = (), 0
        return True


class _JsonLine(logging.Formatter):
    """One JSON object: time, level, message, the id of the request if there is one, and further values."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST_TEXT],
        }
        if request_id := _request_id.get():
            entry["request"] = request_id
        entry |= getattr(record, "values", {})
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)[-_LONGEST_TEXT:]
        return json.dumps(entry)


class LogRequests:
    """ASGI middleware that gives each request an id, sends it back, and logs the request once it is answered.

    The id is that of the header X-Request-ID where it has one of at most 64 letters, digits and ``.:/+=_-``.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_ID, "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        _request_id.set(request_id)
        status, received, start = 500, 0, time.perf_counter()

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_ID] = request_id
            await send(message)

        try:
            await self._app(scope, counted, named)
        finally:
            values = {
                "method": scope["method"],
                "path": scope["path"][:_LONGEST_PATH],
                "status": status,
                "seconds": round(time.perf_counter() - start, 4),
                "bytes": received,
                "client": (scope.get("client") or [""])[0],
            }
            _requests.info("request", extra={"values": values})
