"""A run on disk: its directory, its lock, and the manifest with the records of its stages."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import (
    FULL,
    expanded,
    landing,
    parse_json,
    remove_parts,
    sha256_of,
    write_json,
    write_text,
)
from sparse_exp.hints import resume_command
from sparse_exp.locks import IN_DIRECTORY, alone_in, is_held
from sparse_exp.runs.deployment import FOLDER, Deployment
from sparse_exp.runs.kinds import FACTS, RECORD, STATE, is_of
from sparse_exp.sources.layout import BEFORE_QAT

MANIFEST, CONFIG = "manifest.json", "config.yaml"
FORMER = ".manifest.former.json"  # the manifest before, for where a power failure has damaged the last one
LOCK = IN_DIRECTORY
_log = logging.getLogger(__name__)
_FLOATING_POINT = (
    "slim_pruned",
    "slim_pruning",
    "slim",
    "slimming",
    "pruned",
    "pruning",
    "dense",
)  # phases, the last of a training first


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
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(directory, f"The run {directory} is being worked on", wait=wait))
        except OSError as error:
            message = f"Cannot make {directory}: {error.strerror}. Set paths.run=PATH."
            raise ConfigError(message) from error
        yield


def claim(path: Path) -> Path:
    """Make the directory of a new run: at a path, or where that is taken at the path with the next number.

    Of processes that claim one path at once, on whatever machines, each gets a directory of its own.

    Args:
        path: the directory wanted.

    Returns:
        The directory that was made; it is empty.

    Raises:
        ConfigError: it cannot be made.
    """
    number, place = 1, path
    while True:
        try:
            place.mkdir(parents=True)
            return place
        except FileExistsError:
            number += 1
            place = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise ConfigError(f"Cannot make {place}: {error.strerror}. Set paths.run=PATH.") from error


@dataclass(frozen=True)
class StageRecord:
    """The entry of a finished stage in the manifest.

    Attributes:
        fingerprint: digest of everything the stage depends on.
        outputs: sha256 of each file it wrote, by path relative to the run directory.
        metrics: numbers and texts for ``result.json``, by name.
        seconds: wall time without waiting for others; if it was taken over, the time it took there.
        facts: plain data that later stages need.
        shared_from: name of the job's directory that it was taken over from; None: it was done here.
        ended: when it ended, seconds since 1970; 0 in older records.
        events: what a tracker is told beside the metrics; each as `sparse_exp.tracking.as_plain` gives it.
        conditions: key of the code, packages and host it was done with, in `Run.environments`; "" in
            older records.
        parts: digest of each part of the fingerprint, by name, to say what changed; empty in older records.
        step: at which the tracker shows its metrics, a hundredth of an epoch; None in older records.
    """

    fingerprint: str
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    shared_from: str | None = None
    ended: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    conditions: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    step: int | None = None

    @classmethod
    def from_plain(cls, stage: str, entry: Mapping[str, Any]) -> StageRecord:
        """A record from its entry; keys of later versions are left out.

        Args:
            stage: its name.
            entry: of the manifest.

        Raises:
            TypeError: the entry has no fingerprint, is no mapping, or has a value of another kind.
            ValueError: it names a file outside the run, or one that no file system holds.
        """
        found = {key: value for key, value in entry.items() if key in RECORD}
        facts = FACTS.get(stage, dict)
        if not is_of(found, RECORD) or not is_of(found.get("facts", {}), facts):
            raise TypeError(f"the record of {stage} has a value of another kind")
        told = [event.get(key) for event in found.get("events", ()) for key in ("path", "folder")]
        # Of other facts a path may lead out: to a dense counterpart beside the run, to a file of the cache.
        trained = found.get("facts", {}).get("checkpoint") if stage == "train" else None
        for path in map(PurePath, (*found.get("outputs", ()), *filter(None, [*told, trained]))):
            if (
                path.is_absolute()
                or ".." in path.parts
                or any(len(os.fsencode(part)) > 255 for part in path.parts)
            ):
                raise ValueError(f"{path} is no file of a run")
        return cls(**found)


class Run:
    """A run on disk: its manifest, and where its files lie. This is the one reader of run directories.

    Hold the lock (see `locked`) while you change it.

    Args:
        path: the directory; see `create`, `reopen`, `read` and `find`.

    Attributes:
        path: absolute.
        records: of the finished stages, by name, in the order in which they finished first.
        state: the other entries of the manifest, such as ``status``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.records: dict[str, StageRecord] = {}
        self.state: dict[str, Any] = {}

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> Run:
        """Make a new run directory.

        A run that takes another's place has its `key`, too; not that of a copy, see `reopen`.

        Raises:
            ConfigError: it exists, is not empty, and ``overwrite`` is off; or cannot be made.
        """
        former, copied = None, False
        remove_parts(path, below=False)  # of a process that was killed before it had written the manifest
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
            former = cls.find(path)
            copied = former is not None and former.original is not None
            empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            key = (former and not copied and former.key) or uuid.uuid4().hex
            run.update(status="RUNNING", key=key, place=str(run.path))
        except OSError as error:
            raise ConfigError(f"Cannot make {path}: {error.strerror}. Set paths.run=PATH.") from error
        return run

    @classmethod
    def reopen(cls, path: Path, outside: Collection[str] = ()) -> Run:
        """Open an existing run to go on with it; what a killed process left half-written goes.

        A copy of a run becomes a run of its own, with another `key` and no tracked run.

        Args:
            path: its directory.
            outside: stages whose results lie outside of the directory: those of a copy are the original's.

        Raises:
            ConfigError: there is no readable manifest.
        """
        run = cls.read(path)
        remove_parts(run.path, below=True)
        if original := run.original:
            _log.info("%s is a copy of %s: it goes on as a run of its own.", run.path, original)
            run.records = {name: each for name, each in run.records.items() if name not in outside}
            run.state |= {"copied_from": run.tracker_run_id or str(original), "key": None}
            run.state |= {"tracker_run_id": None, "tracker_address": None}
        key = run.key or uuid.uuid4().hex
        run.update(status="RUNNING", failure=None, key=key, place=str(run.path))
        return run

    @classmethod
    def read(cls, path: Path, what: str = "resume") -> Run:
        """An existing run as it is.

        Args:
            path: its directory.
            what: the argument that named it, for the message.

        Raises:
            ConfigError: there is no readable manifest.
        """
        run, file = cls(path), path / MANIFEST
        found = _manifest(file)
        if found is None and file.is_file():
            found = _manifest(file.with_name(FORMER))
            if found is not None:
                _log.warning(
                    "%s is damaged: the one before it counts, and what came since is done again.", file
                )
        if found is None and file.is_file():
            do = "Make the run anew in another directory, or in this one with overwrite=true."
            raise ConfigError(f"{file} cannot be read: it is empty, cut off or no manifest. {do}")
        if found is None:
            do = "Give a directory below outputs/runs."
            should_be = f"the directory of a run with its {MANIFEST}"
            raise ConfigError(expected(what, should_be, str(path), do))
        run.records, run.state = found
        return run

    @classmethod
    def find(cls, path: Path) -> Run | None:
        """The run in a directory; None where there is none that can be read."""
        try:
            return cls.read(path)
        except ConfigError:
            return None

    @property
    def status(self) -> str:
        """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``; "" where it is not recorded.

        A run that says RUNNING in its manifest and that nobody works on was KILLED.
        """
        status = str(self.state.get("status", ""))
        return "KILLED" if status == "RUNNING" and not is_held(self.path / LOCK) else status

    @property
    def key(self) -> str | None:
        """What tells the run from all others, wherever its directory lies; None in records before 0.2."""
        key = self.state.get("key")
        return None if key is None else str(key)

    @property
    def original(self) -> Path | None:
        """The directory of the run that this one is a copy of, until the copy is gone on with.

        None for a run that is where it was, for one that was moved, whose former place holds it no more, and
        for records of before 0.2, which do not say where they were.
        """
        place = Path(str(self.state.get("place") or self.path))
        if self.key is None or place == self.path:
            return None
        there = Run.find(place)
        is_other = there is not None and there.key == self.key and not place.samefile(self.path)
        return place if is_other else None

    @property
    def tracker_run_id(self) -> str | None:
        """The tracker's name of the run; None where it was not tracked."""
        run_id = self.state.get("tracker_run_id")
        return None if run_id is None else str(run_id)

    @property
    def environments(self) -> dict[str, Any]:
        """Code, packages and host of each start, by the key that records name it by."""
        return dict(self.state.get("environments", {}))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data; empty where ``config.yaml`` cannot be read."""
        try:
            config = read_yaml((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of the manifest as plain data; the records are under ``stages``."""
        return {**self.state, "stages": {name: asdict(record) for name, record in self.records.items()}}

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage left for others; empty when it did not run."""
        record = self.records.get(stage)
        return record.facts if record else {}

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics of a finished stage; empty when it did not run."""
        record = self.records.get(stage)
        return record.metrics if record else {}

    def result(self) -> dict[str, Any]:
        """All metrics of the finished stages, and their times: the content of ``result.json``."""
        merged: dict[str, Any] = {}
        for name, record in self.records.items():
            merged.update(record.metrics)
            merged[f"time/{name}_s"] = round(record.seconds, 3)
        return merged

    @property
    def trained_checkpoint(self) -> Path | None:
        """The checkpoint that the train stage chose; it may be gone. None where that stage did not run."""
        name = self.facts("train").get("checkpoint")
        return self.path / str(name) if name else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that is exported: what ``checkpoint=`` names, else what the train stage chose."""
        given = self.config.get("checkpoint")
        return expanded(str(given)) if given else self.trained_checkpoint

    @property
    def composed_recipe(self) -> str | None:
        """The recipe that was trained under, with that of the start before it; None before the training."""
        return self.facts("train").get("recipe")

    @property
    def baseline_checkpoint(self) -> Path | None:
        """File of the dense counterpart that the baseline stage found or trained; None without one."""
        checkpoint = self.facts("baseline").get("checkpoint")
        file = self.path / str(checkpoint) if checkpoint else None
        return file if file and os.path.isfile(file) else None  # noqa: PTH113 - false for names of any length

    @property
    def dense_fingerprint(self) -> str | None:
        """The fingerprint that a dense run is found by once it was evaluated; None for others.

        What became of the run afterwards does not matter.
        """
        mark = self.facts("evaluate").get("dense_fingerprint")
        if mark is None and self.state.get("status") == "FINISHED":  # of a version that did not note it there
            mark = self.facts("baseline").get("dense_fingerprint")
        return str(mark) if mark else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes of its data set; empty where the fetch stage did not run."""
        return tuple(map(str, self.facts("fetch").get("names", ())))

    @property
    def deployment(self) -> Deployment:
        """The exported files; the directory need not exist."""
        exported = self.facts("export")
        impossible, dense = exported.get("impossible", {}), exported.get("dense") or {}
        return Deployment(
            self.path / FOLDER, self.checkpoint, impossible, dense_is_trained=bool(dense.get("trained"))
        )

    def before_quantization(self, checkpoint: Path) -> Path | None:
        """The best checkpoint of the last phase in floating point, which lies beside a deployed one.

        Args:
            checkpoint: what the run deploys. Where the run trained itself only files of that training count.

        Returns:
            A file in the run's ``weights`` or in a published model; None where there is none.
        """
        names = [*(f"best_{phase}.pt" for phase in _FLOATING_POINT), BEFORE_QAT]
        if "train" in self.records:
            names = [name for name in names if f"weights/{name}" in self.records["train"].outputs]
        return next((file for file in map(checkpoint.with_name, names) if file.is_file()), None)

    def update(self, **state: Any) -> None:
        """Change entries of the manifest beside the stages, such as ``status``."""
        self.state.update(state)
        file, former = self.path / MANIFEST, self.path / FORMER
        if _manifest(file) is not None:  # a damaged one must not take the place of a good one
            with suppress(OSError), landing(former, durable=False) as temporary:
                temporary.unlink(missing_ok=True)
                os.link(file, temporary)
        try:
            write_json(file, self.manifest)
        except OSError as error:
            if error.errno not in FULL:
                raise
            former.unlink(missing_ok=True)  # which leaves as much space as is needed
            write_json(file, self.manifest)

    def is_whole(self, stage: str) -> bool:
        """Whether the files of a finished stage are still those that it wrote."""
        return not self.changed_outputs(stage)

    def changed_outputs(self, stage: str) -> list[str]:
        """Files of a finished stage that are gone or have another content, relative to the directory."""
        outputs = self.records[stage].outputs if stage in self.records else {}
        return [name for name, digest in outputs.items() if _digest(self.path / name) != digest]

    def is_finished(self, stage: str, stage_fingerprint: str) -> bool:
        """True when the stage finished with this fingerprint and its files are still what it wrote."""
        record = self.records.get(stage)
        return record is not None and record.fingerprint == stage_fingerprint and self.is_whole(stage)

    def record(self, stage: str, record: StageRecord) -> None:
        """Enter a finished stage."""
        self.records[stage] = record
        self.update()

    def write_recipe(self, text: str) -> Path:
        """Keep a recipe in the run's directory, as the front matter of ``recipe.md``."""
        return write_text(self.path / "recipe.md", f"---\n{text.strip()}\n---\n")

    def digests(self, files: Iterable[Path]) -> dict[str, str]:
        """The sha256 of files inside the run directory, by relative path."""
        return {str(path.relative_to(self.path)): sha256_of(path) for path in files}


def _manifest(file: Path) -> tuple[dict[str, StageRecord], dict[str, Any]] | None:
    """The records and the other entries of a manifest; None where it is not there or cannot be read."""
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
        stages = manifest.pop("stages")
        if not is_of(manifest, STATE):
            return None
        return {name: StageRecord.from_plain(name, entry) for name, entry in stages.items()}, dict(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _digest(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


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
