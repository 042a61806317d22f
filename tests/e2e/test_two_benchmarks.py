"""Two benchmarks that are started together: one waits for the other, and knows for whom."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

SQUARE = Path(__file__).parents[2] / "benchmarks" / "square.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def start(deployment, tmp_path):
    """A function that starts a benchmark of two cells, on a host of the test's own."""
    processes = []

    def begin(name: str, seconds: float) -> subprocess.Popen:
        words = [
            f"--cell=n={engine}:dense:{deployment / 'dense.onnx'}" for engine in ("openvino", "onnxruntime")
        ]
        words += ["--seconds", str(seconds), "--repeats", "2", "--warmup", "0", "--max-warmup", "0"]
        words += ["--tune-s", "0", "--budget-s", "0", "--out", str(tmp_path / f"{name}.json")]
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, SQUARE, *words],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "SPARSE_EXP_LOCKS": str(tmp_path)},
            )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def interval(rows: Path) -> tuple[datetime, datetime]:
    read = json.loads(rows.read_text())
    assert len(read) == 2
    (both,) = {(row["started"], row["ended"]) for row in read}
    first, last = map(datetime.fromisoformat, both)
    return first, last


def test_two_benchmarks_measure_one_after_the_other_and_the_second_says_for_whom_it_waits(start, tmp_path):
    processes = {name: start(name, 0.5) for name in ("a", "b")}
    assert [process.wait(180) for process in processes.values()] == [0, 0]
    (begin, end), (next_begin, next_end) = sorted(interval(tmp_path / f"{name}.json") for name in "ab")
    assert begin < end <= next_begin < next_end
    first, second = sorted("ab", key=lambda name: interval(tmp_path / f"{name}.json"))
    (told,) = re.findall(
        r"measuring: process (\d+) .*; process (\d+) on", (tmp_path / f"{second}.log").read_text()
    )
    assert told == (str(processes[first].pid), str(processes[second].pid))
    assert "waits" not in (tmp_path / f"{first}.log").read_text()


def test_a_benchmark_that_is_killed_lets_the_next_one_go_on(start, tmp_path):
    killed = start("killed", 600)
    until(lambda: "Measuring 2 cells" in (tmp_path / "killed.log").read_text())
    waiting = start("waiting", 0.1)
    until(lambda: "waits" in (tmp_path / "waiting.log").read_text())
    killed.send_signal(signal.SIGKILL)
    assert waiting.wait(120) == 0
    interval(tmp_path / "waiting.json")
    assert not (tmp_path / "killed.json").exists()


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)
