"""Events on their way to the tracking store, in a file of their run's directory: no kill loses one.

The first line of the file says where they belong, each other line is one event. Without events there is
no file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.errors import SparseExpError, expected
from sparse_exp.files import write_text
from sparse_exp.tracking import Artifact, Dataset, Finish, Metrics, Model, Tags

UNSENT = "unsent_tracking.jsonl"
_LOCK = ".unsent_tracking.lock"
_KINDS: dict[str, Any] = {
    kind.__name__.lower(): kind for kind in (Metrics, Tags, Dataset, Artifact, Model, Finish)
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """An event that was not sent yet.

    Attributes:
        event: see `sparse_exp.tracking.Event`.
        time_ms: when it happened, milliseconds since 1970.
    """

    event: Any
    time_ms: int


@dataclass(frozen=True)
class Destination:
    """Where events belong.

    Attributes:
        uri: address of the tracking store, without a password.
        run_id: the store's name of the run.
    """

    uri: str
    run_id: str


class Spool:
    """The file of one run's waiting events, open in one process at a time.

    Args:
        directory: of the run; made if need be. Paths in it are written relative to it.
        destination: where the events belong.
        patience: seconds to wait for a process that has the same spool open.

    Raises:
        TimeoutError: another process has it open.
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, destination: Destination, patience: float = 0.0) -> None:
        import filelock

        self.path, self._destination = directory.absolute() / UNSENT, destination
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.path.with_name(_LOCK), timeout=patience, thread_local=False)
        self._lock.acquire()

    def read(self) -> list[Waiting]:
        """The events in the file, in their order; a line that a kill cut off is left out."""
        return read_waiting(self.path)

    def append(self, waiting: Waiting) -> None:
        """Add an event."""
        head = [] if self.path.exists() else [self._head()]
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in [*head, self._line(waiting)]))

    def replace(self, waiting: Sequence[Waiting]) -> None:
        """Let the file hold these events and no others."""
        if waiting:
            lines = [self._head(), *map(self._line, waiting)]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes have it; a second call does nothing."""
        if self._lock.is_locked:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def _head(self) -> str:
        return json.dumps(dataclasses.asdict(self._destination))

    def _line(self, waiting: Waiting) -> str:
        event = waiting.event
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        if "path" in fields:
            path, here = fields["path"].absolute(), self.path.parent
            fields["path"] = str(path.relative_to(here) if path.is_relative_to(here) else path)
        kind = type(event).__name__.lower()
        return json.dumps({"event": kind, "time_ms": waiting.time_ms, **fields}, default=_plain)


def read_destination(path: Path) -> Destination:
    """Where the events of a spool's file belong.

    Raises:
        SparseExpError: the file does not say so.
    """
    try:
        head = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
        return Destination(str(head["uri"]), str(head["run_id"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, do = "a list of events and where they belong", "If its events are not needed, delete it."
        raise SparseExpError(expected(str(path), what, "another content", do)) from error


def read_waiting(path: Path) -> list[Waiting]:
    """The events in a spool's file, in their order; lines that are no event are left out with a warning."""
    if not path.is_file():
        return []
    found = (_event(line, path.parent) for line in path.read_text(encoding="utf-8").splitlines()[1:])
    return list(_readable(found, path))


def _readable(found: Iterable[Waiting | None], path: Path) -> Iterable[Waiting]:
    for number, waiting in enumerate(found, 2):
        if waiting is None:
            _log.warning("Line %d of %s is no event; it is left out.", number, path)
        else:
            yield waiting


def _event(line: str, directory: Path) -> Waiting | None:
    try:
        fields = json.loads(line)
        kind, milliseconds = _KINDS[fields.pop("event")], int(fields.pop("time_ms"))
        if "path" in fields:
            fields["path"] = directory / fields["path"]
        return Waiting(kind(**fields), milliseconds)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
