"""Events on their way to a server that may go away and come back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sparse_exp.tracking.messages import one_line

_log = logging.getLogger(__name__)
_BACK_OFF = 10.0

Told = Iterable[tuple[Any, float]]


@dataclass(frozen=True)
class Sent:
    """What became of events that were sent again.

    Attributes:
        sent: how many the server took.
        left: how many it did not take, or were not tried any more.
        reason: why the last of these failed; "" where none did.
        gone: how many can never be sent, as their file is gone.
    """

    sent: int
    left: int
    reason: str = ""
    gone: int = 0


def is_gone(event: Any) -> bool:
    """Whether an event can never be sent, as the file that it is about is not there any more."""
    path = getattr(event, "path", None)
    return path is not None and not path.exists()


class Delivery:
    """Sends events as they happen, and notes when one was missed; all are sent again then, from the start.

    To send an event twice changes nothing, so that nothing needs to be kept but the run's own records.
    Failures cost the run little: after one, nothing is sent for ten times as long as it took.

    Args:
        send: sends one event that happened at a time (milliseconds since 1970); may raise.
        missed: whether something was missed before.

    Attributes:
        missed: whether an event was missed since the last complete `send_again`.
    """

    def __init__(self, send: Callable[[Any, int], None], *, missed: bool = False) -> None:
        self._send, self.missed = send, missed
        self._warned: set[str] = set()
        self._not_before = 0.0

    def put(self, event: Any, at: float) -> None:
        """Send an event that happened at a time (seconds since 1970), or note that it was missed."""
        started = time.monotonic()
        if started < self._not_before:
            self.missed = True
            return
        try:
            self._send(event, round(at * 1000))
        except Exception as error:
            self.missed = True
            self._not_before = time.monotonic() + _BACK_OFF * (time.monotonic() - started)
            self._warn(type(event).__name__.lower(), error)

    def send_again(self, told: Told, patience: float) -> Sent:
        """Send all events of a run, from its first; give up after so many seconds of failures."""
        lost, sent, left, reason, gone = 0.0, 0, 0, "", 0
        for event, at in told:
            if is_gone(event):
                gone += 1
                continue
            if left and lost >= patience:
                left += 1
                continue
            started = time.monotonic()
            try:
                self._send(event, round(at * 1000))
                sent += 1
            except Exception as error:
                _log.debug("Sending %s again failed", event, exc_info=error)
                lost, left, reason = lost + time.monotonic() - started, left + 1, one_line(error)
        self.missed = left > 0
        return Sent(sent, left, reason, gone)

    def _warn(self, kind: str, error: Exception) -> None:
        _log.debug("Tracking of %s failed", kind, exc_info=error)
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("Tracking failed (%s): %s. The run goes on; it is sent again later.",
                         kind, one_line(error))  # fmt: skip
