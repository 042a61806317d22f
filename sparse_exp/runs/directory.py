"""A run on disk: its directory, the manifest of its stages, and writes that land whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of, write_json
from sparse_exp.hints import resume_command
from sparse_exp.locks import exclusive, is_held

MANIFEST = "manifest.json"
LOCK = ".lock"


@contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[None]:
    """Be the only process that works on a run while the block runs; a process may do so within itself.

    The lock's file is in the directory only meanwhile; a directory that was made for it and holds nothing at
    the end goes again.

    Args:
        directory: of the run; it may be about to be made.
        wait: for whoever works on it, with a line in the log now and then.

    Raises:
        ConfigError: somebody works on it, and ``wait`` is off; or the directory cannot be made.
    """
    directory = directory.resolve()
    existed = directory.is_dir()
    what = f"The run {directory} is being worked on"
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(directory / LOCK, what, wait=wait))
            except OSError as error:
                message = f"Cannot make {directory}: {error.strerror}. Set paths.run=PATH."
                raise ConfigError(message) from error
            yield
    finally:
        if not existed:
            with suppress(OSError):  # it holds something
                directory.rmdir()


def is_abandoned(directory: Path) -> bool:
    """Whether a run was killed: it left its lock's file, and nobody works on it."""
    return (directory / LOCK).exists() and not is_held(directory / LOCK)


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left: its entry in the manifest.

    Attributes:
        fingerprint: digest of everything the stage depends on.
        outputs: sha256 of each file it wrote, by path relative to the run directory.
        metrics: numbers and texts for ``result.json``, by name.
        seconds: wall time without waiting for others; of a stage that was taken over, what it took there.
        facts: what later stages need to know, as plain data.
        shared_from: name of the job's directory that it was taken over from; None: it was done here.
    """

    fingerprint: str
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    shared_from: str | None = None


class RunDirectory:
    """The directory of one run and its manifest. Hold its lock (see `locked`) while you change it.

    Args:
        path: the directory; see `create`, `reopen` and `read`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.records: dict[str, StageRecord] = {}
        self.state: dict[str, Any] = {}

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> RunDirectory:
        """Make a new run directory.

        Raises:
            ConfigError: it exists, is not empty, and ``overwrite`` is off; or cannot be made.
        """
        if _content(path):
            if not (path / MANIFEST).is_file():
                raise ConfigError(
                    f"{path} holds no {MANIFEST}, so it is no run and is not replaced. "
                    "Choose another directory with paths.run=PATH."
                )
            if not overwrite:
                raise ConfigError(
                    f"The run directory {path} exists. Choose another with paths.run=PATH, replace it with "
                    f"overwrite=true, or go on with it: {resume_command(path)}"
                )
            empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Cannot make {path}: {error.strerror}. Set paths.run=PATH.") from error
        run = cls(path)
        run.update(status="RUNNING")
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Open an existing run to go on with it.

        Raises:
            ConfigError: there is no readable manifest.
        """
        run = cls.read(path)
        run.update(status="RUNNING", failure=None)
        return run

    @classmethod
    def read(cls, path: Path) -> RunDirectory:
        """An existing run as it is, to look at.

        Raises:
            ConfigError: there is no readable manifest.
        """
        run = cls(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            run.records = {name: StageRecord(**entry) for name, entry in manifest.pop("stages").items()}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"Expected resume to be the directory of a run with its {MANIFEST}, but got {str(path)!r}. "
                "Give a directory below outputs/runs."
            ) from error
        run.state = manifest
        return run

    def update(self, **state: Any) -> None:
        """Change top-level entries of the manifest, such as ``status``."""
        self.state.update(state)
        stages = {name: asdict(record) for name, record in self.records.items()}
        write_json(self.path / MANIFEST, {**self.state, "stages": stages})

    def is_finished(self, stage: str, stage_fingerprint: str) -> bool:
        """True when the stage finished with this fingerprint and its files are still what it wrote."""
        record = self.records.get(stage)
        return (
            record is not None
            and record.fingerprint == stage_fingerprint
            and all(
                (self.path / name).is_file() and sha256_of(self.path / name) == digest
                for name, digest in record.outputs.items()
            )
        )

    def record(self, stage: str, record: StageRecord) -> None:
        """Enter a finished stage."""
        self.records[stage] = record
        self.update()

    def digests(self, files: Iterable[Path]) -> dict[str, str]:
        """The sha256 of files inside the run directory, by relative path."""
        return {str(path.relative_to(self.path)): sha256_of(path) for path in files}

    def result(self) -> Mapping[str, Any]:
        """All metrics of the finished stages: the content of ``result.json``."""
        merged: dict[str, Any] = {}
        for name, record in self.records.items():
            merged.update(record.metrics)
            merged[f"time/{name}_s"] = round(record.seconds, 3)
        return merged


def _content(directory: Path) -> list[Path]:
    """What lies in the directory of a run, but for its lock."""
    return [path for path in directory.iterdir() if path.name != LOCK] if directory.is_dir() else []


def empty(directory: Path) -> None:
    """Delete a run, but for its lock. Its manifest goes last: what a killed process leaves is still a run."""
    for path in sorted(_content(directory), key=lambda path: path.name == MANIFEST):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def find_directories(directory: Path) -> list[Path]:
    """The run directories at or below a directory, by path; links are not followed."""
    found = []
    for folder, below, files in os.walk(directory):
        if MANIFEST in files:
            found.append(Path(folder))
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return sorted(found)
