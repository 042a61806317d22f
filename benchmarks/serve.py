"""Compare the service under many clients with the bare engine.

The script starts ``python -m sparse_exp.serve MODEL`` as a process and sends each image once, alone. Then
many clients send the images again and again; each waits for its answer before it sends the next. Every answer
is compared with that of the image alone. With ``--abuse`` two more clients send bodies that are malformed,
huge, truncated or no images, which must be answered with 4xx.

The bare engine is the same file with the same batch and streams in a process of its own, fed from memory. It
is measured before and after the service. The clients run in this process and take CPU time from the service,
so that on two cores a part of the difference to the bare engine is theirs. The cores that they took are
printed.

    python benchmarks/serve.py MODEL                                     # 64 clients, a minute
    python benchmarks/serve.py MODEL --batch 1 1 4 --streams 1 2 1       # settings one after the other
    python benchmarks/serve.py MODEL --seconds 20 --abuse --json serve.json
    python benchmarks/serve.py MODEL --seconds 3600 --abuse              # does memory grow?
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from sparse_exp.command import Parser, amount, run_command, whole
from sparse_exp.config.schema import DatasetConfig, SourceConfig
from sparse_exp.data import prepare
from sparse_exp.data.images import IMAGE_SUFFIXES, read_square
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import EngineError
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.predict.models import Model, find_model
from sparse_exp.sources.cache import cache_directory

_WHEEL = SourceConfig(
    uri="index:deepforest==2.1.0", sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
_BOUNDARY = "benchmark"
_HEADERS = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
_NEAR_PX = 4.0  # greatest distance of two corners that count as the same
_SHARE = 0.7  # of the boxes that two answers to an image must have in common
_IMAGES = 32  # more images would only need more reference answers


@dataclass
class ClientLog:
    """The answers that the clients got.

    Attributes:
        latencies: seconds of each request with status 200.
        statuses: number of answers by status.
        errors: number of requests without an answer, by the kind of error.
        wrong: number of answers that differ from that of the image alone.
        wall: seconds from the first request to the last answer.
        client_cpu: seconds of CPU time that this process used.
    """

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    wall: float = 0.0
    client_cpu: float = 0.0


def main() -> int:
    """Measure every setting, and print its numbers."""
    options = _options()
    model = find_model(options.model, engine=options.engine)
    bodies, squares = _images(options.images, options.imgsz, model)
    rows = []
    with measuring_alone(default_lock_path()):
        _print_conditions(model, options, bodies)
        for batch, streams in zip(options.batch, options.streams, strict=True):
            rows.append(_measure(model, options, batch, streams, bodies, squares))
            print(_line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", help="as of python -m sparse_exp.serve")
    add("--engine")
    add("--clients", type=whole, default=64)
    add("--seconds", type=amount, default=60.0)
    add("--bare-seconds", type=amount, default=10.0, help="of the bare engine, before and after")
    add("--batch", type=whole, nargs="+", default=[1])
    add("--streams", type=whole, nargs="+", default=[1], help="as many numbers as --batch has")
    add("--max-wait-ms", type=amount, default=5.0)
    add("--images", type=Path, help="a folder of images (default: tiles of the trees data set as JPEG)")
    add("--imgsz", type=whole, default=640, help="side of those JPEGs, px")
    add("--abuse", action="store_true", help="send bad bodies at the same time")
    add("--json", type=Path)
    options = parser.parse_args()
    if len(options.batch) != len(options.streams):
        parser.error("--batch and --streams need the same number of values")
    return options


def _images(folder: Path | None, side: int, model: Model) -> tuple[list[bytes], np.ndarray]:
    """Bodies of requests, and the same images as the engine takes them: uint8 (N, 3, S, S)."""
    files = _tiles(side) if folder is None else _read(folder)
    squares = [read_square(Path("image"), model.imgsz, file)[0].transpose(2, 0, 1) for file in files]
    return [_body(file) for file in files], np.stack(squares)


def _tiles(side: int) -> list[bytes]:
    """Tiles of the trees data set as JPEG files."""
    trees = prepare(DatasetConfig(name="trees", generator="trees", sources=[_WHEEL]), cache_directory())
    files = []
    for sample in trees.splits["train"][:_IMAGES]:
        file = BytesIO()
        with Image.open(sample.image) as image:
            image.convert("RGB").resize((side, side)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _read(folder: Path) -> list[bytes]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return [path.read_bytes() for path in paths[:_IMAGES]]


def _body(file: bytes, field_name: str = "images") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{field_name}"; filename="image.jpg"'
    head = f"--{_BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n"
    return head.encode() + file + f"\r\n--{_BOUNDARY}--\r\n".encode()


def _measure(
    model: Model, options: argparse.Namespace, batch: int, streams: int, bodies: list[bytes], squares: Any
) -> dict[str, Any]:
    bare = [_bare(model, batch, streams, squares, options.bare_seconds)]
    with _service(options, batch, streams) as (port, process):
        alone = [_detections(_post(port, body)[1]) for body in bodies]
        abuse, memory = _Abuse(port, bodies[0]) if options.abuse else None, [_memory_mb(process)]
        log = _run_clients(port, bodies, alone, options.clients, options.seconds)
        refused = abuse.stop() if abuse else {}
        memory.append(_memory_mb(process))
    bare.append(_bare(model, batch, streams, squares, options.bare_seconds))
    p50, p90, p99 = np.percentile(log.latencies or [np.nan], [50, 90, 99]) * 1e3
    items_per_s = len(log.latencies) / log.wall
    answered = vars(log) | {"requests": sum(log.statuses.values()) + sum(log.errors.values())}
    return answered | {
        "batch": batch, "streams": streams, "items_per_s": items_per_s, "p50_ms": p50, "p90_ms": p90,
        "p99_ms": p99, "bare": bare, "share": items_per_s / statistics.mean(bare), "abuse": refused,
        "client_cores": log.client_cpu / log.wall, "memory_mb": memory,
    }  # fmt: skip


def _bare(model: Model, batch: int, streams: int, squares: np.ndarray, seconds: float) -> float:
    """Images per second of the engine, without HTTP, decoding and non-maximum suppression."""
    engine = IsolatedEngine(model.engine)
    try:
        engine.load(model.path, batch_size=batch, cores=usable_physical_cores(), streams=streams)
        timing = engine.measure(squares, seconds, warmup=2.0, streams=streams)
    finally:
        engine.close()
    return batch * len(timing.latencies) / timing.wall


@contextmanager
def _service(
    options: argparse.Namespace, batch: int, streams: int
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Start the service as a process, yield its port and it, and terminate it as a system would."""
    words = [options.model, "--port", "0", "--batch", str(batch), "--streams", str(streams)]
    words += ["--max-wait-ms", str(options.max_wait_ms)]
    words += ["--engine", options.engine] if options.engine else []
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_exp.serve", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        address = process.stdout.readline()
        if not address:
            raise EngineError(f"The service did not start (exit code {process.wait()}).")
        yield int(address.rsplit(":", 1)[1]), process
    finally:
        process.terminate()
        if process.wait(60) != 0:
            print(f"The service ended with exit code {process.returncode}.")


