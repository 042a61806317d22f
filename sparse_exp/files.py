"""Files and directories that land whole or not at all, through a power failure too; digests.

What has landed is on the disk: the content is written out before the name shows it, and the name afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that mean: no space is left, on the disk or for this user."""
_MOST_SINGLE_FILES = 200  # with more, all that the system has to write is written out at once
_PART = re.compile(r"\..*\.(\d+)\.part(\.[^.]*)?", re.DOTALL)  # a temporary name that `landing` gives
_LEFT_S = 86400.0  # after which nobody writes on a file any more, on whatever machine
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux, see renameat2(2)


def expanded(path: str | Path) -> Path:
    """A path with the home directory in the place of ``~`` or ``~user``; one of an unknown user stays.

    No file has a null character in its name: another stands for it, so that the path is one of no file.
    """
    path = str(path).replace("\0", "\ufffd")
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises an error of its own


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
def landing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    When the block raises, nothing of it stays. The temporary name keeps the suffix, which some
    writers choose their format by.

    Args:
        path: of the file.
        durable: wait until it is on the disk; not for many small files that can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        if durable:
            _write_out(temporary)
        temporary.replace(path)
        if durable:
            _write_out(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def full_disk_told(need: int, *folders: Path) -> Iterator[None]:
    """Let it be the system's error that a disk is full, where a writer in native code raises one of its own.

    What the writer had written by then is gone, so the disk has space again, but less than is needed.

    Args:
        need: bytes that the block writes.
        folders: that it writes into.

    Raises:
        OSError: the block has failed, and one of them has less space.
    """
    try:
        yield
    except Exception as error:
        for folder in folders:
            if shutil.disk_usage(folder).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def remove_parts(directory: Path, *, below: bool) -> None:
    """Delete what killed processes left half-written: their `landing` did not end.

    Nobody may write there meanwhile: hold the directory's lock.

    Args:
        directory: it may not exist.
        below: whether also in the directories below it; links are not followed.
    """
    for folder, folders, names in os.walk(directory):
        if not below:
            folders.clear()
        for name in filter(is_part, names):
            with suppress(FileNotFoundError):
                Path(folder, name).unlink()


def remove_left_parts(directory: Path) -> None:
    """Delete what killed processes left half-written in a directory that others may write into meanwhile.

    Its process is gone, and it is a day old: it may be that of a process on another machine.
    """
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            found = _PART.fullmatch(entry.name)
            if found and not _is_alive(int(found[1])) and time.time() - entry.stat().st_mtime > _LEFT_S:
                os.unlink(entry.path)  # noqa: PTH108 - an entry is no path


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_part(name: str) -> bool:
    """Whether a file name is one that `landing` gives while it writes."""
    return _PART.fullmatch(name) is not None


@contextmanager
def landing_directory(target: Path, *, part: Path | None = None) -> Iterator[Path]:
    """An empty directory that takes the place of ``target`` in one step when the block ends well.

    Whoever reads ``target`` meanwhile finds the old directory or the new one, whole. Only where the file
    system cannot exchange two directories is there none for the moment of a rename. When the block raises,
    what was there before stays. What a killed process left is cleared by the next one that builds here.

    One process at a time may build a target: hold an `sparse_exp.locks.exclusive` lock.

    Args:
        target: the directory; it may not exist yet.
        part: where it is built, on the same file system; None: in a hidden directory beside ``target``.

    Raises:
        OSError: it cannot be written, or not be put in its place.
    """
    part = part or target.with_name(f".{target.name}.partial")
    old = replaced_by(part)
    if old.exists() and not target.exists():  # killed between the two renames of _put_in_place
        old.replace(target)
    _remove(old)
    _remove(part)
    part.mkdir(parents=True)
    try:
        yield part
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_out_all(part)
        _put_in_place(part, target, old)
        _write_out(target.parent)
    finally:
        for leftover in (part, old):
            with suppress(OSError):  # the next call clears it
                _remove(leftover)


def _write_out(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not on this file system
            raise
    finally:
        os.close(descriptor)


def _write_out_all(folder: Path) -> None:
    paths = [path for path in folder.rglob("*") if path.is_dir() or path.is_file()]
    if len(paths) > _MOST_SINGLE_FILES:
        os.sync()
        return
    for path in [*paths, folder]:
        _write_out(path)


def replaced_by(part: Path) -> Path:
    """Where `landing_directory` keeps the old directory while it puts the new one in its place."""
    return part.with_name(f"{part.name}.old")


def _put_in_place(part: Path, target: Path, old: Path) -> None:
    if not target.exists():
        part.replace(target)
    elif not _exchange(part, target):
        target.replace(old)
        try:
            part.replace(target)
        except OSError:
            old.replace(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places at once; False where the system cannot."""
    renameat2: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not on this file system
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; bytes of names that are no UTF-8 are written as escapes."""
    with landing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file whole or not at all; see `as_json`."""
    return write_text(path, as_json(data) + "\n")


def as_json(data: Any) -> str:
    """Plain data as JSON, in which numbers that are not finite are null, as JSON has none.

    Args:
        data: lists, tuples, dictionaries and scalars; anything else becomes its text.
    """
    try:
        return json.dumps(data, indent=2, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def parse_json(text: str | bytes) -> Any:
    """Plain data from JSON, which may be anybody's.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a whole number that no float can hold.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"it is nested too deeply, or a number is too large ({error})") from error


def _whole(text: str) -> int:
    number = int(text)
    float(number)
    return number


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty where there is none that can be read."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
