"""Fresh interpreters as child processes: starting one, ending with the parent, and saying how one ended."""

from __future__ import annotations

import multiprocessing
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

_LONGEST_LINE = 2000  # bytes; the rest of a longer one counts as the next line
_SECONDS_AFTER_ITS_END = 1.0  # for what a process said last; one of its own children may hold the pipe longer
_SECONDS_BETWEEN_LOOKS = 0.5  # at a parent

Told = Callable[[str], None]


class Output:
    """What a process prints, read as it comes; however much it is, only the last line is kept.

    Args:
        told: called with each line that is not empty, in a thread of its own.

    Attributes:
        end: file descriptor that the process prints to; whoever has started the process closes it.
    """

    def __init__(self, told: Told | None = None) -> None:
        source, self.end = os.pipe()
        self._told, self._last = told, ""
        self._thread = threading.Thread(target=self._read, args=(source,), daemon=True, name="output")
        self._thread.start()

    def last_line(self) -> str:
        """The last line that the process printed, once it has ended; empty where there is none."""
        self.close()
        return self._last

    def close(self) -> None:
        """Wait until all is read, which is soon after the process has ended."""
        self._thread.join(_SECONDS_AFTER_ITS_END)

    def _read(self, source: int) -> None:
        with os.fdopen(source, "rb") as stream:
            for part in iter(partial(stream.readline, _LONGEST_LINE), b""):
                if line := part.decode(errors="replace").strip():
                    self._last = line
                    if self._told:
                        with suppress(Exception):  # whatever that does, the process must not wait for it
                            self._told(line)


def start_child(
    code: str, *words: str, told: Told | None = None
) -> tuple[subprocess.Popen[bytes], Connection[Any, Any], Output]:
    """Start a fresh interpreter at the other end of a pipe.

    Args:
        code: Python code that it runs. ``sys.argv[1:]`` holds the file descriptor of its end of the pipe, the
            words, and this process's ``sys.path``.
        words: arguments for the code.
        told: see `Output`.

    Returns:
        The process, this end of the pipe, and what the process prints. The caller closes both.
    """
    process, (pipe,), output = start_process([sys.executable, "-c", code], *words, *sys.path, told=told)
    return process, pipe, output


def start_process(
    command: Sequence[str],
    *words: str,
    pipes: int = 1,
    files: Sequence[int] = (),
    told: Told | None = None,
) -> tuple[subprocess.Popen[bytes], list[Connection[Any, Any]], Output]:
    """Start a program at the other end of pipes.

    Args:
        command: the program, and its arguments before those that are added: the file descriptors of its ends
            of the pipes, joined by commas, and the words.
        words: its arguments after those.
        pipes: how many.
        files: file descriptors that it has, too.
        told: see `Output`.

    Returns:
        The process, this end of each pipe, and what the process prints. The caller closes all.

    Raises:
        OSError: the program cannot be started.
    """
    pairs = [Pipe() for _ in range(pipes)]
    descriptors = [end.fileno() for _, end in pairs]
    output = Output(told)
    try:
        process = subprocess.Popen(
            [*command, ",".join(map(str, descriptors)), *words],
            pass_fds=[*descriptors, *files], stdin=subprocess.DEVNULL, stdout=output.end, stderr=output.end,
        )  # fmt: skip
    finally:
        os.close(output.end)
        for _, end in pairs:  # only the child may hold its ends, or nobody would notice its death
            end.close()
    return process, [pipe for pipe, _ in pairs], output


def exit_with_parent(descriptor: int) -> None:
    """Wait until the other end of a pipe is closed, then end this process; never returns.

    Args:
        descriptor: file descriptor of this process's end of the pipe.
    """
    hang_up = select.poll()
    hang_up.register(descriptor, 0)  # no events but those that are always reported
    hang_up.poll()
    os._exit(1)


@cache
def end_when_orphaned() -> None:
    """In a process of a pool, such as joblib's: end it when whoever made the pool has ended, however.

    Such a process waits for its next task, or goes on with the one that it has, when its parent was killed.
    """
    if parent := multiprocessing.parent_process():
        args = (parent.pid,)
        threading.Thread(target=_end_with_parent, args=args, daemon=True, name="orphan").start()


def _end_with_parent(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def how_it_ended(code: int | None, output: Output | None) -> str:
    """How a process ended and the last line that it printed, such as ``exit code 1, it said: ...``.

    Args:
        code: exit code; a negative one is the number of a signal; None: unknown.
        output: what the process printed; None: unknown.
    """
    how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
    line = output.last_line() if output else ""
    return f"{how}, it said: {line[-200:]}" if line else how


def obituary(engine: str, code: int | None, output: Output | None) -> str:
    """A sentence that the process of an engine died, and how.

    Args:
        engine: its name.
        code: see `how_it_ended`.
        output: see `how_it_ended`.
    """
    return f"The process of the engine {engine} died ({how_it_ended(code, output)})."
