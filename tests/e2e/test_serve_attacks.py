"""The service under attack, as a process: what the attacker gets, what it costs, and that others are served.

Each test prints its figures: ``pytest -m slow -s``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hostile import encoded, png_of, scans, texts, webp_of
from served import FORM, Process, form, png, until
from standin import write_detector

pytestmark = pytest.mark.slow

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
ALL_KINDS = "jpeg,png,gif,bmp,webp,tiff"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_detector(tmp_path_factory.mktemp("attacked") / "model.onnx")


@pytest.fixture
def serve(model):
    """A function that starts a service with options; all are ended after the test."""
    processes: list[Process] = []

    def start(*words: str, **how) -> Process:
        processes.append(Process(model, 0, *words, **how))
        return processes[-1]

    yield start
    for process in processes:
        if process.process.poll() is None:
            process.end(signal.SIGKILL)


def cpu_of(process: Process) -> float:
    times = psutil.Process(process.process.pid).cpu_times()
    return times.user + times.system


def peak_mb(process: Process) -> float:
    lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


BODIES = {
    "16 WebP of 50 million pixels": (lambda: form(*[webp_of(7070)] * 16), 413),
    "16 PNG of 32 million pixels": (lambda: form(*[png_of(5700)] * 16), 413),
    "WebP of 25 million pixels": (lambda: form(webp_of(5000)), 200),
    "PNG of 25 million pixels": (lambda: form(png_of(5000)), 200),
    "GIF of 25 million pixels": (lambda: form(encoded("GIF", 5000)), 200),
    "TIFF of 25 million pixels": (lambda: form(encoded("TIFF", 5000, compression="tiff_deflate")), 200),
    "JPEG of 25 million pixels": (lambda: form(encoded("JPEG", 5000, progressive=True)), 200),
    "JPEG of 1000 scans": (lambda: form(scans(1000, 5000)), 413),
    "16 PNG whose texts unpack to 60 MB": (lambda: form(*[png_of(8, texts(60))] * 16), 422),
}


@pytest.mark.parametrize("name", BODIES)
def test_small_bodies_of_much_work(serve, name):
    make, wanted = BODIES[name]
    process, body = serve("--image-formats", ALL_KINDS), make()
    before, start = cpu_of(process), time.perf_counter()
    status, _ = process.ask("POST", "/predict", body)
    seconds, cpu, peak = time.perf_counter() - start, cpu_of(process) - before, peak_mb(process)
    print(
        f"\n{name}: {len(body)} bytes, status {status}, {seconds:.2f} s, CPU {cpu:.2f} s, peak {peak:.0f} MB"
    )
    assert status == wanted
    assert peak < 600
    assert len(process.detections(png((1, 2, 3)))) == 1


def test_silent_connections_keep_nobody_out(serve):
    process = serve("--head-timeout", "3", before=["prlimit", "--nofile=100:100"])
    held = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(130)]
    start = time.perf_counter()
    assert process.ask("GET", "/health")[0] == 200
    print(f"\n130 silent connections at 100 descriptors: /health after {time.perf_counter() - start:.2f} s")
    server = psutil.Process(process.process.pid)
    until(lambda: len(server.net_connections()) == 1, 20)
    for connection in held:
        connection.close()
    code, said = process.end(signal.SIGTERM)
    assert (code, said) == (0, "")


def test_heads_that_drip_are_hung_up_on(serve):
    process = serve("--head-timeout", "1")
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
        start = time.perf_counter()
        for letter in HEAD:
            try:
                connection.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the whole head was taken")
        print(f"\na head that drips: hung up after {time.perf_counter() - start:.1f} s")


def test_who_does_not_take_the_answer_is_hung_up_on(serve):
    process = serve("--head-timeout", "1")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", process.port))
        with suppress(OSError):  # it may hang up while this is sent
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        server = psutil.Process(process.process.pid)
        until(lambda: len(server.net_connections()) == 1, 30)
    assert process.ask("GET", "/ready")[0] == 200


def test_bodies_of_one_byte_keep_nobody_out(serve):
    process = serve("--queue", "8")
    held = []
    for _ in range(8):
        held.append(socket.create_connection(("127.0.0.1", process.port), timeout=30))
        held[-1].sendall(HEAD + b"Content-Length: 1000\r\n\r\n-")
    time.sleep(0.5)
    start = time.perf_counter()
    assert len(process.detections(png((1, 2, 3)))) == 1
    seconds = time.perf_counter() - start
    print(f"\n8 bodies of one byte in a queue of 8: another is answered after {seconds:.2f} s")
    assert held[0].recv(100).startswith(b"HTTP/1.1 408")
    for connection in held:
        connection.close()


def test_heads_without_bodies_keep_nobody_out(serve):
    process = serve("--connections", "20", "--queue", "200")
    held = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(20)]
    for connection in held:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n--x")
    time.sleep(0.5)
    start = time.perf_counter()
    for path in ("/live", "/ready", "/health"):
        assert process.ask("GET", path)[0] == 200
    seconds = time.perf_counter() - start
    print(f"\n20 whole heads without bodies at 20 connections: others are answered after {seconds:.2f} s")
    assert seconds < 3  # they are hung up on only after 5
    assert len(process.detections(png((1, 2, 3)))) == 1


def test_a_flood_of_connections_costs_only_those_that_ask_for_nothing(serve):
    process = serve("--connections", "8")
    asking = socket.create_connection(("127.0.0.1", process.port), timeout=30)
    body = form(png((1, 2, 3)))
    asking.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1])
    time.sleep(0.3)
    held = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(50)]
    assert process.ask("GET", "/ready")[0] == 200
    asking.sendall(body[-1:])
    assert asking.recv(100).startswith(b"HTTP/1.1 200")
    for connection in [*held, asking]:
        connection.close()


def exchange(port: int, sent: bytes) -> bytes:
    """The status line of the answer to raw bytes; empty where there is none soon."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection, suppress(OSError):
        connection.sendall(sent)
        return connection.recv(64).split(b"\r\n")[0]
    return b""


