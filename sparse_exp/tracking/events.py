"""What a tracker is told: small events, as plain data in a run's manifest too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

PARENT_TAG = "mlflow.parentRunId"
ENDED = "ended"
"""Key of a record of a training's history: when the epoch ended, seconds since 1970."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Metrics:
    """Numbers, at a step or (None) of the run as a whole; those that are not finite are left out."""

    values: Mapping[str, float]
    step: int | None = None


def epoch_metrics(record: Mapping[str, Any]) -> Metrics:
    """The numbers of a record of a training's history; a step is a hundredth of an epoch."""
    numbers = {name: value for name, value in record.items() if isinstance(value, float) and name != ENDED}
    return Metrics(numbers, step=round(100 * record["epoch"]))


@dataclass(frozen=True)
class Tags:
    """Texts that runs are searched by; a later value replaces an earlier one."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """One split of a data set that the run reads.

    Args:
        name: of the data set.
        digest: hash of its contents, hexadecimal.
        source: where it came from: a path, an ``http(s)`` address, or ``scheme:...``.
        split: ``train``, ``val`` ...
        size: images in the split.
    """

    name: str
    digest: str
    source: str
    split: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """A file, or a directory with all below it, to keep with the run under ``folder``."""

    path: Path
    folder: str = ""


@dataclass(frozen=True)
class Model:
    """An ONNX file to register under a name that others load it by.

    Args:
        path: of the file.
        name: in the registry, which numbers its versions.
        alias: that is moved to this version, such as ``candidate``; None: none is.
        tags: of the version.
    """

    path: Path
    name: str
    alias: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """From here on the machine belongs to the run alone: system metrics stop."""


@dataclass(frozen=True)
class Resume:
    """System metrics go on."""


Event = Metrics | Tags | Dataset | Artifact | Model | Pause | Resume


_KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Metrics, Tags, Dataset, Artifact, Model)}


def as_plain(event: Event, directory: Path) -> dict[str, Any]:
    """An event as plain data.

    Args:
        event: not `Pause` or `Resume`, which are of the moment.
        directory: of the run; paths below it are written relative to it.
    """
    values = {item.name: getattr(event, item.name) for item in fields(event)}
    if "path" in values:
        path, here = Path(values["path"]).absolute(), directory.absolute()
        values["path"] = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return {"event": type(event).__name__.lower(), **values}


def from_plain(plain: Mapping[str, Any], directory: Path) -> Event:
    """The event of `as_plain`.

    Raises:
        KeyError, TypeError: it is none.
    """
    values = {name: value for name, value in plain.items() if name != "event"}
    if "path" in values:
        values["path"] = directory / values["path"]
    event: Event = _KINDS[plain["event"]](**values)
    return event


@dataclass(frozen=True)
class Finish:
    """The end of a run, which trackers make an event of so that it can wait like others."""

    status: Status
    reason: str = ""
