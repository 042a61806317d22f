"""How a model comes into the local zoo: built out of sight, then there in one step, whole or not at all.

Everything is built in ``<zoo>/.publishing`` under one lock for the whole zoo, so what a killed process left
there is cleared by the next one. Permissions follow the umask: a team's zoo wants one that lets the group
write.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of
from sparse_exp.sources.local import (
    METADATA,
    SUMS,
    Published,
    directory_of,
    read_metadata,
    require_free,
    stub_of,
)

_log = logging.getLogger(__name__)
_LOCK, _STAGING, _REPLACED = ".lock", ".publishing", ".replaced"
_WAIT_S = 600.0
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux' renameat2

Fill = Callable[[str, Path], None]


def put(stub: str, zoo: Path, fill: Fill, *, force: bool = False, numbered: bool = False) -> Published:
    """Publish a model.

    Args:
        stub: where it belongs; of either grammar.
        zoo: see `sparse_exp.sources.local.zoo_directory`; made where it is not there.
        fill: is given the stub and an empty directory, and writes all files of the model into it,
            ``model.json`` among them.
        force: replace a model that is there. Readers see the old one or the new one, whole; where the file
            system cannot exchange two directories, there is none for the moment of a rename.
        numbered: take the next free stub where this one is taken, by a number behind its tag.

    Raises:
        ConfigError: the stub is malformed or taken, another process publishes for minutes, or the zoo
            cannot be written. Nothing is left then, and what was there is as it was.
    """
    directory_of(stub, zoo)
    try:
        with _staging(zoo) as staging:
            stub = stub_of(directory_of(stub, zoo), zoo)
            if numbered and not force:
                stub = _free(stub, zoo)
            require_free(stub, zoo, force=force)
            fill(stub, staging)
            write_sums(staging)
            target = directory_of(stub, zoo)
            _land(staging, target, zoo / _REPLACED)
    except OSError as error:
        do = "Free or allow the space, or choose another zoo with paths.zoo=PATH (--zoo PATH)."
        raise ConfigError(f"Cannot publish in {zoo}: {error.strerror or error}. {do}") from error
    return Published(stub, target, read_metadata(target))


def write_sums(directory: Path) -> None:
    """Write the sha256 of each file as ``SHA256SUMS``, which ``sha256sum -c`` reads."""
    lines = [f"{sha256_of(path)}  {path.relative_to(directory).as_posix()}\n" for path in files_of(directory)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def changed_files(directory: Path) -> list[str]:
    """What differs from ``SHA256SUMS``: a sentence for each file that is missing, changed or not listed.

    Empty where all is as it was, and where there is no such list.
    """
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [] if isinstance(error, FileNotFoundError) else [f"{SUMS} cannot be read"]
    promised = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(directory).as_posix(): path for path in files_of(directory)}
    problems = [f"{name} is missing" for name in sorted(promised.keys() - found.keys())]
    problems += [f"{name} is not in {SUMS}" for name in sorted(found.keys() - promised.keys())]
    changed = (name for name in found.keys() & promised.keys() if sha256_of(found[name]) != promised[name])
    return problems + [f"{name} was changed" for name in sorted(changed)]


def files_of(directory: Path) -> list[Path]:
    """All files of a model but the list of their hashes, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / SUMS)


@contextmanager
def _staging(zoo: Path) -> Iterator[Path]:
    """An empty directory in the zoo, for this process alone; gone when the block ends."""
    from filelock import FileLock, Timeout

    zoo.mkdir(parents=True, exist_ok=True)
    # Others of the team must be able to open the lock, whatever the umask of who came first.
    lock = FileLock(zoo / _LOCK, mode=0o666, timeout=_WAIT_S)
    try:
        with lock:
            staging = zoo / _STAGING
            _clear(zoo, staging)
            staging.mkdir()
            try:
                yield staging
            finally:
                _clear(zoo, staging)
    except Timeout:
        do = "Wait for it, or look for a process that hangs."
        raise ConfigError(f"Another process has been publishing in {zoo} for {_WAIT_S:g} s. {do}") from None


def _clear(zoo: Path, staging: Path) -> None:
    """Remove what was being built, and what was replaced, unless its place is still empty."""
    replaced = zoo / _REPLACED
    stub = read_metadata(replaced).get("stub")
    if stub and not directory_of(stub, zoo).exists():  # killed between two renames: the old one stays
        replaced.replace(directory_of(stub, zoo))
    for folder in (staging, replaced):
        if folder.exists():
            shutil.rmtree(folder)


def _free(stub: str, zoo: Path) -> str:
    number, candidate = 1, stub
    while directory_of(candidate, zoo).exists():
        number += 1
        candidate = f"{stub}-{number}"
    return candidate


def _land(staging: Path, target: Path, replaced: Path) -> None:
    if not (staging / METADATA).is_file():
        raise ValueError(f"no {METADATA} was written")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.replace(target)
        return
    if _exchange(staging, target):
        return  # what was there lies in staging now, and goes with it
    target.replace(replaced)
    staging.replace(target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places at once; False where the system cannot."""
    renameat2: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not on this file system
        return False
    raise OSError(code, os.strerror(code), str(other))
