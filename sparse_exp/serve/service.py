"""From the images of a request to their detections; the engine is started, and started again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.data.images import read_square
from sparse_exp.data.letterbox import Letterbox
from sparse_exp.errors import DataError, SparseExpError
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.predict.models import Model
from sparse_exp.serve.batching import Batcher, Detections, Square
from sparse_exp.serve.limits import Limits, Refused, Upload, check_image
from sparse_exp.serve.metrics import Metrics
from sparse_exp.serve.worker import DetectorSettings, Worker, WorkerDied

_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 30.0  # seconds between two starts of an engine that does not start


@dataclass(frozen=True)
class Found:
    """The answer to one image.

    Attributes:
        name: of the file that was sent.
        size: width and height, px, as it is meant to be seen.
        detections: float32 (D, 6), best first: x1, y1, x2, y2 in pixels of it, confidence, class id.
        milliseconds: ``decode``; ``wait`` for decoding and for a batch; ``engine``: its batch was there.
    """

    name: str
    size: tuple[int, int]
    detections: Detections
    milliseconds: dict[str, float]


class Service:
    """A model behind a queue; all of it lives in one event loop.

    Args:
        model: what is served.
        settings: how it is loaded.
        limits: of requests.
        max_wait: seconds that an image waits at most for others to fill its batch.

    Attributes:
        metrics: what it counts.
        names: of the classes; empty until the engine has run.
        version: of the engine; empty until it has run.
        failure: why the engine could not be started the first time; None otherwise.
    """

    def __init__(self, model: Model, settings: DetectorSettings, limits: Limits, max_wait: float) -> None:
        self.model, self.settings, self.limits = model, settings, limits
        self.metrics = Metrics()
        self.names, self.version = tuple[str, ...](), ""
        self.failure: SparseExpError | None = None
        self._worker: Worker | None = None
        self._inside = 0
        self._batcher = Batcher(
            self._ask_worker,
            self.metrics,
            batch_size=settings.batch_size,
            max_wait=max_wait,
            streams=settings.streams,
        )
        self._decoding = ThreadPoolExecutor(usable_physical_cores(), "decode")

    @property
    def ready(self) -> bool:
        """Whether the engine has run, and runs."""
        return self._worker is not None

    def kill_engine(self) -> None:
        """End the process of the engine, as if it had died."""
        if self._worker:
            self._worker.kill()

    @asynccontextmanager
    async def open(
        self, on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[], None] = lambda: None
    ) -> AsyncIterator[None]:
        """Start the engine in the background; it is gone at the end.

        Args:
            on_ready: called when the engine has run for the first time.
            on_failure: called when it cannot be started; `failure` says why.
        """
        async with self._batcher.open():
            keeping = asyncio.create_task(self._keep_engine(on_ready, on_failure))
            try:
                yield
            finally:
                keeping.cancel()
                with suppress(asyncio.CancelledError):
                    await keeping
                self._decoding.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Room for one request.

        Raises:
            Refused: the engine is not ready, or as many requests as are allowed are being worked on.
        """
        if not self.ready:
            state = "starts again" if self.version else "is loading"
            raise Refused(503, f"The engine {state}. Send the request again in a few seconds.", 2)
        if self._inside >= self.limits.queue:
            do = "Send the request again in a second."
            raise Refused(503, f"The service is busy with {self._inside} requests. {do}", 1)
        self._inside += 1
        try:
            with self.metrics.in_service.track_inprogress():
                yield
        finally:
            self._inside -= 1

    async def detect(self, uploads: Sequence[Upload], timeout: float) -> list[Found]:
        """Detections of the images of a request, in order.

        Args:
            uploads: at least one.
            timeout: seconds that it may take.

        Raises:
            Refused: an image cannot be read, the engine died under it, or time is up.
            EngineError: the engine failed.
        """
        every = asyncio.gather(*map(self._detect_one, uploads), return_exceptions=True)
        try:
            found = await asyncio.wait_for(every, timeout)
        except TimeoutError:
            do = "Send the request again later, or start the service with a larger --timeout."
            raise Refused(503, f"No answer within {self.limits.timeout:g} s. {do}", 1) from None
        self.metrics.images.inc(sum(isinstance(one, Found) for one in found))
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if isinstance(one, Found)]

    async def _detect_one(self, upload: Upload) -> Found:
        start = time.perf_counter()
        with self.metrics.queue.track_inprogress():
            async with self._batcher.room:
                loop = asyncio.get_running_loop()
                prepare = loop.run_in_executor(self._decoding, self._prepare, upload)
                square, box, decoding = await prepare
                answer = await self._answer(square, box)
        waiting = time.perf_counter() - start - decoding - answer.engine
        times = {"decode": decoding, "wait": waiting, "engine": answer.engine}
        milliseconds = {name: round(1e3 * seconds, 3) for name, seconds in times.items()}
        return Found(upload.name, box.size, answer.detections, milliseconds)

    async def _answer(self, square: Square, box: Letterbox) -> Any:
        try:
            return await self._batcher.detect(square, box)
        except WorkerDied as error:
            raise Refused(
                503, f"{error} It starts again: send the request again in a few seconds.", 2
            ) from error

    def _prepare(self, upload: Upload) -> tuple[Square, Letterbox, float]:
        start = time.perf_counter()
        check_image(upload, self.limits)
        try:
            square, box = read_square(Path(upload.name), self.model.imgsz, upload.content)
        except DataError as error:
            raise Refused(422, str(error)) from error
        return square, box, time.perf_counter() - start

    async def _ask_worker(self, squares: Sequence[Square], boxes: Sequence[Letterbox]) -> list[Detections]:
        worker = self._worker
        if worker is None:
            raise WorkerDied("The engine is not running.")
        try:
            return await asyncio.wait_for(worker.detect(squares, boxes), self.limits.timeout)
        except TimeoutError:  # it hangs, and would for ever
            worker.kill()
            raise WorkerDied(f"The engine did not answer within {self.limits.timeout:g} s.") from None

    async def _keep_engine(self, on_ready: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Start the engine, and again whenever it has died; give up only if it never ran."""
        pause = 0.5
        while True:
            try:
                await self._run_engine(on_ready)
                pause = 0.5
            except SparseExpError as error:
                if not self.version:
                    self.failure = error
                    on_failure()
                    return
                pause = min(2 * pause, _LONGEST_PAUSE)
                _log.warning("The engine cannot be started again: %s Next try in %g s.", error, pause)
            await asyncio.sleep(pause)

    async def _run_engine(self, on_ready: Callable[[], None]) -> None:
        """From the start of the engine to its death."""
        worker = Worker(self.model, self.settings)
        try:
            await worker.start()
            first = not self.version
            self.version, self.names = worker.version, worker.names
            self.metrics.engine_starts.inc()
            self.metrics.model.info(
                {"model": self.model.origin, "engine": self.model.engine, "version": self.version}
            )
            self._worker = worker
            if first:
                on_ready()
            await worker.died.wait()
            _log.warning("%s It is started again.", worker.obituary)
        finally:
            self._worker = None
            worker.close()
