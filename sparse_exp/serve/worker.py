"""The detector in a process of its own, which can crash without the service.

Inference and non-maximum suppression both happen there: what comes back are detections, some hundred
bytes, and not predictions, some megabytes. And this process, which reads requests and decodes images,
needs neither torch nor the runtime.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import IO, Any

from sparse_exp.children import exit_with_parent, obituary, start_child
from sparse_exp.data.letterbox import Letterbox
from sparse_exp.engines.isolated import answer, error_of
from sparse_exp.errors import EngineError, first_line
from sparse_exp.predict.models import Model
from sparse_exp.serve.batching import Detections, Square

_log = logging.getLogger(__name__)
# Signals that are meant for the service reach its whole process group; it ends this process itself.
_CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = sys.argv[2:]
from sparse_exp.serve.worker import work
work(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class DetectorSettings:
    """How a detector is loaded; see `sparse_exp.predict.detector.Detector`."""

    batch_size: int = 1
    cores: int | None = None
    streams: int = 1
    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300


class WorkerDied(EngineError):
    """The process of the detector ended under a request."""


class Worker:
    """A detector in a child process, for coroutines of one event loop.

    Args:
        model: what to load.
        settings: how.

    Attributes:
        version: of the engine; empty until `start`.
        names: of the classes; empty until `start`.
        died: set when the child has ended, however that came.
        obituary: how it ended, one line; empty until then.
    """

    def __init__(self, model: Model, settings: DetectorSettings) -> None:
        self._model, self._settings = model, settings
        self.version, self.names, self.died, self.obituary = "", tuple[str, ...](), asyncio.Event(), ""
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._output: IO[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._sending = ThreadPoolExecutor(1, "send")

    async def start(self) -> None:
        """Start the child; when this returns it has loaded the model and run it once.

        Raises:
            EngineError: the engine cannot run the model here; also when the child died.
            MissingDependency: the engine is not installed.
        """
        try:
            self._process, self._pipe, self._output = start_child(_CHILD)
            arguments = (asyncio.get_running_loop(), self._pipe)
            listener = threading.Thread(target=self._listen, args=arguments, daemon=True)
            listener.start()
            self._listener = listener
        except (OSError, RuntimeError) as error:
            do = "Free memory, processes or open files."
            raise EngineError(f"Cannot start a process for the engine: {first_line(error)}. {do}") from error
        self.version, self.names = await self._ask((self._model, asdict(self._settings)))

    async def detect(self, squares: Sequence[Square], boxes: Sequence[Letterbox]) -> list[Detections]:
        """See `sparse_exp.predict.detector.Detector.detect`.

        Raises:
            WorkerDied: the child ended before it answered.
            EngineError: the engine failed.
        """
        detections: list[Detections] = await self._ask((list(squares), list(boxes)))
        return detections

    def kill(self) -> None:
        """End the child, as if it had died."""
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """End the child; it is gone when this returns. Closing twice does nothing."""
        process, pipe, output, listener = self._process, self._pipe, self._output, self._listener
        self._process = self._pipe = self._output = self._listener = None
        self._sending.shutdown(wait=False)
        if process and pipe and output:
            process.kill()  # it has nothing to save, and may be deep in native code
            process.wait()
            if listener:
                listener.join(1.0)  # or it might read from whatever gets the pipe's number next
            pipe.close()
            output.close()

    async def _ask(self, question: tuple[Any, ...]) -> Any:
        pipe, number, loop = self._pipe, next(self._numbers), asyncio.get_running_loop()
        if pipe is None or self.died.is_set():
            raise WorkerDied(self.obituary)
        future = self._answers[number] = loop.create_future()
        try:
            with suppress(OSError):  # the listener sees the end, too, and says so
                await loop.run_in_executor(self._sending, pipe.send, (number, *question))
            return await future
        finally:
            future.cancel()  # given up before it was sent whole: nobody waits for it any more

    def _listen(self, loop: asyncio.AbstractEventLoop, pipe: Connection[Any, Any]) -> None:
        """In a thread of its own: pass answers on until the child has no more."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            with suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    loop.call_soon_threadsafe(self._settle, *pipe.recv())
            loop.call_soon_threadsafe(self._bury)

    def _settle(self, number: int, kind: str, value: Any) -> None:
        future = self._answers.pop(number)
        if future.done():  # given up
            return
        if kind == "value":
            future.set_result(value)
        else:
            future.set_exception(error_of(kind, value))

    def _bury(self) -> None:
        code = _exit_code(self._process) if self._process else None
        self.obituary = obituary(self._model.engine, code, self._output)
        self.died.set()
        error = WorkerDied(self.obituary)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._answers.clear()


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:  # it hung up, and yet goes on
        process.kill()
        return process.wait()


def work(descriptor: int) -> None:
    """The child's side: load a detector, then answer until the parent closes the pipe.

    Args:
        descriptor: file descriptor of the child's end of the pipe.
    """
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    sending = threading.Lock()

    def reply(number: int, action: Any, *arguments: Any) -> None:
        kind, value = answer("The engine", action, *arguments)
        with sending:
            pipe.send((number, kind, value))

    number, model, settings = pipe.recv()
    detectors: list[Any] = []
    reply(number, _load, detectors, model, settings)
    with ThreadPoolExecutor(settings["streams"]) as threads:
        while True:
            try:
                number, squares, boxes = pipe.recv()
            except EOFError:
                return
            threads.submit(reply, number, detectors[0].detect, squares, boxes)


def _load(detectors: list[Any], model: Model, settings: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    import torch

    from sparse_exp.predict.detector import Detector

    if model.engine != "torch":
        torch.set_num_threads(1)  # non-maximum suppression is small, and its threads would hinder the engine
    detector = Detector(model, **settings)  # which has run once, suppression included, when it is made
    detectors.append(detector)
    return detector.version, detector.names
