"""The service as a process, with a real model in a real engine, over real connections."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from served import ENGINE, FORM, Process, form, until

SIDE = 64
CONF = 0.3


def start(model: Path, port: int = 0, *more: str) -> Process:
    return Process(model, port, "--conf", str(CONF), *more)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained YOLOv5n whose predictions differ from image to image, and are many."""
    from sparse_exp.export.onnx import FileForm, export_float
    from sparse_exp.yolov5 import YOLOv5

    torch.manual_seed(0)
    detector, images = YOLOv5("n", 3), torch.rand(8, 3, 2, 2)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 0.5
    with torch.no_grad():
        for conv in detector.head.m:
            conv.weight.mul_(4)
            conv.bias.zero_()
        for _ in range(4):
            detector.train()(torch.nn.functional.interpolate(images, SIDE))
    path = tmp_path_factory.mktemp("served") / "model.onnx"
    export_float(detector.eval(), path, FileForm(SIDE, opset=13, names=["one", "two", "three"]))
    return path


@pytest.fixture(scope="module")
def service(model):
    """One service for all tests of this module that leave it as it was."""
    process = start(model, 0, "--batch", "4", "--max-bytes", "1MB")
    yield process
    assert process.end(signal.SIGINT)[0] == 130


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """64 different JPEGs of different sizes, coarse enough to survive compression."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8).astype(np.uint8))
        file = io.BytesIO()
        coarse.resize((80 + number, 60)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


def same(these: list[dict], those: list[dict]) -> bool:
    """The same boxes; engines add up in another order in other batches."""
    numbers = [[list(found.values()) for found in found_in] for found_in in (these, those)]
    if [row[1] for row in numbers[0]] != [row[1] for row in numbers[1]]:
        return False
    a, b = ([[row[0], *row[2:]] for row in rows] for rows in numbers)
    return np.allclose(a, b, atol=0.02)


def test_answers_are_those_of_predict(service, model, photos, tmp_path):
    from sparse_exp.predict.detector import Detector, find_model
    from sparse_exp.predict.outputs import described

    detector = Detector(find_model(str(model), engine=ENGINE), conf=CONF, cores=1)
    counts = []
    for number, photo in enumerate(photos[:4]):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(photo)
        square, box = detector.prepare(file)
        wanted = [described(row, detector.names) for row in detector.detect([square], [box])[0].tolist()]
        assert same(service.detections(photo)[0], wanted)
        counts.append(len(wanted))
    detector.close()
    assert min(counts) > 0
    alone = [service.detections(photo)[0] for photo in photos[:4]]
    assert all(map(same, service.detections(*photos[:4]), alone))


def test_of_64_clients_each_gets_its_own_answer(service, photos):
    alone = [service.detections(photo)[0] for photo in photos]
    different = {json.dumps(found) for found in alone}
    assert len(different) == len(photos)
    with ThreadPoolExecutor(64) as clients:
        together = list(clients.map(lambda photo: service.detections(photo)[0], photos))
    assert all(map(same, together, alone))


def raw(port: int, *parts: bytes, hang_up: bool = False) -> bytes:
    """Send bytes as they are; all that comes back until the other side is done."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:  # it may refuse to read on
            pass
        if hang_up:
            return b""
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except OSError:
            pass
        return answer


