"""The counters of the service, for Prometheus."""

from __future__ import annotations

import time
from typing import Any

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

# Without this each counter has a second number beside it: the time when it was made.
disable_created_metrics()  # type: ignore[no-untyped-call]
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_KNOWN_PATHS = ("/predict", "/live", "/ready", "/health", "/metrics")


class Metrics:
    """The counters of one service; each service has its own, also where several share a process.

    Attributes:
        requests: requests answered, by path and status; paths that the service does not have count as
            ``other``.
        request_seconds: seconds from the request line to the end of the answer, of ``/predict``.
        in_service: requests of ``/predict`` that are being worked on.
        images: images answered.
        queue: images that were received and have no answer yet.
        batch_images: images of a batch.
        engine_seconds: seconds of a batch, from when the engine is given it to its detections.
        engine_starts: how often the engine's process was started; above 1 it has crashed.
        model: name of the model, of the engine, and the engine's version.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        common: dict[str, Any] = {"namespace": "sparse_exp", "registry": self._registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **common)
        self.request_seconds = Histogram(
            "request_seconds", "Seconds of a prediction", buckets=_SECONDS, **common
        )
        self.in_service = Gauge("requests_in_service", "Predictions being made", **common)
        self.images = Counter("images", "Images answered", **common)
        self.queue = Gauge("queue_images", "Images without an answer yet", **common)
        self.batch_images = Histogram("batch_images", "Images of a batch", buckets=_BATCHES, **common)
        self.engine_seconds = Histogram("engine_seconds", "Seconds of a batch", buckets=_SECONDS, **common)
        self.engine_starts = Counter("engine_starts", "Starts of the engine", **common)
        self.model = Info("model", "The model that is served", **common)

    def text(self) -> tuple[bytes, str]:
        """All counters as text, and the content type of the text."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class CountRequests:
    """ASGI middleware that counts requests by path and status, refused ones too.

    Args:
        app: the application.
        metrics: the counters.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it with the status of its answer."""
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