def _memory_mb(process: subprocess.Popen[str]) -> float:
    """Main memory of the service and its engine, in units of 1e6 bytes."""
    service = psutil.Process(process.pid)
    return sum(one.memory_info().rss for one in (service, *service.children(recursive=True))) / 1e6


def _post(port: int, body: bytes, connection: http.client.HTTPConnection | None = None) -> tuple[int, bytes]:
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/predict", body, _HEADERS)
    response = connection.getresponse()
    return response.status, response.read()


def _detections(answer: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(answer)["images"][0]["detections"]
    return found


def _alike(these: list[dict[str, Any]], those: list[dict[str, Any]]) -> bool:
    """Whether most boxes of each answer are in the other, too.

    In another batch an engine adds in another order, so that a box near the threshold may come or go. Answers
    to two different images have hardly a box in common.
    """
    a, b = _corners(these), _corners(those)
    if len(a) == 0 or len(b) == 0:
        return abs(len(a) - len(b)) <= 1
    near = np.abs(a[:, None] - b).max(2) < _NEAR_PX
    return bool(min(near.any(0).mean(), near.any(1).mean()) > _SHARE)


def _corners(found: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[box[key] for key in ("x1", "y1", "x2", "y2")] for box in found]).reshape(-1, 4)


def _run_clients(
    port: int, bodies: list[bytes], alone: list[list[dict[str, Any]]], clients: int, seconds: float
) -> ClientLog:
    log, lock, start = ClientLog(), threading.Lock(), time.perf_counter()
    numbers, before = count(), psutil.Process().cpu_times()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() - start < seconds:
            index = next(numbers) % len(bodies)
            sent = time.perf_counter()
            try:
                status, answer = _post(port, bodies[index], connection)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with lock:
                    log.errors[type(error).__name__] += 1
                continue
            latency = time.perf_counter() - sent
            wrong = status == 200 and not _alike(_detections(answer), alone[index])
            with lock:
                log.latencies += [latency] if status == 200 else []
                log.statuses[status] += 1
                log.wrong += wrong

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.wall = time.perf_counter() - start
    after = psutil.Process().cpu_times()
    log.client_cpu = after.user + after.system - before.user - before.system
    return log


