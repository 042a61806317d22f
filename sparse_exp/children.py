"""Fresh interpreters as child processes: starting one, ending with the parent, and saying how one ended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any


def start_child(code: str, *words: str) -> tuple[subprocess.Popen[bytes], Connection[Any, Any], IO[bytes]]:
    """Start a fresh interpreter at the other end of a pipe.

    Args:
        code: Python code that it runs. ``sys.argv[1:]`` holds the file descriptor of its end of the pipe, the
            words, and this process's ``sys.path``.
        words: arguments for the code.

    Returns:
        The process, this end of the pipe, and the file that the process prints to. The caller closes both.
    """
    process, (pipe,), output = start_process([sys.executable, "-c", code], *words, *sys.path)
    return process, pipe, output


def start_process(
    command: Sequence[str], *words: str, pipes: int = 1, files: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], list[Connection[Any, Any]], IO[bytes]]:
    """Start a program at the other end of pipes.

    Args:
        command: the program, and its arguments before those that are added: the file descriptors of its ends
            of the pipes, joined by commas, and the words.
        words: its arguments after those.
        pipes: how many.
        files: file descriptors that it has, too.

    Returns:
        The process, this end of each pipe, and the file that the process prints to. The caller closes all.

    Raises:
        OSError: the program cannot be started.
    """
    pairs = [Pipe() for _ in range(pipes)]
    descriptors = [end.fileno() for _, end in pairs]
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        process = subprocess.Popen(
            [*command, ",".join(map(str, descriptors)), *words],
            pass_fds=[*descriptors, *files], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    finally:
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


def how_it_ended(code: int | None, output: IO[bytes] | None) -> str:
    """How a process ended and the last line that it printed, such as ``exit code 1, it said: ...``.

    Args:
        code: exit code; a negative one is the number of a signal; None: unknown.
        output: the file that the process printed to; None: unknown.
    """
    how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
    if output is None:
        return how
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return f"{how}, it said: {lines[-1].strip()[-200:]}" if lines else how


def obituary(engine: str, code: int | None, output: IO[bytes] | None) -> str:
    """A sentence that the process of an engine died, and how.

    Args:
        engine: its name.
        code: see `how_it_ended`.
        output: see `how_it_ended`.
    """
    return f"The process of the engine {engine} died ({how_it_ended(code, output)})."
