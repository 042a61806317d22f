"""Locks between processes: one process on a directory, one measurement on the host.

The kernel keeps the locks (``flock``). It drops them when their holder ends, in whatever way. A child that
this process starts does not keep them alive.

There are two kinds:

- `exclusive`: one process at a time, and of its threads one at a time. Three of these locks are held for
  long. They are taken in this order and never in another: that of a run's directory
  (`sparse_exp.runs.directory.locked`), that of a dense baseline (`sparse_exp.stages.baseline`), and that of
  a stage which jobs share (`sparse_exp.stages.sharing`). The others (of a file that is being fetched, of a
  data set that is being built, of the local zoo, of the tracking store's database) are taken last: who
  holds one of them waits for nobody.
- The host: many may work on it (`working`), or one may measure (`measuring_alone`). Who wants to measure
  closes the turnstile, so that nobody begins to work, and waits until the room behind it is empty. Work
  looks at the turnstile every now and then (`give_way`), leaves the room, and comes back after the
  measurement.

No process waits for ever:

- A measurement ends, since it waits for no exclusive lock. While it lasts, its process holds one, that of its
  own run. A process that waits for this one holds no other lock.
- A process that waits for an exclusive lock is outside of the room (`work_paused`), so that no measurement
  waits for it.
- Processes that wait for each other's exclusive locks take these in one order.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import platform
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sparse_exp.errors import ConfigError, EngineError, expected

LOCKS_VARIABLE = "SPARSE_EXP_LOCKS"
"""Environment variable: directory of the host-wide lock."""

IN_DIRECTORY = ".lock"
"""Name of the file of the lock of a directory."""

_SHARED = (Path("/run/lock"), Path("/dev/shm"), Path("/tmp"))
_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BEFORE_A_LINE = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_LONGEST_COMMAND = 120
_PATIENCE = 0.5  # seconds: for so long another process may hold a lock only to see whether it is free


@dataclass
class _Process:
    """The locks of this process; all its threads share them.

    Attributes:
        held: for each `exclusive` lock and the thread that took it: descriptor, and how often it was taken.
        depth: how often `working` was entered.
        doors: descriptors of turnstile and room while this process is in the room.
        worker: the thread that does the heavy work.
        measuring: those while it has the host to itself.
        waited: seconds in all.
        warned: of locks that do not work here.
    """

    held: dict[tuple[Path, threading.Thread], tuple[int, int]] = field(default_factory=dict)
    depth: int = 0
    doors: tuple[int, int] | None = None
    worker: threading.Thread | None = None
    measuring: tuple[int, ...] = ()
    waited: float = 0.0
    warned: bool = False


_process = _Process()


def _forget_locks() -> None:
    """Close the descriptors in a forked child: the locks belong to its parent, and end with that."""
    locks = [lock for lock, _ in _process.held.values()]
    for descriptor in [*locks, *(_process.doors or ()), *_process.measuring]:
        with suppress(OSError):
            os.close(descriptor)
    _process.held, _process.depth, _process.doors, _process.measuring = {}, 0, None, ()


os.register_at_fork(after_in_child=_forget_locks)


def waited_seconds() -> float:
    """Seconds that this process has waited for locks so far; callers subtract them from their durations."""
    return _process.waited


@contextmanager
def exclusive(
    path: Path, what: str, *, wait: bool = True, at_most: float = math.inf, label: str = ""
) -> Iterator[None]:
    """Hold the lock of a file while the block runs; the file is there only meanwhile.

    A thread that holds it already takes it again. Other threads wait as other processes do.

    Args:
        path: of the file; its directory is made.
        what: what somebody else does, as the beginning of a sentence: "The run X is being worked on".
        wait: wait for whoever holds it, with a line in the log now and then.
        at_most: seconds to wait.
        label: who this is, before the number of the process; shown to those who wait.

    Raises:
        ConfigError: somebody else holds it, and ``wait`` is off or took longer than ``at_most``.
        OSError: the file cannot be made.
    """
    key = path.absolute(), threading.current_thread()
    descriptor, depth = _process.held.get(key) or (_acquire(key[0], what, wait=wait, at_most=at_most), 0)
    _process.held[key] = descriptor, depth + 1
    try:
        if depth == 0:
            with suppress(OSError):  # on a full disk it does not say who holds it
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor,
                    f"{label} ({_this_process()})".encode() if label else _this_process().encode(),
                    0,
                )
        yield
    finally:
        _release(key)


@contextmanager
def alone_in(directory: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that works in a directory while the block runs; a process may do so within itself.

    The lock's file, `IN_DIRECTORY`, is in the directory only meanwhile; a directory that was made for it and
    holds nothing at the end goes again.

    Args:
        directory: it may be about to be made.
        what: see `exclusive`.
        wait: for whoever works there, with a line in the log now and then.

    Raises:
        ConfigError: somebody works there, and ``wait`` is off.
        OSError: the directory cannot be made.
    """
    existed = directory.is_dir()
    try:
        with exclusive(directory / IN_DIRECTORY, what, wait=wait):
            yield
    finally:
        if not existed:
            with suppress(OSError):  # it holds something
                directory.rmdir()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node() or 'this host'}"