def test_what_no_client_should_send(service, photos):
    server = psutil.Process(service.process.pid)
    memory = server.memory_info().rss
    line = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    line += f"Content-Type: {FORM['Content-Type']}\r\n".encode()
    start = form(b"x")[:-8]
    endless = b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(start) + start + b"\r\n"
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    body = form(photos[0])
    length = b"Content-Length: %d\r\n" % len(body)
    cases = {
        "said to be huge": ([line + b"Content-Length: 999999999\r\n\r\n"], b"413"),
        "huge, and sent all the same": (
            [line + b"Content-Length: 30000000\r\n\r\n"] + [bytes(10**6)] * 30,
            b"413",
        ),
        "without length and end": ([line + endless] + [chunk] * 40, b"413"),
        "asks first": ([line + b"Expect: 100-continue\r\nContent-Length: 30000000\r\n\r\n"], b"413"),
        "no form": ([line + b"Content-Length: 5\r\n\r\nhello"], b"400"),
        "no HTTP": ([b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"], b"400"),
        "a length that is none": ([line + b"Content-Length: -5\r\n\r\n"], b"400"),
    }
    for name, (parts, status) in cases.items():
        assert raw(service.port, *parts).split(b" ")[1:2] == [status], name
    for part in (line, line + length + b"\r\n", line + length + b"\r\n" + body[: len(body) // 2]):
        raw(service.port, part, hang_up=True)
    raw(service.port, line + length + b"\r\n" + body, hang_up=True)
    assert len(service.detections(photos[0])[0]) > 0
    assert server.memory_info().rss - memory < 50e6  # of the 110 MB that were sent none is kept


@pytest.mark.slow
def test_an_engine_that_is_killed_is_started_again(service, photos):
    before = service.detections(photos[0])[0]
    (engine,) = service.children()
    engine.kill()
    status, answer = service.ask("POST", "/predict", form(photos[0]))
    assert status == 503
    assert json.loads(answer)["error"].endswith("in a few seconds.")
    until(lambda: service.ask("GET", "/health")[0] == 200, 120)
    assert same(service.detections(photos[0])[0], before)
    families = text_string_to_metric_families(service.ask("GET", "/metrics")[1])
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["sparse_exp_engine_starts_total"] == 2


@pytest.mark.slow
def test_killed_in_mid_request_it_starts_anew_and_ended_in_mid_request_it_answers(model, photos):
    killed = start(model)
    children = killed.children()
    waiting = [threading.Thread(target=_ignoring, args=(killed, photos[:16])) for _ in range(8)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    assert killed.end(signal.SIGKILL)[0] == -signal.SIGKILL
    for thread in waiting:
        thread.join()
    until(lambda: not any(child.is_running() for child in children))

    ended = start(model, killed.port)
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ended.detections, *photos[:16]) for _ in range(8)]
        until(lambda: _inside(ended) > 0)
        assert ended.end(signal.SIGTERM) == (0, "")
        assert sum(answer.exception() is None for answer in answers) >= 1
        refused = {type(a.exception()) for a in answers if a.exception()}
        assert refused <= {ConnectionRefusedError, ConnectionResetError}  # they came too late


@pytest.mark.slow
def test_an_engine_that_hangs_is_replaced_and_a_second_ctrl_c_waits_for_nobody(model, photos):
    process = start(model, 0, "--engine-timeout", "2", "--batch", "16")
    before = process.detections(photos[0])[0]
    process.children()[0].suspend()
    status, answer = process.ask("POST", "/predict", form(*photos[:16]))  # more than the pipe holds
    assert status == 503
    assert "did not answer within 2 s" in json.loads(answer)["error"]
    until(lambda: process.ask("POST", "/predict", form(photos[0]))[0] == 200, 120)
    assert same(process.detections(photos[0])[0], before)

    (engine,) = process.children()
    engine.suspend()
    waiting = threading.Thread(target=_ignoring, args=(process, photos[:1]))
    waiting.start()
    until(lambda: _inside(process) > 0)
    process.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    code, said = process.end(signal.SIGINT)
    waiting.join()
    assert code == 130
    assert said == f"The process of the engine {ENGINE} died (signal 9). It is started again.\n"


def _ignoring(process: Process, photos: list[bytes]) -> None:
    with suppress(OSError, http.client.HTTPException):
        process.detections(*photos)


def _inside(process: Process) -> float:
    families = text_string_to_metric_families(process.ask("GET", "/metrics")[1])
    return next(f.samples[0].value for f in families if f.name == "sparse_exp_requests_in_service")
