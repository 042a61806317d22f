"""Bounds on connections: how many there are, and how long one may wait without asking or taking."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sparse_exp.errors import ConfigError

_WANTED = 65_536  # open files; far more than a service needs
_BACKLOG = 128
_OWN_FILES = 48  # of the service itself, those of an engine that is started again included
_LEAST = 8


def room_for_connections(wanted: int) -> tuple[int, int]:
    """Let this process open as many files as it may, and see how many connections that is enough for.

    Args:
        wanted: connections at once.

    Returns:
        Connections at once, at most as many as wanted; and the listener's backlog. There are file descriptors
        for both: of a flood of connections, Python accepts several backlogs before it closes one.

    Raises:
        ConfigError: there are hardly any.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < more:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft = more
    open_now = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else _OWN_FILES  # noqa: PTH208
    free = _WANTED if soft == resource.RLIM_INFINITY else soft - open_now - _OWN_FILES
    if free < _LEAST:
        raise ConfigError(f"Only {soft} files may be open at once. Allow more: ulimit -n 1024.")
    backlog = min(_BACKLOG, free // 8)
    return min(wanted, free - 4 * backlog), backlog


def bounded(most: int, seconds: float) -> type[H11Protocol]:
    """The protocol of a server's connections, which hangs up on who only holds one.

    Hung up on is whoever has sent no whole head of a request in time, or does not take what is sent; and
    where there are too many connections, the one that has waited longest for a request, since a new one may
    bring one; if all have one, the one that has waited longest for the rest of its body.

    Args:
        most: connections at once.
        seconds: from the beginning of a connection, or from the last answer, to the end of a request's head;
            and for taking what has been sent.
    """
    idle: dict[H11Protocol, None] = {}  # without a request, the one that has waited longest first
    receiving: dict[H11Protocol, None] = {}  # without the whole body, likewise

    class Bounded(H11Protocol):
        _asking: asyncio.TimerHandle | None = None  # until the head of a request is there
        _taking: asyncio.TimerHandle | None = None  # until the client has taken what was sent

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > most:
                others = (one for one in (*idle, *receiving) if one is not self)
                oldest = next(others, self)
                for waiting in (idle, receiving):
                    waiting.pop(oldest, None)
                oldest.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._asked()
            self._taken()
            receiving.pop(self, None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._asked()
                if self.cycle.more_body:
                    receiving.setdefault(self)
                else:
                    receiving.pop(self, None)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            receiving.pop(self, None)
            if self.cycle.response_complete:  # otherwise the next request was there already
                self._wait()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taken()
            self._taking = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taken()

        def _wait(self) -> None:
            self._asked()
            idle[self] = None
            self._asking = self.loop.call_later(seconds, self.transport.abort)

        def _asked(self) -> None:
            idle.pop(self, None)
            if self._asking:
                self._asking.cancel()

        def _taken(self) -> None:
            if self._taking:
                self._taking.cancel()

    return Bounded
