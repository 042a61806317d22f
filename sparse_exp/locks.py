"""Locks between processes: who works on what, and who has this host to himself.

The kernel keeps them (``flock``) and drops them with their holder, however that ends; a child that this
process starts does not keep them alive.

Two kinds:

- `exclusive`: one process at a time. There are three, taken in this order and never in another: that of a
  run's directory (`sparse_exp.runs.directory.locked`), that of a dense baseline
  (`sparse_exp.stages.baseline`), and that of a stage which jobs share (`sparse_exp.stages.sharing`).
- The host: many may work on it (`working`), or one may measure (`measuring_alone`). Who wants to measure
  closes the turnstile, so that nobody begins to work, and waits until the room behind it is empty. Work
  looks at the turnstile every now and then (`give_way`), leaves the room, and comes back after the
  measurement.

Why nobody waits for ever: who measures holds no exclusive lock but that of its own run, which nobody waits
for who holds anything, and takes none meanwhile. So measurements end. Who waits for an exclusive lock is
not in the room (`aside`), so that no measurement waits for it. What is left are processes that wait for
each other's exclusive locks, and these are taken in one order.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sparse_exp.errors import ConfigError, EngineError, expected

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BEFORE_A_LINE = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_LONGEST_COMMAND = 120
_PATIENCE = 0.5  # seconds that a lock may be busy because somebody looks whether it is free


@dataclass
class _Process:
    """What this process holds: it counts for all that happens in it.

    Attributes:
        held: for each `exclusive` lock its descriptor and how often it was taken.
        depth: how often `working` was entered.
        doors: descriptors of turnstile and room while this process is in the room.
        measuring: those while it has the host to itself.
        waited: seconds in all.
        warned: of locks that do not work here.
    """

    held: dict[Path, tuple[int, int]] = field(default_factory=dict)
    depth: int = 0
    doors: tuple[int, int] | None = None
    measuring: tuple[int, ...] = ()
    waited: float = 0.0
    warned: bool = False


_process = _Process()


def _forget() -> None:
    """In a forked child: the locks are its parent's, and end with it."""
    locks = [lock for lock, _ in _process.held.values()]
    for descriptor in [*locks, *(_process.doors or ()), *_process.measuring]:
        with suppress(OSError):
            os.close(descriptor)
    _process.held, _process.depth, _process.doors, _process.measuring = {}, 0, None, ()


os.register_at_fork(after_in_child=_forget)


def waited_seconds() -> float:
    """Seconds that this process has waited for locks so far: to be taken off what it took to work."""
    return _process.waited


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool = True, label: str = "") -> Iterator[None]:
    """Hold the lock of a file while the block runs; the file is there only meanwhile.

    A process that holds it already takes it again.

    Args:
        path: of the file; its directory is made.
        what: what somebody else does, as the beginning of a sentence: "The run X is being worked on".
        wait: wait for whoever holds it, with a line in the log now and then.
        label: who this is, before the number of the process; shown to those who wait.

    Raises:
        ConfigError: somebody else holds it, and ``wait`` is off.
        OSError: the file cannot be made.
    """
    path = path.absolute()
    descriptor, depth = _process.held.get(path) or (_acquired(path, what, wait=wait), 0)
    if depth == 0:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{label} ({_me()})".encode() if label else _me().encode(), 0)
    _process.held[path] = descriptor, depth + 1
    try:
        yield
    finally:
        _release(path)


def _me() -> str:
    return f"process {os.getpid()} on {platform.node() or 'this host'}"


def _release(path: Path) -> None:
    descriptor, depth = _process.held.get(path, (-1, 0))
    if depth > 1:
        _process.held[path] = descriptor, depth - 1
    elif depth == 1:  # 0 in a forked child
        del _process.held[path]
        with suppress(OSError):
            path.unlink()  # before it is free: who waits for this file then sees that it is another's
        os.close(descriptor)


def _acquired(path: Path, what: str, *, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_shared(path)
        except FileNotFoundError:  # let go of just now
            continue
        try:
            if not _try(descriptor, fcntl.LOCK_EX):
                _wait_for(descriptor, what, wait=wait)
            if _is_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int, what: str, *, wait: bool) -> None:
    def line(*, last: bool = False) -> str:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        return f"{what} by {holder}{'. Wait for it to end.' if last else '; waiting for it to end.'}"

    if wait:
        with aside():
            _obtain(descriptor, fcntl.LOCK_EX, line)
    elif not _obtain(descriptor, fcntl.LOCK_EX, line, patience=_PATIENCE):
        raise ConfigError(line(last=True))


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Whether somebody, perhaps this process, holds the `exclusive` lock of a file."""
    if path.absolute() in _process.held:
        return True
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # another user's
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def open_shared(path: Path) -> int:
    """Open a lock's file, made for all users if it is not there; returns the descriptor.

    (filelock would open it with ``O_CREAT``, which Linux refuses for another user's file in a sticky
    directory such as /tmp, and would empty it, where it stands who holds it.)
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    os.fchmod(descriptor, 0o666)  # whatever the umask says
    return descriptor


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some file systems know no locks
        _warn(f"Files cannot be locked here ({error.strerror}): do not start the same run twice.")
    return True


