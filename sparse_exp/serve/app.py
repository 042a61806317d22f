"""The HTTP side: routes, and the JSON of answers and of errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from sparse_exp import __version__
from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.errors import SparseExpError
from sparse_exp.predict.outputs import described
from sparse_exp.serve.limits import LimitBody, Refused, RequireKey, refusal
from sparse_exp.serve.log import LogRequests
from sparse_exp.serve.metrics import CountRequests
from sparse_exp.serve.service import ImageResult, Service
from sparse_exp.serve.uploads import FIELD, read_uploads

_GONE = 499  # nobody gets it; the log and the metrics show it
_FILE = {"type": "string", "format": "binary"}


class Detection(BaseModel):
    """One object, its box in pixels of the upright image; `predict` writes the same."""

    class_id: int = Field(ge=0)
    class_name: str = Field(alias="class")
    confidence: float = Field(ge=0, le=1)
    x1: float
    y1: float
    x2: float
    y2: float


class Milliseconds(BaseModel):
    """How long each step took for an image."""

    decode: float
    wait: float
    engine: float


class ImageAnswer(BaseModel):
    """The objects in an image; width and height in pixels, detections best first."""

    name: str
    width: int
    height: int
    detections: list[Detection]
    milliseconds: Milliseconds


class Prediction(BaseModel):
    """The answer to a request, its images in order."""

    images: list[ImageAnswer]


class Status(BaseModel):
    """``ok``, or why the service is not ready: ``loading``, ``restarting`` or ``draining``."""

    status: str


class Health(Status):
    """What is served, in which engine, and whether its licence allows use in production."""

    model: str
    engine: str
    version: str
    licence: str
    production: bool
    imgsz: int | Annotated[list[int], Field(min_length=2, max_length=2)]  # OpenAPI knows no pairs
    classes: list[str]


class Problem(BaseModel):
    """Why there is no answer, and what to do."""

    error: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The body is no multipart form, or ends too early",
        401: "The service asks for a key, and there is none or another",
        408: "The body did not arrive in time",
        413: "Too long, too many images, or too many pixels in them",
        415: "The body is not multipart/form-data",
        422: "A file is no image or damaged, or a parameter is out of range",
        503: "Busy or starting: try again after Retry-After seconds",
    }.items()
}


def create_app(
    service: Service,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
    *,
    api_key: str = "",
) -> FastAPI:
    """Make the application; the service runs from the application's start to its shutdown.

    Args:
        service: answers the requests.
        on_ready: called when the engine has run for the first time.
        on_failure: called when the engine cannot be started.
        api_key: what requests must show, but those for /live and /ready; empty: nothing.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.open(on_ready, on_failure):
            yield

    app = FastAPI(title="sparse_exp", version=__version__, lifespan=lifespan)
    if api_key:  # the last that is added is the outermost
        app.add_middleware(RequireKey, key=api_key)
    app.add_middleware(LimitBody, max_bytes=service.limits.max_bytes)
    app.add_middleware(CountRequests, metrics=service.metrics)
    app.add_middleware(LogRequests)
    _add_error_handlers(app)
    _add_predict(app, service)
    _add_monitoring(app, service)
    return app


def _add_predict(app: FastAPI, service: Service) -> None:
    lowest = service.settings.conf
    kinds = ", ".join(f"image/{kind.lower()}" for kind in service.limits.formats)
    most = f"at most {service.limits.max_files}"
    files = {"type": "array", "items": _FILE, "minItems": 1, "description": most}
    form = {"type": "object", "required": [FIELD], "properties": {FIELD: files}}
    content = {"multipart/form-data": {"schema": form, "encoding": {FIELD: {"contentType": kinds}}}}
    body = {"required": True, "content": content}

    @app.post("/predict", response_model=Prediction, responses=_PROBLEMS, openapi_extra={"requestBody": body})
    async def predict(
        request: Request,
        conf: float = Query(
            lowest, ge=lowest, le=1, description="leave out detections below this confidence"
        ),
    ) -> Response:
        """Detect objects in one image or several, each a file in the form field ``images``."""
        service.require_room()
        start = asyncio.get_running_loop().time()
        with service.receiving() as count:
            uploads = await read_uploads(request, service.limits, count)
            with service.admitted():
                left = service.limits.timeout - (asyncio.get_running_loop().time() - start)
                results = await _unless_gone(request, service.detect(uploads, left))
        # A box never suppresses a better one, so it makes no difference that boxes are left out only now.
        images = [_image_json(result, service.names, conf) for result in results]
        return Response(json.dumps({"images": images}), media_type="application/json")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[ImageResult]]) -> list[ImageResult]:
    """Do the work for a request whose body has been read, and give it up when the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise Refused(_GONE, "The client closed the connection before the answer.")


def _image_json(result: ImageResult, names: tuple[str, ...], conf: float) -> dict[str, Any]:
    kept = result.detections[result.detections[:, 4] > np.float32(conf)]
    return {
        "name": result.name,
        "width": result.size[0],
        "height": result.size[1],
        "detections": [described(row, names) for row in kept.tolist()],
        "milliseconds": result.milliseconds,
    }


def _add_monitoring(app: FastAPI, service: Service) -> None:
    def answer(status: str, **facts: Any) -> Response:
        content = Health(status=status, **facts) if facts else Status(status=status)
        code = 200 if status == "ok" else 503
        return Response(content.model_dump_json(), code, media_type="application/json")

    def state() -> str:
        if service.draining:
            return "draining"
        return "ok" if service.ready else "restarting" if service.version else "loading"

    @app.head("/live", include_in_schema=False)
    @app.get("/live", response_model=Status)
    async def live() -> Response:
        """Say that the process works: 200, also while the engine is started or started again."""
        return answer("ok")

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=Status, responses={503: {"model": Status}})
    async def ready() -> Response:
        """Say whether requests should be sent here: 200 while the engine is running, else 503."""
        return answer(state())

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Say what is served, with the status of ``/ready``."""
        model, runtime = service.model, RUNTIMES[service.model.engine]
        return answer(
            state(),
            model=model.origin,
            engine=model.engine,
            version=service.version,
            licence=runtime.licence,
            production=runtime.production,
            imgsz=model.imgsz,
            classes=list(service.names),
        )

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Give all counters in the text format of Prometheus."""
        content, kind = service.metrics.text()
        return Response(content, headers={"Content-Type": kind})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(error.status, str(error), error.headers)

    @app.exception_handler(SparseExpError)
    async def failed(_: Request, error: SparseExpError) -> Response:
        return refusal(500, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refusal(422, f"{first['loc'][-1]}: {first['msg']}. Correct it.")

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        do = "There are POST /predict, and GET /live, /ready, /health, /metrics and /docs."
        text = f"{request.method} {request.url.path[:100]}: {error.detail}. {do}"
        return refusal(error.status_code, text, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return refusal(500, f"The service failed ({type(error).__name__}); its log says where.")
