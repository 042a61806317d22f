"""What the service counts, in the text format of Prometheus."""

from __future__ import annotations

import time

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

disable_created_metrics()  # type: ignore[no-untyped-call] # beside each counter: when it began
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_KNOWN_PATHS = ("/predict", "/health", "/metrics")


class Metrics:
    """Counters of one service; several services in one process do not mix.

    Attributes:
        requests: answered, by path and status; paths that the service does not have count as ``other``.
        request_seconds: from the request line to the end of the answer, of ``/predict``.
        in_service: requests of ``/predict`` that are being worked on.
        images: that got an answer.
        queue: images that were received and have no answer yet.
        batch_images: images of a batch.
        engine_seconds: of a batch: from when it is handed over to its detections.
        engine_starts: how often the engine's process was started; more than one is a crash.
        model: name of the model, engine and its version.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def name(rest: str) -> str:
            return f"sparse_exp_{rest}"

        self.requests = Counter(name("requests"), "Requests answered", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            name("request_seconds"), "Seconds of a prediction", buckets=_SECONDS, registry=registry
        )
        self.in_service = Gauge(name("requests_in_service"), "Predictions being made", registry=registry)
        self.images = Counter(name("images"), "Images answered", registry=registry)
        self.queue = Gauge(name("queue_images"), "Images without an answer yet", registry=registry)
        self.batch_images = Histogram(
            name("batch_images"), "Images of a batch", buckets=_BATCHES, registry=registry
        )
        self.engine_seconds = Histogram(
            name("engine_seconds"), "Seconds of a batch", buckets=_SECONDS, registry=registry
        )
        self.engine_starts = Counter(name("engine_starts"), "Starts of the engine", registry=registry)
        self.model = Info(name("model"), "The model that is served", registry=registry)

    def text(self) -> tuple[bytes, str]:
        """All counters, and the content type of that text."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class CountRequests:
    """ASGI middleware that counts requests by path and status, refused ones too.

    Args:
        app: the application.
        metrics: what it counts in.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and remember how it was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = "500", time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, status).inc()
            if path == "/predict":
                self._metrics.request_seconds.observe(time.perf_counter() - start)