ADDED = [
    b"", b"\r\n", b"\0", b"Expect: 100-continue\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n", b"HTTP/1.0", b"%00", b"?conf=1e400", b"--x",
]  # fmt: skip


def mutated(request: bytes, chance: random.Random) -> bytes:
    """A request with some bytes replaced, left out, repeated or added."""
    for _ in range(chance.randint(1, 4)):
        # Two in three in the head, of which there is less.
        end = len(request) if chance.random() < 0.3 else request.find(b"\r\n\r\n") + 4
        at = chance.randrange(max(1, end))
        length = chance.choice((0, 1, 2, 8, 40))
        new = chance.choice((*ADDED, chance.randbytes(3), request[at : at + length] * 3))
        request = request[:at] + new + request[at + length :]
    return request


def test_mutilated_requests_for_a_while(serve):
    """``SPARSE_EXP_FUZZ=SECONDS[,SEED]`` says for how long, and repeats one."""
    seconds, _, seed = os.environ.get("SPARSE_EXP_FUZZ", "30").partition(",")
    chance = random.Random(number := int(seed or time.time()))
    process, body = serve("--head-timeout", "1", "--timeout", "5", "--log", "json"), form(png((1, 2, 3)))
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    seeds = [
        whole,
        whole.replace(b"/predict", b"/predict?conf=0.5"),
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    answers: Counter[bytes] = Counter()
    server, before, honest = psutil.Process(process.process.pid), 0, 0
    listening = threading.Thread(target=lambda: list(process.process.stderr), daemon=True)
    listening.start()  # or the pipe would be full
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        request = mutated(chance.choice(seeds), chance)
        line = exchange(process.port, request)
        assert not line.startswith(b"HTTP/1.1 500"), (number, request)
        answers[line] += 1
        if answers.total() % 20 == 0:
            assert process.detections(png((1, 2, 3)))[0]
            honest += 1
        if answers.total() == 500:
            before = server.memory_info().rss
    grown = (server.memory_info().rss - before) / 1e6
    print(f"\nseed {number}: {answers.total()} mutilated requests, {honest} whole ones, {grown:+.1f} MB")
    print(dict(answers.most_common()))
    assert not before or grown < 30


def test_what_the_description_allows_and_what_it_does_not(serve, tmp_path):
    """Answers are as ``/openapi.json`` says, and never a 500.

    That bytes of any kind are taken as an image is not asked: the description cannot say what an image is.
    """
    process = serve()
    words = [f"http://127.0.0.1:{process.port}/openapi.json", "--max-examples", "300"]
    words += ["--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert process.end(signal.SIGTERM) == (0, "")


def test_it_drains_before_it_ends(serve):
    process = serve("--drain", "3")
    process.process.send_signal(signal.SIGTERM)
    until(lambda: process.ask("GET", "/ready")[0] == 503)
    assert process.ask("GET", "/live")[0] == 200
    assert len(process.detections(png((1, 2, 3)))) == 1
    assert process.process.wait(30) == 0
    with pytest.raises(OSError, match="refused"):
        process.ask("GET", "/ready")


def test_the_log_in_json(serve):
    process = serve("--log", "json")
    process.detections(png((1, 2, 3)))
    process.ask("POST", "/predict", b"no form", {**FORM, "X-Request-ID": "mine"})
    lines = [json.loads(line) for line in process.end(signal.SIGTERM)[1].splitlines()]
    first, second = (line for line in lines if line["message"] == "request")
    assert (first["status"], first["path"], first["client"]) == (200, "/predict", "127.0.0.1")
    assert (second["status"], second["request"]) == (400, "mine")
