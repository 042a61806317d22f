"""Services for tests: in this process with a stand-in for the engine, and as a process of their own."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sparse_exp.predict.models import Model
from sparse_exp.serve import service as service_module
from sparse_exp.serve.app import create_app
from sparse_exp.serve.limits import Limits
from sparse_exp.serve.service import Service
from sparse_exp.serve.worker import DetectorSettings

SIDE = 32
ENGINE = "onnxruntime"
BOUNDARY = "x"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def form(*files: bytes, field: str = "images", name: str = "a.png") -> bytes:
    """A multipart body, written by hand."""
    head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    parts = [f"--{BOUNDARY}\r\n".encode() + head + file + b"\r\n" for file in files]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


class StandIn:
    """In place of the process with the detector; the tests say when it answers and what goes wrong.

    It answers each image with two boxes: (red, green, blue, 255) at confidence 0.9, and one at 0.4.
    """

    batches: list[int]
    error: Exception | None
    hold: asyncio.Event | None
    made: int

    def __init__(self, model: Model, settings: DetectorSettings) -> None:
        type(self).made += 1
        self.version, self.names = "1.2", ("tree", "car")
        self.died, self.obituary = asyncio.Event(), "The process of the engine died."

    async def start(self) -> None:
        if self.error:
            raise self.error

    async def detect(self, squares, boxes):
        type(self).batches.append(len(squares))
        if self.hold:
            await self.hold.wait()
        await asyncio.sleep(0.002 * (int(squares[0].sum()) % 3))  # batches overtake each other
        if self.error:
            self.died.set()
            raise self.error
        rows = [[*square[SIDE // 2, SIDE // 2], 255, 0.9, 1] for square in squares]
        return [np.array([row, [1, 2, 3, 4, 0.4, 0]], np.float32) for row in rows]

    def kill(self) -> None:
        self.died.set()

    def close(self) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch) -> type[StandIn]:
    """The stand-in's class, fresh for each test."""
    fresh = type("Fresh", (StandIn,), {"batches": [], "error": None, "hold": None, "made": 0})
    monkeypatch.setattr(service_module, "Worker", fresh)
    return fresh


@pytest.fixture
def make_service(stand_in) -> Callable[..., Service]:
    """A function that makes a service: limits by name, and how images are batched."""

    def make(*, batch_size: int = 1, streams: int = 1, max_wait: float = 0.005, **limits) -> Service:
        model = Model(Path("model.onnx"), (), SIDE, "onnxruntime", "my model")
        settings = DetectorSettings(batch_size=batch_size, streams=streams)
        return Service(model, settings, Limits(**limits), max_wait)

    return make


@pytest.fixture
def make_client(make_service):
    """A function that starts a service and gives a client of it, which is ready."""
    clients = []

    def make(**options) -> TestClient:
        client = TestClient(create_app(make_service(**options)), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        until(lambda: client.get("/health").status_code == 200)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


class Process:
    """``python -m sparse_exp.serve`` on a port, from its first word to its end."""

    def __init__(self, model: Path, port: int = 0, *more: str, before: Sequence[str] = ()) -> None:
        words = [str(model), "--engine", ENGINE, "--port", str(port), "--cores", "1", *more]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "sparse_exp.serve", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = self.process.stdout.readline()
        assert said.startswith("Serving"), self.process.communicate(timeout=10)[1]
        self.port = int(said.rsplit(":", 1)[1])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict | None = None):
        """Status and body of an answer, of a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or FORM)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def detections(self, *files: bytes) -> list[list[dict]]:
        status, answer = self.ask("POST", "/predict", form(*files))
        assert status == 200, answer
        return [image["detections"] for image in json.loads(answer)["images"]]

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; exit code and what was said on the way."""
        children = self.children()
        self.process.send_signal(number)
        error = self.process.communicate(timeout=60)[1]
        until(lambda: not any(child.is_running() for child in children))
        return self.process.returncode, error
