"""DeepSparse at work, in a process of its own and most often in an environment of its own.

This file is run by its path, by an interpreter (3.8 to 3.11) that has DeepSparse and NumPy and nothing of
this project. So it imports nothing else; `sparse_exp.engines.timing` is read from beside it. Its arguments
are the file descriptors of pipes and of the memory of each (`Channel`), joined by commas, and the CPUs that
the process keeps to, likewise.

On the first channel it answers questions (`Worker`), on each of the others it runs batches. Arrays travel as
their bytes: a pickled array of NumPy 2 cannot be read by NumPy 1. In memory, since a pipe takes 25 ms for the
predictions of 80 classes at 640 px. The parent imports this file for `Channel`.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - 3.8 cannot subscript that of collections.abc

import numpy as np

_BIND = "NM_BIND_THREADS_TO_CORES"
# DeepSparse imports these if it can, for functions that are not used here: 3 seconds and hundreds of MB.
_NOT_NEEDED = ("torch", "matplotlib", "matplotlib.pyplot")

Pipe = Any  # Connection[Any, Any], which Python 3.8 cannot write


class Channel:
    """A pipe to another process for plain data, and memory that both see for arrays.

    One process asks, the other answers; so a message may lie where the one before it lay.

    Args:
        pipe: this process's end.
        memory: file descriptor of a file in memory, the same at both ends; it grows with what is sent.
    """

    def __init__(self, pipe: Pipe, memory: int) -> None:
        self._pipe, self._memory = pipe, memory
        self._bytes = np.empty(0, np.uint8)

    def send(self, message: Any, arrays: Sequence[np.ndarray] = ()) -> None:
        """Send plain data and arrays."""
        arrays = [np.ascontiguousarray(array) for array in arrays]
        place = self._mapped(sum(array.nbytes for array in arrays))
        for array in arrays:
            place[: array.nbytes] = array.reshape(-1).view(np.uint8)
            place = place[array.nbytes :]
        self._pipe.send((message, [(array.dtype.str, array.shape) for array in arrays]))

    def receive(self) -> tuple[Any, list[np.ndarray]]:
        """What the process at the other end has sent; the arrays are copies.

        Raises:
            EOFError: it has closed its end.
        """
        message, kinds = self._pipe.recv()
        arrays = [np.empty(shape, dtype) for dtype, shape in kinds]
        place = self._mapped(sum(array.nbytes for array in arrays))
        for array in arrays:
            array.reshape(-1).view(np.uint8)[:] = place[: array.nbytes]
            place = place[array.nbytes :]
        return message, arrays

    def close(self) -> None:
        """Close both."""
        self._pipe.close()
        os.close(self._memory)

    def _mapped(self, size: int) -> np.ndarray:
        """The memory, at least of that size."""
        if size > len(self._bytes):
            if os.fstat(self._memory).st_size < size:
                os.ftruncate(self._memory, size)
            self._bytes = np.frombuffer(mmap.mmap(self._memory, 0), np.uint8)
        return self._bytes


class Worker:
    """The engine, as the parent asks for it: each public method is a question.

    Plain data and a list of arrays come in, plain data goes out.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self._engine: Any = None
        self._lanes = threading.Semaphore()

    def library(self, _: Sequence[np.ndarray]) -> str:
        """Import DeepSparse; returns its version."""
        import deepsparse

        self._library = deepsparse
        return str(deepsparse.__version__)

    def compile(self, _: Sequence[np.ndarray], *, bind: bool, streams: int, **settings: Any) -> float:
        """Compile a model; returns the share of its operators that have optimized code, 0..1."""
        os.environ[_BIND] = str(int(bind))  # read when an engine is made
        self._lanes = threading.Semaphore(streams)
        self._engine = self._library.Engine(num_streams=streams, **settings)
        return float(self._engine.fraction_of_supported_ops)

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Run a whole batch: uint8 (N, 3, H, W)."""
        with self._lanes:
            outputs: list[np.ndarray] = self._engine.run([images])
        return outputs

    def measure(self, arrays: Sequence[np.ndarray], *, batch_size: int, **settings: Any) -> tuple[Any, ...]:
        """Time batches of the images; returns the fields of a `Timing`."""
        timing = _timing()
        batches = timing.batches_of(arrays[0], batch_size)
        time = timing.time_engine(self, batches, **settings)
        return time.latencies, time.wall, time.warmed, time.stable, time.waited

    def profile(self, arrays: Sequence[np.ndarray], **settings: Any) -> list[tuple[str, str, float]]:
        """The layers by the library's own analysis: its name, the node's name, and milliseconds of each."""
        found = self._library.model_debug_analysis(inp=list(arrays), **settings)
        return [time for layer in found["layer_info"] for time in _times(layer)]


def _times(layer: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Names and milliseconds of a layer, or of each of its sublayers."""
    if layer["sub_layer_info"]:
        return [time for inner in layer["sub_layer_info"] for time in _times(inner)]
    return [(str(layer["name"]), str(layer["canonical_name"]), float(layer["average_run_time_in_ms"]))]


def _timing() -> Any:
    """The module ``timing`` beside this file. On the path, the folder would hide the library's name."""
    spec: Any = importlib.util.spec_from_file_location("timing", Path(__file__).with_name("timing.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["timing"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


Respond = Callable[[Any, "list[np.ndarray]"], "tuple[Any, Sequence[np.ndarray]]"]


def serve(channel: Channel, respond: Respond) -> None:
    """Answer what comes until the other end is closed: ("value", value), or an error's class and text."""
    while True:
        try:
            message, arrays = channel.receive()
        except EOFError:
            return
        try:
            value, outputs = respond(message, arrays)
        except Exception as error:
            kinds = (kind.__name__ for kind in (ImportError, OSError) if isinstance(error, kind))
            channel.send((next(kinds, type(error).__name__), str(error)))
        else:
            channel.send(("value", value), outputs)


def main() -> None:
    """Answer until the parent is gone."""
    descriptors, memories, cpus = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt
    if cpus:  # before threads are started, which keep to the CPUs that the process had at that moment
        os.sched_setaffinity(0, map(int, cpus.split(",")))
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")  # read when the library is imported
    sys.modules.update(dict.fromkeys(_NOT_NEEDED))  # type: ignore[arg-type]
    pipes = [Connection(int(descriptor)) for descriptor in descriptors.split(",")]
    first, *others = (Channel(pipe, int(one)) for pipe, one in zip(pipes, memories.split(",")))  # noqa: B905
    worker = Worker()

    def answer(message: Any, arrays: list[np.ndarray]) -> tuple[Any, Sequence[np.ndarray]]:
        method, settings = message
        return getattr(worker, method)(arrays, **settings), ()

    def run(_: Any, arrays: list[np.ndarray]) -> tuple[Any, Sequence[np.ndarray]]:
        return None, worker.run(arrays[0])

    for channel, respond in [(first, answer), *((other, run) for other in others)]:
        threading.Thread(target=serve, args=(channel, respond), daemon=True).start()
    hang_up = select.poll()
    hang_up.register(pipes[0].fileno(), 0)  # no events but those that are always reported
    hang_up.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
