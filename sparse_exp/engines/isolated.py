"""An engine in a child process of its own.

Engines start thread pools, pin threads to cores and can crash in native code. In a child none of
that touches the run, and no two engines touch each other.

The child is started as a fresh interpreter and not by `multiprocessing`, which would import the
parent's main module again: that may be a script without a guard, or import torch.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import cycle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparse_exp.engines.base import Engine, check_images, not_loaded, reason
from sparse_exp.errors import EngineError, MissingDependency, SparseExpError

# The interrupt belongs to the parent, which then closes its engines.
_CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[3:]
from sparse_exp.engines.isolated import serve
serve(int(sys.argv[1]), sys.argv[2])
"""


class IsolatedEngine:
    """An `Engine` in a child process; `close` ends it, and so does the end of the parent.

    Args:
        name: one of `sparse_exp.config.schema.ENGINES`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""
        self._pipe: Connection[Any, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while nothing is loaded."""
        return self._process.pid if self._process else None

    def load(self, model: Path, *, batch_size: int, cores: int) -> None:
        """See `Engine.load`. Every load starts a fresh child."""
        self.close()
        self._start()
        try:
            self.version = self._ask("load", str(model), batch_size, cores)
        except SparseExpError:
            self.close()
            raise

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """See `Engine.run`."""
        outputs: list[np.ndarray] = self._ask("run", images)
        return outputs

    def measure(self, images: np.ndarray, seconds: float, warmup: float = 0.0) -> list[float]:
        """Run batch after batch for a while, and time each in the child.

        Args:
            images: uint8 (N, 3, H, W); batches are taken from them in turn, round and round.
            seconds: how long to measure; at least one batch is.
            warmup: seconds to run before, not counted.

        Returns:
            Latency of each batch, in seconds, in order.

        Raises:
            EngineError: see `Engine.run`; also when the child died.
        """
        latencies: list[float] = self._ask("measure", images, seconds, warmup)
        return latencies

    def close(self) -> None:
        """See `Engine.close`. The child is gone when this returns."""
        process, pipe, output = self._process, self._pipe, self._output
        self._process = self._pipe = self._output = None
        if pipe:
            pipe.close()
        if process:
            process.kill()  # it has nothing to save, and may be deep in native code
            process.wait()
        if output:
            output.close()

    def _start(self) -> None:
        self._process, self._pipe, self._output = start_child(_CHILD, self.name)

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._pipe is None:
            raise EngineError(not_loaded(self.name))
        try:
            self._pipe.send((method, arguments))
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        except BaseException:  # an answer that nobody waited for must not meet the next question
            self.close()
            raise
        if kind == "value":
            return value
        raise MissingDependency(value) if kind == "MissingDependency" else EngineError(value)

    def _died(self) -> EngineError:
        code = self._process.wait() if self._process else None
        said = last_line(self._output)
        self.close()
        how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        text = f"The process of the engine {self.name} died ({how}{', ' if said else ''}{said})."
        return EngineError(f"{text} Check that memory suffices, or take it out of hardware.engines.")


def serve(descriptor: int, name: str) -> None:
    """The child's side: answer questions from the pipe until the parent closes it.

    Args:
        descriptor: file descriptor of the child's end of the pipe.
        name: engine to serve.
    """
    # DeepSparse would import torch if it could: 500 MB and seconds for nothing.
    sys.modules["torch"] = None  # type: ignore[assignment]
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    server = _Server(name)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(server.answer(method, arguments))


class _Server:
    """Turns questions into answers: ("value", value), or the error's class name and its message."""

    def __init__(self, name: str) -> None:
        self._name, self._batch_size = name, 1
        self._engine: Engine | None = None

    def answer(self, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        from sparse_exp.engines import create_engine  # which imports this module

        try:
            self._engine = self._engine or create_engine(self._name, quiet=False)
            return "value", getattr(self, method)(self._engine, *arguments)
        except SparseExpError as error:
            return type(error).__name__, str(error)
        except Exception as error:
            return "EngineError", f"The engine {self._name} failed: {reason(error)}"

    def load(self, engine: Engine, model: str, batch_size: int, cores: int) -> str:
        engine.load(Path(model), batch_size=batch_size, cores=cores)
        self._batch_size = batch_size
        return engine.version

    def run(self, engine: Engine, images: np.ndarray) -> list[np.ndarray]:
        return engine.run(images)

    def measure(self, engine: Engine, images: np.ndarray, seconds: float, warmup: float) -> list[float]:
        check_images(images)
        batches = cycle(batches_of(images, self._batch_size))
        if warmup > 0:
            _time_batches(engine, batches, warmup)
        return _time_batches(engine, batches, seconds)


def batches_of(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Full batches of (N, ...) images, each contiguous; the last is filled up from the first image.

    >>> [batch.tolist() for batch in batches_of(np.arange(3), 2)]
    [[0, 1], [2, 0]]
    """
    count = -(-len(images) // batch_size)
    indices = np.arange(count * batch_size) % len(images)
    return [np.ascontiguousarray(images[part]) for part in indices.reshape(count, batch_size)]


def _time_batches(engine: Engine, batches: Iterator[np.ndarray], seconds: float) -> list[float]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    for batch in batches:
        start = time.perf_counter()
        engine.run(batch)
        now = time.perf_counter()
        latencies.append(now - start)
        if now >= end:
            break
    return latencies


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