def _release(key: tuple[Path, threading.Thread]) -> None:
    descriptor, depth = _process.held.get(key, (-1, 0))
    if depth > 1:
        _process.held[key] = descriptor, depth - 1
    elif depth == 1:  # 0 in a forked child
        del _process.held[key]
        with suppress(OSError):
            key[0].unlink()  # before it is free: who waits for this file then sees that it is another's
        os.close(descriptor)


def _acquire(path: Path, what: str, *, wait: bool, at_most: float) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_shared(path)
        except FileNotFoundError:  # its holder removed it just now
            continue
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                _wait_for(descriptor, what, wait=wait, at_most=at_most)
            if _is_in_place(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int, what: str, *, wait: bool, at_most: float) -> None:
    def held() -> str:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        return f"{what} by {holder}"

    def line() -> str:
        return f"{held()}; waiting for it to end."

    if not wait:
        if not _lock(descriptor, fcntl.LOCK_EX, line, _PATIENCE):
            raise ConfigError(f"{held()}. Wait for it to end.")
        return
    with work_paused():
        if not _lock(descriptor, fcntl.LOCK_EX, line, at_most):
            do = "Wait for it to end, or end it if it hangs."
            raise ConfigError(f"{held()}, for more than {at_most:g} s. {do}")


def _is_in_place(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that lies at its path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # on a network file system: gone
            return False
        raise


def is_held(path: Path) -> bool:
    """Whether somebody, perhaps this process, holds the `exclusive` lock of a file.

    Where the file system has no locks, somebody may, as long as the file is there.
    """
    if any(held == path.absolute() for held, _ in list(_process.held)):
        return True
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # it belongs to another user
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH, without_locks=False)
    finally:
        os.close(descriptor)


def open_shared(path: Path) -> int:
    """Open the file of a lock, and make it for all users if it is not there; returns the descriptor.

    A file that is there is opened without ``O_CREAT``, which Linux refuses for another user's file in a
    sticky directory such as /tmp. It is not emptied: it says who holds the lock.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(path, flags)
    os.fchmod(descriptor, 0o666)  # whatever the umask says
    return descriptor


def _try_lock(descriptor: int, kind: int, *, without_locks: bool = True) -> bool:
    """Lock a file if it is free; where the file system has no locks, warn and return ``without_locks``."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # on a network file system: gone, which `_is_in_place` sees
            return True
        # Some file systems know no locks.
        _warn(f"Files cannot be locked here ({error.strerror}): do not start the same run twice.")
        return without_locks
    return True


def _warn(message: str) -> None:
    if not _process.warned:
        _process.warned = True
        _log.warning(message)


def _lock(descriptor: int, kind: int, line: Callable[[], str], patience: float = math.inf) -> bool:
    """Wait for a lock; False where it took longer than ``patience`` seconds."""
    started, next_line = time.monotonic(), _SECONDS_BEFORE_A_LINE
    try:
        while not _try_lock(descriptor, kind):
            waited = time.monotonic() - started
            if waited >= patience:
                return False
            if waited >= next_line:
                next_line = waited + _SECONDS_BETWEEN_LINES
                _log.info(line())
            time.sleep(_SECONDS_BETWEEN_TRIES)
        return True
    finally:
        _process.waited += time.monotonic() - started


def default_lock_path() -> Path:
    """The turnstile that all users of this host share, in a directory that all may write to.

    It does not follow TMPDIR, which jobs and services of one host have different values of.
    `LOCKS_VARIABLE` names another directory, for containers that share one.
    """
    places = [Path(given)] if (given := os.environ.get(LOCKS_VARIABLE)) else _SHARED
    folder = next((place for place in places if _is_shared(place)), places[-1])
    return folder / "sparse_exp-benchmark.lock"