class _Abuse:
    """Two clients that send bad bodies until `stop`."""

    def __init__(self, port: int, body: bytes) -> None:
        self._port, self._ended, self._answers = port, threading.Event(), Counter[str]()
        bad = {
            "no image": _body(b"#!/bin/sh\n" * 100),
            "truncated image": _body(body[200 : len(body) // 2]),
            "truncated body": body[: len(body) // 2],
            "no form": os.urandom(10_000),
            "wrong field": _body(b"x", "file"),
            "empty": b"",
            "huge": bytes(20_000_000),
        }
        self._bad = cycle(bad.items())
        self._threads = [threading.Thread(target=self._send) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._ended.wait(0.2):
            name, body = next(self._bad)
            try:
                status = str(_post(self._port, body)[0])
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            self._answers[f"{name}: {status}"] += 1

    def stop(self) -> dict[str, int]:
        """End the clients; returns how often each kind of body got each answer."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return dict(self._answers)


def _print_conditions(model: Model, options: argparse.Namespace, bodies: list[bytes]) -> None:
    host = host_facts()
    length = statistics.mean(map(len, bodies)) / 1e3
    print(f"{host.cpu}, {host.usable_cores} CPUs, busy before: {psutil.cpu_percent(1.0):.0f} %")
    print(f"{model.path} in {model.engine}, {model.imgsz} px; bodies of {length:.0f} kB on average")
    print(f"{options.clients} clients in one process for {options.seconds:g} s")


def _line(row: dict[str, Any]) -> str:
    ok = row["statuses"].get(200, 0)
    bare = " and ".join(f"{value:.1f}" for value in row["bare"])
    lines = [
        f"batch {row['batch']}, streams {row['streams']}: {row['requests']} requests, {ok} with status 200, "
        f"{sum(row['errors'].values())} lost, {row['wrong']} wrong",
        f"  {row['items_per_s']:.1f} items/s = {100 * row['share']:.0f} % of the bare engine ({bare}); "
        f"p50 {row['p50_ms']:.0f} ms, p90 {row['p90_ms']:.0f} ms, p99 {row['p99_ms']:.0f} ms; "
        f"the clients took {row['client_cores']:.2f} cores; "
        f"memory {row['memory_mb'][0]:.0f} MB before, {row['memory_mb'][1]:.0f} MB after",
    ]
    lines += [f"  abuse, {what}, {times} times" for what, times in sorted(row["abuse"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
