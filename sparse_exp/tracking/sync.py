"""Events that a tracking store did not take at the time, sent later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.tracking.outbox import Outbox, one_line, without_password
from sparse_exp.tracking.spool import UNSENT, Destination, Spool, read_destination, read_waiting

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Report:
    """What became of the waiting events of one run.

    Attributes:
        directory: of the run.
        sent: events that the store took.
        left: events that still wait.
        reason: why some do; empty where none does.
    """

    directory: Path
    sent: int
    left: int
    reason: str = ""

    def __str__(self) -> str:
        """One line for people."""
        done = f"{self.directory}: {count(self.sent)} sent"
        return f"{done}, {self.left} left: {self.reason}." if self.reason else f"{done}."


def count(number: int) -> str:
    """``1 event``, ``2 events`` ..."""
    return f"{number} event{'' if number == 1 else 's'}"


def find_waiting(directories: Sequence[Path]) -> list[Path]:
    """Directories with events that wait, at or below some directories, each once.

    Raises:
        ConfigError: one is no directory.
    """
    found: dict[Path, None] = {}
    for directory in directories:
        if not directory.is_dir():
            do = "Give the directory of a run, or one above it."
            raise ConfigError(expected("DIR", "a directory", str(directory), do))
        found |= dict.fromkeys(sorted(path.parent for path in directory.rglob(UNSENT)))
    return list(found)


class Sync:
    """Sends the waiting events of runs, each to the store it was meant for.

    Args:
        uri: address of the store to send to; None: as each file says.
    """

    def __init__(self, uri: str | None = None) -> None:
        self._uri = uri
        self._clients: dict[str, Any] = {}

    def send(self, directory: Path) -> Report:
        """Send what waits in a run's directory; what the store does not take stays there.

        Args:
            directory: of the run, with its file of events.
        """
        waiting = len(read_waiting(directory / UNSENT))
        try:
            destination = read_destination(directory / UNSENT)
            client = self._client(self._address(destination))
        except Exception as error:
            return Report(directory, 0, waiting, one_line(error))
        try:
            spool = Spool(directory, destination)
        except TimeoutError:
            return Report(directory, 0, waiting, "the run is not over; it sends them itself")
        return _deliver(client, destination.run_id, directory, spool)

    def _address(self, destination: Destination) -> str:
        """With user and password, which are not in the file, from the environment.

        Raises:
            SparseExpError: they are needed, and not there.
        """
        if self._uri:
            return self._uri
        environment = os.environ.get("MLFLOW_TRACKING_URI", "")
        if without_password(environment) == destination.uri:
            return environment
        if "://***@" in destination.uri:
            do = "Set MLFLOW_TRACKING_URI to it, or give it with --uri."
            raise SparseExpError(f"The address {destination.uri} needs a user and a password. {do}")
        return destination.uri

    def _client(self, uri: str) -> Any:
        """The client of a store, asked once whether it answers: many runs may wait for the same one."""
        from sparse_exp.tracking.mlflow import connect

        if uri not in self._clients:
            try:
                self._clients[uri] = connect(uri)
            except Exception as error:
                self._clients[uri] = error
        if isinstance(self._clients[uri], Exception):
            raise self._clients[uri]
        return self._clients[uri]


def _deliver(client: Any, run_id: str, directory: Path, spool: Spool) -> Report:
    from sparse_exp.tracking.mlflow import RunWriter

    spool.replace(spool.read())  # without a line that a kill cut off
    outbox = Outbox(RunWriter(client, run_id).send, spool)
    waiting = outbox.waiting
    outbox.flush(_PATIENCE_S)
    outbox.close()
    return Report(directory, waiting - outbox.waiting, outbox.waiting, outbox.reason)
