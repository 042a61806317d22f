"""The detector in a child process, which can crash without ending the service.

The child runs both inference and non-maximum suppression. So it sends detections back, some hundred bytes,
and not predictions, some megabytes. And the parent, which reads requests and decodes images, needs no engine.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from sparse_exp.children import Output, exit_with_parent, obituary, start_child
from sparse_exp.data.letterbox import Letterbox
from sparse_exp.engines.isolated import answer, error_of
from sparse_exp.errors import EngineError, first_line
from sparse_exp.predict.models import Model
from sparse_exp.runs.metadata import CONF, IOU
from sparse_exp.serve.batching import Detections, Square

_output_log = logging.getLogger(f"{__name__}.output")  # what the child prints
# A terminal sends its signals to all processes of the service. The service ends the child itself.
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
    conf: float = CONF
    iou: float = IOU
    max_det: int = 300
    options: dict[str, Any] = field(default_factory=dict)


class WorkerDied(EngineError):
    """The process of the detector ended before it answered."""


class Worker:
    """A detector in a child process, for coroutines of one event loop.

    Args:
        model: the model to load.
        settings: how to load it.

    Attributes:
        version: of the engine; empty until `start`.
        names: of the classes; empty until `start`.
        died: set when the child has ended, for whatever reason.
        obituary: one sentence that says how the child ended; empty until then.
    """

    def __init__(self, model: Model, settings: DetectorSettings) -> None:
        self._model, self._settings = model, settings
        self.version, self.names, self.died, self.obituary = "", tuple[str, ...](), asyncio.Event(), ""
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._output: Output | None = None
        self._listener: threading.Thread | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._sending = ThreadPoolExecutor(1, "send")

    async def start(self) -> None:
        """Start the child; when this returns the child has loaded the model and run it once.

        Raises:
            EngineError: no child can be started, it died, or the engine cannot run the model here.
            MissingDependency: the engine is not installed.
        """
        try:
            self._process, self._pipe, self._output = start_child(_CHILD, told=_output_log.info)
            arguments = (asyncio.get_running_loop(), self._pipe)
            listener = threading.Thread(target=self._listen, args=arguments, daemon=True)
            listener.start()
            self._listener = listener
        except (OSError, RuntimeError) as error:
            do = "Free memory, processes or open files."
            raise EngineError(f"Cannot start a process for the engine: {first_line(error)}. {do}") from error
        self.version, self.names = await self._ask((self._model, asdict(self._settings)))

    async def detect(self, squares: Sequence[Square], boxes: Sequence[Letterbox]) -> list[Detections]:
        """Detect the objects in prepared images; see `sparse_exp.predict.detector.Detector.detect`.

        Raises:
            WorkerDied: the child ended before it answered.
            EngineError: the engine failed.
        """
        detections: list[Detections] = await self._ask((list(squares), list(boxes)))
        return detections

    def kill(self) -> None:
        """Kill the child; `died` is set soon after."""
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """End the child and wait for its end. Closing twice does nothing."""
        process, pipe, output, listener = self._process, self._pipe, self._output, self._listener
        self._process = self._pipe = self._output = self._listener = None
        self._sending.shutdown(wait=False)
        if process and pipe and output:
            process.kill()  # it has nothing to save, and may be deep in native code
            process.wait()
            if listener:
                listener.join(1.0)  # it must not read from what gets the pipe's file descriptor next
            pipe.close()
            output.close()

    async def _ask(self, question: tuple[Any, ...]) -> Any:
        pipe, number, loop = self._pipe, next(self._numbers), asyncio.get_running_loop()
        if pipe is None or self.died.is_set():
            raise WorkerDied(self.obituary)
        future = self._answers[number] = loop.create_future()
        try:
            with suppress(OSError):  # the listener notices the child's end, and tells the future
                await loop.run_in_executor(self._sending, pipe.send, (number, *question))
            return await future
        finally:
            future.cancel()  # does nothing to an answered one; a late answer to this is thrown away

    def _listen(self, loop: asyncio.AbstractEventLoop, pipe: Connection[Any, Any]) -> None:
        """Pass the child's answers on until it has ended; runs in a thread of its own."""
        with suppress(RuntimeError):  # the event loop is closed, so nobody waits for an answer
            with suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    loop.call_soon_threadsafe(self._settle, *pipe.recv())
            loop.call_soon_threadsafe(self._fail_all)

    def _settle(self, number: int, kind: str, value: Any) -> None:
        future = self._answers.pop(number)
        if future.done():  # whoever asked has given up
            return
        if kind == "value":
            future.set_result(value)
        else:
            future.set_exception(error_of(kind, value))

    def _fail_all(self) -> None:
        """Note how the child ended, and fail every question that has no answer."""
        code = None
        if self._process:
            try:
                code = self._process.wait(1.0)
            except subprocess.TimeoutExpired:  # it has closed its pipe and yet goes on
                self._process.kill()
                code = self._process.wait()
        self.obituary = obituary(self._model.engine, code, self._output)
        self.died.set()
        error = WorkerDied(self.obituary)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._answers.clear()


def work(descriptor: int) -> None:
    """Run the child: load a detector, then answer questions until the parent closes the pipe.

    Args:
        descriptor: file descriptor of the child's end of the pipe.
    """
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    sending = threading.Lock()
    detector: Any = None

    def reply(number: int, action: Callable[..., Any], *arguments: Any) -> None:
        kind, value = answer("The engine", action, *arguments)
        with sending:
            pipe.send((number, kind, value))

    def load(model: Model, settings: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        from sparse_exp.predict.detector import Detector  # the parent imports this module, without engines

        nonlocal detector
        detector = Detector(model, **settings, quiet=False)  # runs once, suppression included
        return detector.version, detector.names

    number, model, settings = pipe.recv()
    reply(number, load, model, settings)
    with ThreadPoolExecutor(settings["streams"]) as threads:
        while True:
            try:
                number, squares, boxes = pipe.recv()
            except EOFError:
                return
            threads.submit(reply, number, detector.detect, squares, boxes)
