"""A queue of events on their way to a server that may go away and come back."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_exp.tracking.spool import Spool, Waiting

_log = logging.getLogger(__name__)
_PATIENCE = 1.0
_BACK_OFF = 10.0


class Outbox:
    """Sends events in order, keeps those that failed, and tries them again with the next ones.

    An event is in the spool's file before the first attempt to send it and leaves it once it was
    sent; after a kill in between it is sent twice, which changes nothing. What the file holds at the
    beginning is sent first.

    Failures cost the run little: a pass ends once it has lost ``patience`` seconds to failed
    attempts, and then the next one starts only after ten times what was lost.

    Args:
        send: sends one event that happened at a time (milliseconds since 1970); may raise.
        spool: keeps the events that wait.
    """

    def __init__(self, send: Callable[[Any, int], None], spool: Spool) -> None:
        self._send, self._spool = send, spool
        self._waiting: list[Waiting] = spool.read()
        self._warned: set[str] = set()
        self._not_before = 0.0
        self.reason = ""

    @property
    def waiting(self) -> int:
        """Number of events that were not sent yet."""
        return len(self._waiting)

    def put(self, event: Any) -> None:
        """Queue an event and send what waits, unless the server was found slow a moment ago."""
        waiting = Waiting(event, int(time.time() * 1000))
        self._waiting.append(waiting)
        self._keep(lambda: self._spool.append(waiting))
        if time.monotonic() >= self._not_before:
            self.flush()

    def flush(self, patience: float = _PATIENCE) -> None:
        """Try once to send each event that waits; give up after ``patience`` seconds of failures."""
        lost, kept, before = 0.0, 0, len(self._waiting)
        while kept < len(self._waiting) and lost < patience:
            started = time.monotonic()
            if self._sent(self._waiting[kept]):
                del self._waiting[kept]
            else:
                kept += 1
                lost += time.monotonic() - started
        if lost >= patience:
            self._not_before = time.monotonic() + _BACK_OFF * lost
        if len(self._waiting) < before:
            self._keep(lambda: self._spool.replace(self._waiting))

    def close(self) -> Path:
        """Let other processes send what still waits; returns the file that holds it."""
        self._spool.close()
        return self._spool.path

    def _sent(self, waiting: Waiting) -> bool:
        try:
            self._send(waiting.event, waiting.time_ms)
        except Exception as error:
            self.reason = one_line(error)
            self._warn(type(waiting.event).__name__.lower(), error)
            return False
        return True

    def _warn(self, kind: str, error: Exception) -> None:
        _log.debug("Tracking of %s failed", kind, exc_info=error)
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("Tracking failed (%s): %s. The run goes on; it is sent again later.",
                         kind, one_line(error))  # fmt: skip

    def _keep(self, write: Callable[[], None]) -> None:
        """Change the spool's file; where the disk is full the events are in memory still."""
        try:
            write()
        except OSError as error:
            if "spool" not in self._warned:
                self._warned.add("spool")
                _log.warning("What tracking cannot send now would be lost with the run: %s", one_line(error))


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 300 characters, without its last full stop."""
    text = " ".join(without_password(str(error)).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".")


def without_password(text: str) -> str:
    """``text`` with the user and password of the addresses in it replaced by ``***``."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
