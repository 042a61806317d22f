"""A run on disk: its directory, the manifest of its stages, and writes that land whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short digest of plain data (nested dicts, lists, scalars), independent of the order of keys."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def landing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    When the block raises, nothing of it stays. The temporary name keeps the suffix, which some
    writers choose their format by.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    with landing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file whole or not at all."""
    return write_text(path, json.dumps(data, indent=2, default=str) + "\n")


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left: its entry in the manifest.

    Attributes:
        fingerprint: digest of everything the stage depends on.
        outputs: sha256 of each file it wrote, by path relative to the run directory.
        metrics: numbers and texts for ``result.json``, by name.
        seconds: wall time.
        facts: what later stages need to know, as plain data.
    """

    fingerprint: str
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class RunDirectory:
    """The directory of one run and its manifest.

    Args:
        path: the directory; see `create` and `reopen`.
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
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"The run directory {path} exists. Choose another with paths.run=PATH, replace it with "
                    f"overwrite=true, or go on with it with resume={path}."
                )
            if not (path / MANIFEST).is_file():
                raise ConfigError(
                    f"{path} holds no {MANIFEST}, so it is no run and is not replaced. "
                    "Choose another directory with paths.run=PATH."
                )
            shutil.rmtree(path)
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
        run.update(status="RUNNING", failure=None)
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
