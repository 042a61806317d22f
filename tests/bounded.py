"""Run what may never end, or take all memory, in a process that is killed then."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path


def outcome(action: Callable[[], object], *, seconds: float = 60, memory: int = 10**9) -> str:
    """How a call ends in a forked process: ``returned``, the error's class and text, or that it does not.

    Args:
        action: the call.
        seconds: after which it is killed.
        memory: bytes that it may take beyond those that this process has.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            action()
            said = "returned"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(theirs)
    try:
        if not select.select([ours], [], [], seconds)[0]:
            return "does not end"
        return os.read(ours, 4000).decode(errors="replace") or "died"
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