def _is_shared(folder: Path) -> bool:
    """Whether all users may write to a directory, each to files of its own (as to /tmp)."""
    try:
        return stat.S_IMODE(folder.stat().st_mode) == 0o1777
    except OSError:
        return False


@contextmanager
def working() -> Iterator[None]:
    """Do heavy work in the block, which would spoil a measurement. It begins when no measurement runs.

    Measurements that come later wait for `give_way`. A block within another changes nothing. Where the lock's
    files cannot be opened, a warning is logged and the work goes on.
    """
    _process.depth += 1
    try:
        if _process.depth == 1:
            _enter()
        yield
    finally:
        _process.depth -= 1
        if _process.depth == 0:
            _leave()


def give_way() -> None:
    """Let a measurement that waits for this host go first; heavy work calls this often.

    It takes some microseconds where no measurement waits, and does nothing outside of `working`.
    """
    if _process.doors is None:
        return
    turnstile, room = _process.doors
    if _try_lock(turnstile, fcntl.LOCK_SH):
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        return
    fcntl.flock(room, fcntl.LOCK_UN)
    _pass_turnstile(turnstile, room)


@contextmanager
def work_paused() -> Iterator[None]:
    """Be out of the room while the block runs; does nothing in a thread that does no heavy work."""
    inside = _process.doors is not None and _process.worker is threading.current_thread()
    if inside:
        _leave()
    yield  # where it raises, the work is over: coming back might wait for long
    if inside:
        _enter()


def _enter() -> None:
    path = default_lock_path()
    try:
        doors = _open_doors(path)
    except OSError as error:
        _warn(f"{path} cannot be opened ({error.strerror}): this run does not pause while others measure.")
        return
    _process.doors, _process.worker = doors, threading.current_thread()
    _pass_turnstile(*doors)


def _leave() -> None:
    doors, _process.doors = _process.doors, None
    for descriptor in doors or ():
        os.close(descriptor)


def _pass_turnstile(turnstile: int, room: int) -> None:
    for door in (turnstile, room):
        _lock(door, fcntl.LOCK_SH, lambda: "A benchmark has the host; waiting for it to end.")
    fcntl.flock(turnstile, fcntl.LOCK_UN)


def _open_doors(path: Path) -> tuple[int, int]:
    """Open the files of turnstile and room; returns their descriptors."""
    turnstile = open_shared(path)
    try:
        return turnstile, open_shared(path.with_name(f"{path.stem}-room{path.suffix}"))
    except OSError:
        os.close(turnstile)
        raise


def _measurer() -> str:
    """This process as those who wait for its measurement see it: id, start and command."""
    command = shlex.join(sys.orig_argv).replace("\n", " ")
    short = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]} ..."
    return f"process {os.getpid()} since {time.strftime('%H:%M:%S')} ({short})"


def _holders(descriptor: int) -> str:
    """The processes that hold a lock, in brackets; empty where the kernel does not list them.

    ``/proc/locks`` lists locks by the inodes of their files.
    """
    inode = f":{os.fstat(descriptor).st_ino}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " -> " not in line]
    except OSError:
        return ""
    holders = sorted({int(words[4]) for words in locks if len(words) > 5 and words[5].endswith(inode)})
    return f" (process {', '.join(str(pid) for pid in holders)})" if holders else ""


@contextmanager
def measuring_alone(path: Path) -> Iterator[None]:
    """Have the host to oneself while the block runs: no other process measures or does heavy work.

    Args:
        path: of the turnstile; see `default_lock_path`. The room's file lies beside it.

    Raises:
        EngineError: the file of a lock cannot be opened.
    """
    try:
        turnstile, room = _open_doors(path)
    except OSError as error:
        do = f"Set {LOCKS_VARIABLE} to a directory that you may write to."
        raise EngineError(expected(f"the lock file {path}", "writable", error.strerror, do)) from error

    def others_measure() -> str:
        holder = os.pread(turnstile, 400, 0).decode(errors="replace") or "process unknown"
        return f"Another run on this host is measuring: {holder}; {_this_process()} waits for it to end."

    def others_work() -> str:
        return f"Waiting for other runs on this host to pause{_holders(room)}."

    with work_paused():
        _process.measuring = turnstile, room
        try:
            _lock(turnstile, fcntl.LOCK_EX, others_measure)
            os.ftruncate(turnstile, 0)
            os.pwrite(turnstile, _measurer().encode(), 0)
            _lock(room, fcntl.LOCK_EX, others_work)
            yield
        finally:
            doors, _process.measuring = _process.measuring, ()  # none in a forked child
            for descriptor in reversed(doors):
                os.close(descriptor)
