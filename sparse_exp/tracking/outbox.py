"""A queue of events on their way to a server that may go away and come back."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_PATIENCE = 1.0
_BACK_OFF = 10.0


class Outbox:
    """Sends events in order, keeps those that failed, and tries them again with the next ones.

    Failures cost the run little: a pass ends once it has lost ``patience`` seconds to failed
    attempts, and then the next one starts only after ten times what was lost.

    Args:
        send: sends one event that happened at a time (milliseconds since 1970); may raise.
    """

    def __init__(self, send: Callable[[Any, int], None]) -> None:
        self._send = send
        self._waiting: list[tuple[Any, int]] = []
        self._warned: set[str] = set()
        self._not_before = 0.0

    def put(self, event: Any) -> None:
        """Queue an event and send what waits, unless the server was found slow a moment ago."""
        self._waiting.append((event, int(time.time() * 1000)))
        if time.monotonic() >= self._not_before:
            self.flush()

    def flush(self, patience: float = _PATIENCE) -> None:
        """Try once to send each event that waits; give up after ``patience`` seconds of failures."""
        lost, kept = 0.0, 0
        while kept < len(self._waiting) and lost < patience:
            started = time.monotonic()
            if self._sent(*self._waiting[kept]):
                del self._waiting[kept]
            else:
                kept += 1
                lost += time.monotonic() - started
        if lost >= patience:
            self._not_before = time.monotonic() + _BACK_OFF * lost

    def _sent(self, event: Any, milliseconds: int) -> bool:
        try:
            self._send(event, milliseconds)
        except Exception as error:
            self._warn(type(event).__name__.lstrip("_").lower(), error)
            return False
        return True

    def _warn(self, kind: str, error: Exception) -> None:
        _log.debug("Tracking of %s failed", kind, exc_info=error)
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("Tracking failed (%s): %s. The run goes on; it is sent again later.",
                         kind, one_line(error))  # fmt: skip

    def write_unsent(self, path: Path) -> int:
        """Write the events that still wait, one JSON object a line; no file when there is none.

        Returns:
            The number of events written.
        """
        if self._waiting:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [_as_json(event, milliseconds) for event, milliseconds in self._waiting]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return len(self._waiting)


def _as_json(event: Any, milliseconds: int) -> str:
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    kind = type(event).__name__.lstrip("_").lower()
    return json.dumps({"event": kind, "time_ms": milliseconds, **fields}, default=_jsonable)


def _jsonable(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else str(value)


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 300 characters, without its last full stop."""
    text = " ".join(without_password(str(error)).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".")


def without_password(text: str) -> str:
    """``text`` with the user and password of the addresses in it replaced by ``***``."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