def _warn(message: str) -> None:
    if not _process.warned:
        _process.warned = True
        _log.warning(message)


def _obtain(descriptor: int, kind: int, line: Callable[[], str], patience: float = float("inf")) -> bool:
    """Wait for a lock; False where it took longer than ``patience`` seconds."""
    started, next_line = time.monotonic(), _SECONDS_BEFORE_A_LINE
    try:
        while not _try(descriptor, kind):
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
    """The turnstile that all users of this host share, in the directory for temporary files."""
    return Path(tempfile.gettempdir()) / "sparse_exp-benchmark.lock"


def _room_path(turnstile: Path) -> Path:
    return turnstile.with_name(f"{turnstile.stem}-room{turnstile.suffix}")


@contextmanager
def working() -> Iterator[None]:
    """Heavy work, which would spoil a measurement: it begins when none runs, and gives way to others later.

    Blocks within blocks are one. Where the lock's files cannot be opened, a warning says so and work goes on.
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
    """Let a benchmark that waits for this host go first; to be called often while at work.

    Costs some microseconds where none waits. Nothing happens outside of `working`.
    """
    if _process.doors is None:
        return
    turnstile, room = _process.doors
    if _try(turnstile, fcntl.LOCK_SH):
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        return
    fcntl.flock(room, fcntl.LOCK_UN)
    _pass(turnstile, room)


@contextmanager
def aside() -> Iterator[None]:
    """Be out of the room while the block runs; does nothing where this process does no heavy work."""
    inside = _process.doors is not None
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
    _process.doors = doors
    _pass(*doors)


def _leave() -> None:
    doors, _process.doors = _process.doors, None
    for descriptor in doors or ():
        os.close(descriptor)


def _pass(turnstile: int, room: int) -> None:
    for door in (turnstile, room):
        _obtain(door, fcntl.LOCK_SH, lambda: "A benchmark has the host; waiting for it to end.")
    fcntl.flock(turnstile, fcntl.LOCK_UN)


def _open_doors(path: Path) -> tuple[int, int]:
    turnstile = open_shared(path)
    try:
        return turnstile, open_shared(_room_path(path))
    except OSError:
        os.close(turnstile)
        raise


def _measurer() -> str:
    """Who measures, for those who wait: process, since when, command."""
    command = shlex.join(sys.orig_argv).replace("\n", " ")
    short = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]} ..."
    return f"process {os.getpid()} since {time.strftime('%H:%M:%S')} ({short})"


def _those(descriptor: int) -> str:
    """Who holds a lock, in brackets, as far as the kernel tells: ``/proc/locks`` has files by inode."""
    inode = f":{os.fstat(descriptor).st_ino}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " -> " not in line]
    except OSError:
        return ""
    holders = sorted({int(words[4]) for words in locks if len(words) > 5 and words[5].endswith(inode)})
    return f" (process {', '.join(str(pid) for pid in holders)})" if holders else ""


@contextmanager
def measuring_alone(path: Path) -> Iterator[None]:
    """Have the host to oneself while the block runs: nobody else measures or does heavy work.

    Args:
        path: the turnstile; see `default_lock_path`. The room's file lies beside it.

    Raises:
        EngineError: a lock's file cannot be opened.
    """
    try:
        turnstile, room = _open_doors(path)
    except OSError as error:
        do = "Set TMPDIR to a directory that you may write to."
        raise EngineError(expected(f"the lock file {path}", "writable", error.strerror, do)) from error

    def to_pause() -> str:
        return f"Waiting for other runs on this host to pause{_those(room)}."

    def line() -> str:
        holder = os.pread(turnstile, 400, 0).decode(errors="replace") or "process unknown"
        return f"Another run on this host is measuring: {holder}; {_me()} waits for it to end."

    with aside():
        _process.measuring = turnstile, room
        try:
            _obtain(turnstile, fcntl.LOCK_EX, line)
            os.ftruncate(turnstile, 0)
            os.pwrite(turnstile, _measurer().encode(), 0)
            _obtain(room, fcntl.LOCK_EX, to_pause)
            yield
        finally:
            doors, _process.measuring = _process.measuring, ()  # none in a forked child
            for descriptor in reversed(doors):
                os.close(descriptor)
