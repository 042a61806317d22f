from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sparse_exp import benchmark as module
from sparse_exp.benchmark import Cell, benchmark, summarize
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import EngineError

CELL = Cell("deepsparse", "sparse", Path("model.onnx"), 4)
IMAGES = np.zeros((3, 3, 32, 32), np.uint8)
ROUNDS = [[0.1, 0.1, 0.2], [0.05] * 8, [0.4]]  # 4 * 3/0.4 = 30, 4 * 8/0.4 = 80, 4 * 1/0.4 = 10


def test_items_per_second_is_the_median_of_the_repeats_and_the_spread_their_range_over_it():
    measured = summarize(CELL, ROUNDS, {})
    assert measured.repeats == pytest.approx((30, 80, 10))
    assert measured.items_per_s == pytest.approx(30)
    assert measured.spread == pytest.approx((80 - 10) / 30)
    assert measured.runs == 12


def test_percentiles_are_those_of_all_latencies_in_milliseconds():
    latencies = np.random.default_rng(0).gamma(2, 0.01, 200)
    measured = summarize(CELL, [list(latencies[:50]), list(latencies[50:])], {})
    in_order = sorted(1e3 * latencies)
    hundredths = statistics.quantiles(in_order, n=100, method="inclusive")
    assert measured.latency_p50_ms == pytest.approx(statistics.median(in_order))
    assert measured.latency_p90_ms == pytest.approx(hundredths[89])
    assert measured.latency_p99_ms == pytest.approx(hundredths[98])


def test_one_repeat_has_no_spread():
    assert summarize(CELL, [[0.1, 0.3]], {}).spread == 0


def test_metrics_have_the_names_of_the_result():
    assert summarize(CELL, ROUNDS, {}).metrics() == pytest.approx(
        {
            "benchmark/deepsparse/sparse/b4/items_per_s": 30,
            "benchmark/deepsparse/sparse/b4/latency_p50_ms": 50,
            "benchmark/deepsparse/sparse/b4/latency_p90_ms": 190,
            "benchmark/deepsparse/sparse/b4/latency_p99_ms": 378,
            "benchmark/deepsparse/sparse/b4/spread": 70 / 30,
        }
    )


class FakeEngine:
    """Answers at once; writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.version, self._log = name, "", log

    def load(self, model, *, batch_size, cores):
        if model.name == "broken.onnx":
            raise EngineError("broken.onnx cannot be loaded")
        self.version = "1.2.3"
        self._batch, self._cores = batch_size, cores
        self._log.append(("load", self.name))

    def run(self, images):
        self._log.append(("run", self.name))
        return [np.zeros((len(images), 1, 6), np.float32)]

    def measure(self, images, seconds, warmup):
        self._log.append(("measure", self.name, seconds, warmup))
        return [0.5, 0.5] if self.name == "openvino" else [0.25]

    def close(self):
        self._log.append(("close", self.name))


@pytest.fixture
def log(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "IsolatedEngine", lambda name: FakeEngine(name, calls))
    monkeypatch.setattr(module, "_busy_cores", lambda: 0.0)
    return calls


TWO = [Cell("openvino", "dense", Path("a.onnx"), 1), Cell("deepsparse", "sparse", Path("b.onnx"), 2)]


def test_cells_are_all_loaded_then_measured_in_turns_then_closed(log, tmp_path):
    hardware = HardwareConfig(name="cpu", repeats=2, warmup_s=0.5, duration_s=2.0)
    first, second = benchmark(TWO, IMAGES, hardware=hardware, cores=1, lock_path=tmp_path / "lock")
    turn = [("measure", "openvino", 2.0, 0.5), ("measure", "deepsparse", 2.0, 0.5)]
    loads = [(what, cell.engine) for cell in TWO for what in ("load", "run")]
    assert log == [*loads, *turn, *turn, ("close", "deepsparse"), ("close", "openvino")]
    assert (first.cell, second.cell) == tuple(TWO)
    assert first.items_per_s == pytest.approx(2)  # 1 image * 2 runs in 1 s
    assert second.items_per_s == pytest.approx(8)  # 2 images in 0.25 s
    assert len(first.repeats) == 2


def test_a_number_carries_its_conditions(log, tmp_path):
    hardware = HardwareConfig(name="cpu", repeats=1, warmup_s=0.5, duration_s=2.0)
    measured = benchmark(TWO, IMAGES, hardware=hardware, cores=1, lock_path=tmp_path / "lock")[1]
    facts = {
        key: measured.conditions.pop(key)
        for key in ("cpu", "isa", "load_average", "busy_cores", "started", "ended")
    }
    assert measured.conditions == {
        "engine": "deepsparse", "variant": "sparse", "version": "1.2.3", "cores": 1, "batch": 2, "imgsz": 32,
        "scenario": "sync", "warmup_s": 0.5, "duration_s": 2.0, "repeats": 1,
    }  # fmt: skip
    assert json.dumps(facts)


def test_an_engine_that_fails_stops_before_anything_is_timed_and_all_are_closed(log, tmp_path):
    cells = [TWO[0], Cell("onnxruntime", "dense", Path("broken.onnx"), 1)]
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        benchmark(cells, IMAGES, hardware=HardwareConfig(name="cpu"), cores=1, lock_path=tmp_path / "lock")
    assert ("load", "openvino") in log
    assert not [call for call in log if call[0] == "measure"]
    assert log[-2:] == [("close", "onnxruntime"), ("close", "openvino")]


def test_warns_when_other_programs_are_busy(log, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_busy_cores", lambda: 1.04)
    benchmark(
        TWO, IMAGES, hardware=HardwareConfig(name="cpu", repeats=1), cores=1, lock_path=tmp_path / "lock"
    )
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1.0 cores busy" in warning.getMessage()


@pytest.mark.parametrize(
    ("shares", "affinity", "cores"), [([100.0, 50.0, 9.0], {0, 1}, 1.5), ([4.0], {0, 1}, 0.04)]
)
def test_busy_cores_counts_only_those_that_can_be_used(shares, affinity, cores, monkeypatch):
    monkeypatch.setattr(module.psutil, "cpu_percent", lambda interval, percpu: shares)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: affinity)
    assert module._busy_cores() == pytest.approx(cores)


def test_the_lock_is_held_while_cells_are_measured(log, tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    held = []

    def measure(self, images, seconds, warmup):
        started = time.monotonic()
        probe = "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        held.append(subprocess.run([sys.executable, "-c", probe, lock], capture_output=True).returncode != 0)
        return [time.monotonic() - started]

    monkeypatch.setattr(FakeEngine, "measure", measure)
    benchmark(TWO, IMAGES, hardware=HardwareConfig(name="cpu", repeats=1), cores=1, lock_path=lock)
    assert held == [True, True]
