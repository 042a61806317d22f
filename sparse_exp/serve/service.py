"""The service behind the HTTP side: detections for the images of a request, and an engine kept running."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparse_exp.data.images import read_square
from sparse_exp.data.letterbox import Letterbox
from sparse_exp.errors import DataError, SparseExpError
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.predict.models import Model
from sparse_exp.serve.batching import Batcher, Detections, Square
from sparse_exp.serve.limits import Budget, Limits, Refused
from sparse_exp.serve.metrics import Metrics
from sparse_exp.serve.uploads import Upload, check_images
from sparse_exp.serve.worker import DetectorSettings, Worker, WorkerDied

_log = logging.getLogger(__name__)
_DECODERS = 4  # threads at most: each holds an image, and the engine needs the cores, too
_LONGEST_PAUSE = 30.0  # seconds, before an engine that cannot be started is started again


@dataclass(frozen=True)
class ImageResult:
    """The detections in one image, and how long they took.

    Attributes:
        name: of the file that was sent.
        size: width and height of the upright image, px.
        detections: float32 (D, 6), best first: x1, y1, x2, y2 in pixels of the image, confidence, class id.
        milliseconds: ``decode``, decoding and letterboxing; ``wait``, waiting for both and for a batch;
            ``engine``, the image's batch in the engine.
    """

    name: str
    size: tuple[int, int]
    detections: Detections
    milliseconds: dict[str, float]


class Service:
    """A model in an engine, for the requests of one event loop.

    Args:
        model: the model to serve.
        settings: how it is loaded.
        limits: bounds on requests.
        max_wait: most seconds that an image waits for others to fill its batch.

    Attributes:
        draining: whether the service is about to end; it still answers.
        metrics: the counters.
        names: of the classes; empty until the engine has run.
        version: of the engine; empty until it has run.
        failure: why the engine could not be started the first time; None otherwise.
    """

    def __init__(self, model: Model, settings: DetectorSettings, limits: Limits, max_wait: float) -> None:
        self.model, self.settings, self.limits = model, settings, limits
        self.metrics = Metrics()
        self.names, self.version = tuple[str, ...](), ""
        self.failure: SparseExpError | None = None
        self.draining = False
        self._worker: Worker | None = None
        self._admitted = self._received = 0
        self._pixels = Budget(limits.max_pixels)  # of images that are being decoded
        self._batcher = Batcher(
            self._ask_worker,
            self.metrics,
            batch_size=settings.batch_size,
            max_wait=max_wait,
            streams=settings.streams,
        )
        self._decoding = ThreadPoolExecutor(min(_DECODERS, usable_physical_cores()), "decode")

    @property
    def ready(self) -> bool:
        """Whether the engine has run once, and is running."""
        return self._worker is not None

    def kill_engine(self) -> None:
        """Kill the engine's process; the service notices that as it notices a crash."""
        if self._worker:
            self._worker.kill()

    @asynccontextmanager
    async def open(
        self, on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[], None] = lambda: None
    ) -> AsyncIterator[None]:
        """Run the engine in the background while this context is open.

        Args:
            on_ready: called when the engine has run for the first time.
            on_failure: called when the engine cannot be started the first time; `failure` says why.
        """
        async with self._batcher.open():
            engine = asyncio.create_task(self._keep_engine(on_ready, on_failure))
            try:
                yield
            finally:
                engine.cancel()
                with suppress(asyncio.CancelledError):
                    await engine
                self._decoding.shutdown(wait=False, cancel_futures=True)

    def require_room(self) -> None:
        """Refuse a request whose body is not worth reading now.

        Raises:
            Refused: the engine is not ready, or as many requests as are allowed are being worked on.
        """
        if not self.ready:
            state = "starts again" if self.version else "is loading"
            raise Refused(503, f"The engine {state}. Send the request again in a few seconds.", 2)
        if self._admitted >= self.limits.queue:
            do = "Send the request again in a second."
            raise Refused(503, f"The service is busy with {self._admitted} requests. {do}", 1)

    @contextmanager
    def receiving(self) -> Iterator[Callable[[int], None]]:
        """Keep the body of one request in memory while this context is open.

        Yields:
            A function to call with the length of each part that arrives; it raises `Refused` where the bodies
            of all requests together are too long.
        """
        mine = 0

        def count(length: int) -> None:
            nonlocal mine
            if self._received + length > self.limits.all_bytes:
                do = "Send the request again in a few seconds."
                raise Refused(503, f"The bodies of {self._received} bytes fill the service. {do}", 2)
            mine += length
            self._received += length

        try:
            yield count
        finally:
            self._received -= mine

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Take one request whose body is there into the queue, for as long as this context is open.

        Raises:
            Refused: see `require_room`.
        """
        self.require_room()
        self._admitted += 1
        try:
            with self.metrics.in_service.track_inprogress():
                yield
        finally:
            self._admitted -= 1

    async def detect(self, uploads: Sequence[Upload], timeout: float) -> list[ImageResult]:
        """Detect the objects in the images of a request, in order; cancelled, it leaves no work behind.

        The headers of all images are read before one is decoded.

        Args:
            uploads: the images, at least one.
            timeout: seconds that this may take.

        Raises:
            Refused: an image cannot be read, the engine died meanwhile, or time is up.
            EngineError: the engine failed.
        """
        try:
            async with asyncio.timeout(timeout):
                checking = self._decoding.submit(check_images, uploads, self.limits)
                pixels = await asyncio.wrap_future(checking)
                every = map(self._detect_one, uploads, pixels)
                results = await asyncio.gather(*every, return_exceptions=True)
        except TimeoutError:
            do = "Send the request again later, or start the service with a larger --timeout."
            raise Refused(503, f"No answer within {self.limits.timeout:g} s. {do}", 1) from None
        good = [result for result in results if isinstance(result, ImageResult)]
        self.metrics.images.inc(len(good))
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return good

    async def _detect_one(self, upload: Upload, pixels: int) -> ImageResult:
        start = time.perf_counter()
        with self.metrics.queue.track_inprogress():
            async with self._batcher.room:
                square, box, decoding = await self._decoded(upload, pixels)
                try:
                    answer = await self._batcher.detect(square, box)
                except WorkerDied as error:
                    do = "It starts again: send the request again in a few seconds."
                    raise Refused(503, f"{error} {do}", 2) from error
        waiting = time.perf_counter() - start - decoding - answer.engine
        times = {"decode": decoding, "wait": waiting, "engine": answer.engine}
        milliseconds = {name: round(1e3 * seconds, 3) for name, seconds in times.items()}
        return ImageResult(upload.name, box.size, answer.detections, milliseconds)

    async def _decoded(self, upload: Upload, pixels: int) -> tuple[Square, Letterbox, float]:
        """See `_prepare`, which runs in a thread as soon as not too many pixels are being decoded."""
        loop = asyncio.get_running_loop()

        def give_back(_: object) -> None:
            with suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(self._pixels.give, pixels)

        await self._pixels.take(pixels)
        decoding = self._decoding.submit(self._prepare, upload)
        # Not when whoever waits for it gives up: a thread that has begun goes on to the end.
        decoding.add_done_callback(give_back)
        return await asyncio.wrap_future(decoding)

    def _prepare(self, upload: Upload) -> tuple[Square, Letterbox, float]:
        """The letterboxed image, how it lies in its square, and the seconds that this took."""
        start = time.perf_counter()
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
            return await asyncio.wait_for(worker.detect(squares, boxes), self.limits.engine_timeout)
        except TimeoutError:  # it hangs, and nothing but its end helps
            worker.kill()
            raise WorkerDied(f"The engine did not answer within {self.limits.engine_timeout:g} s.") from None

    async def _keep_engine(self, on_ready: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Start the engine, and start it again whenever it has died; give up only if it never ran."""
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
        """Start the engine and wait until it has died."""
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
