"""Fresh interpreters as child processes: starting one, ending with the parent, and saying how one ended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
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
    pipe, end = Pipe()
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    command = [sys.executable, "-c", code, str(end.fileno()), *words, *sys.path]
    with end:  # only the child may hold its end, or nobody would notice its death
        process = subprocess.Popen(
            command, pass_fds=(end.fileno(),), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    return process, pipe, output


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
