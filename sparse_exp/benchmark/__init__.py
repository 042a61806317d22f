"""Throughput and latency of exported models, measured so that the numbers can be compared.

Each cell (an engine with a model and a batch size) runs in a process of its own. The cells are
measured in turns, so that a drift of the machine hits all of them alike, and under a host-wide lock
(`sparse_exp.host`): other runs of this program neither measure nor train meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sparse_exp.config.schema import HardwareConfig
from sparse_exp.engines.isolated import IsolatedEngine
from sparse_exp.hardware import host_facts
from sparse_exp.host import default_lock_path, measuring_alone
from sparse_exp.progress import progress

_log = logging.getLogger(__name__)
_BUSY_CORES = 0.2


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: ``"dense"`` (fp32, not sparse) or ``"sparse"`` (what the run deploys).
        model: the ONNX file for this engine.
        batch_size: images of one inference.
    """

    engine: str
    variant: str
    model: Path
    batch_size: int

    @property
    def name(self) -> str:
        """``<engine>/<variant>/b<batch>``, as in the names of metrics."""
        return f"{self.engine}/{self.variant}/b{self.batch_size}"


@dataclass(frozen=True)
class Measurement:
    """What was measured of a cell, with its conditions.

    Attributes:
        cell: what was measured.
        items_per_s: images per second: the median over the repeats.
        latency_p50_ms: median time of one inference of a batch, over all repeats.
        latency_p90_ms: its 90th percentile.
        latency_p99_ms: its 99th percentile.
        spread: (largest - smallest) / median of items/s over the repeats; 0 for one repeat.
        repeats: images per second of each repeat, in order.
        runs: inferences that were timed.
        conditions: engine, variant, version, cores, batch, imgsz, scenario, isa, cpu, warmup_s,
            duration_s, repeats, started and ended (of the interval in which the host was kept for the
            cells, UTC, ISO 8601), and load_average (1 minute) and busy_cores (by other processes) just
            before.
    """

    cell: Cell
    items_per_s: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    spread: float
    repeats: tuple[float, ...]
    runs: int
    conditions: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of `result.json`."""
        names = ("items_per_s", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "spread")
        return {f"benchmark/{self.cell.name}/{name}": getattr(self, name) for name in names}


def benchmark(
    cells: Sequence[Cell],
    images: np.ndarray,
    *,
    hardware: HardwareConfig,
    cores: int,
    lock_path: Path | None = None,
) -> list[Measurement]:
    """Measure cells on this host, one inference after the other ("sync").

    All cells are loaded and tried before anything is timed. Then, ``hardware.repeats`` times, each
    cell in turn runs ``hardware.warmup_s`` seconds untimed and ``hardware.duration_s`` seconds timed.

    Args:
        cells: what to measure.
        images: real photos, uint8 (N, 3, H, W); batches are taken from them in turn.
        hardware: warmup_s, duration_s and repeats.
        cores: that each engine runs on.
        lock_path: file of the host-wide lock; None: `default_lock_path`.

    Returns:
        One measurement for each cell, in their order.

    Raises:
        MissingDependency: an engine is not installed.
        EngineError: an engine cannot load or run its model, or died.
    """
    with measuring_alone(lock_path or default_lock_path()), ExitStack() as stack:
        started = datetime.now(timezone.utc)
        _log.info("Measuring %d cells alone on this host.", len(cells))
        conditions = {**_host_conditions(), **_settings(hardware, cores, images)}
        engines = [_loaded(cell, images, cores, stack) for cell in cells]
        rounds = _measure_in_turns(cells, engines, images, hardware)
        versions = [engine.version for engine in engines]
        ended = datetime.now(timezone.utc)
        _log.info("Measured %d cells in %.1f s.", len(cells), (ended - started).total_seconds())
    conditions |= {"started": started.isoformat(), "ended": ended.isoformat()}
    return [
        summarize(cell, latencies, {"version": version, **conditions})
        for cell, latencies, version in zip(cells, rounds, versions, strict=True)
    ]


def summarize(cell: Cell, rounds: Sequence[Sequence[float]], conditions: dict[str, Any]) -> Measurement:
    """Reduce latencies to the numbers that are reported.

    Args:
        cell: what was measured.
        rounds: for each repeat, the seconds of each inference; none empty.
        conditions: what to say beside the cell's own.
    """
    repeats = [cell.batch_size * len(latencies) / sum(latencies) for latencies in rounds]
    median = float(np.median(repeats))
    milliseconds = 1e3 * np.concatenate([np.asarray(latencies) for latencies in rounds])
    p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, (50, 90, 99)))
    own = {"engine": cell.engine, "variant": cell.variant, "batch": cell.batch_size}
    return Measurement(
        cell=cell,
        items_per_s=median,
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        spread=(max(repeats) - min(repeats)) / median,
        repeats=tuple(repeats),
        runs=len(milliseconds),
        conditions={**own, **conditions},
    )


def _host_conditions() -> dict[str, Any]:
    facts = host_facts()
    busy = _busy_cores()
    if busy > _BUSY_CORES:
        _log.warning("Other programs keep %.1f cores busy: close them, or the numbers are too low.", busy)
    return {
        "cpu": facts.cpu,
        "isa": facts.isa,
        "load_average": round(os.getloadavg()[0], 2),
        "busy_cores": round(busy, 2),
    }


def _busy_cores() -> float:
    """Cores that are busy now among those that this process may use, while it sleeps itself."""
    shares = psutil.cpu_percent(interval=0.5, percpu=True)
    usable = [cpu for cpu in os.sched_getaffinity(0) if cpu < len(shares)]
    return float(sum(shares[cpu] for cpu in usable)) / 100


def _settings(hardware: HardwareConfig, cores: int, images: np.ndarray) -> dict[str, Any]:
    return {
        "cores": cores,
        "imgsz": int(images.shape[-1]),
        "scenario": "sync",
        "warmup_s": hardware.warmup_s,
        "duration_s": hardware.duration_s,
        "repeats": hardware.repeats,
    }


def _loaded(cell: Cell, images: np.ndarray, cores: int, stack: ExitStack) -> IsolatedEngine:
    engine = stack.enter_context(closing(IsolatedEngine(cell.engine)))
    engine.load(cell.model, batch_size=cell.batch_size, cores=cores)
    engine.run(images[:1])
    return engine


def _measure_in_turns(
    cells: Sequence[Cell], engines: Sequence[IsolatedEngine], images: np.ndarray, hardware: HardwareConfig
) -> list[list[list[float]]]:
    """For each cell, for each repeat: the seconds of each inference."""
    rounds: list[list[list[float]]] = [[] for _ in cells]
    with progress("Benchmark", total=len(cells) * hardware.repeats, unit="measurements") as bar:
        for _ in range(hardware.repeats):
            for cell, engine, latencies in zip(cells, engines, rounds, strict=True):
                bar.advance(0, note=cell.name)
                latencies.append(engine.measure(images, hardware.duration_s, hardware.warmup_s))
                bar.advance()
    return rounds
