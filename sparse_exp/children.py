"""Fresh interpreters as child processes: how they start, how they end with us, what they said last."""

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
        code: what it runs; in ``sys.argv`` it finds the file descriptor of its end, the words, and our
            ``sys.path``.
        words: for it.

    Returns:
        The process, this end of the pipe, and the file that the process prints to.
    """
    pipe, end = Pipe()
    output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who asked
    command = [sys.executable, "-c", code, str(end.fileno()), *words, *sys.path]
    with end:  # only the child may hold its end, or its death would go unseen
        process = subprocess.Popen(
            command, pass_fds=(end.fileno(),), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    return process, pipe, output


def exit_with_parent(descriptor: int) -> None:
    """End this process as soon as the other end of a pipe is closed; does not return."""
    hang_up = select.poll()
    hang_up.register(descriptor, 0)  # no events but those that are always reported
    hang_up.poll()
    os._exit(1)


def last_line(output: IO[bytes] | None) -> str:
    """What a process said last, as ``it said: ...``; empty where it said nothing."""
    if output is None:
        return ""
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return f"it said: {lines[-1].strip()[-200:]}" if lines else ""


def obituary(engine: str, code: int | None, output: IO[bytes] | None) -> str:
    """That the process of an engine died, how, and what it said last.

    Args:
        engine: its name.
        code: exit code; that of a signal is negative; None: unknown.
        output: what the process printed to.
    """
    how, said = f"signal {-code}" if code and code < 0 else f"exit code {code}", last_line(output)
    return f"The process of the engine {engine} died ({how}{', ' if said else ''}{said})."
