"""How long inferences take: streams that run one after the other, for a while, and before it a warm-up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import numpy as np

STABLE = 0.03  # by which medians of successive windows of a warm-up may differ
_WINDOWS = 20  # at most, in a warm-up


@dataclass(frozen=True)
class Timing:
    """What was measured of an engine.

    Attributes:
        latencies: seconds of each inference, from its call to its results, stream by stream, in order.
        wall: seconds of the timed part, from the first call to the last results.
        warmed: seconds really spent warming up before.
        stable: the last two windows of the warm-up had the same median latency within `STABLE`; False
            where there was none.
    """

    latencies: tuple[float, ...]
    wall: float
    warmed: float
    stable: bool


class _Runs(Protocol):
    def run(self, images: np.ndarray) -> list[np.ndarray]: ...


def time_engine(
    engine: _Runs,
    batches: Sequence[np.ndarray],
    seconds: float,
    *,
    warmup: float = 0.0,
    max_warmup: float | None = None,
    streams: int = 1,
) -> Timing:
    """Keep an engine busy with closed loops, and time each inference.

    Each stream calls ``run`` again as soon as the last one has returned. What it runs when the time is
    over it ends, and counts.

    Args:
        engine: what to time; from ``streams`` threads at once.
        batches: to run, round and round, each stream beginning with another; at least one.
        seconds: how long to measure; each stream runs once at least.
        warmup: least seconds to run before, not counted.
        max_warmup: most seconds to run before, where latencies are not stable yet; None: ``warmup``.
        streams: loops at once, each in a thread; one runs in the caller's.
    """
    with ThreadPoolExecutor(
        streams
    ) as pool:  # a runtime may keep things for each thread: warm those that count
        loops = _Loops(engine, batches, pool, streams)
        warmed, stable = _warm(loops, warmup, max(warmup, max_warmup or 0.0))
        latencies, wall = loops.run(seconds)
    return Timing(tuple(latencies), wall, warmed, stable)


def batches_of(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Full batches of (N, ...) images, each contiguous; the last is filled up from the first image.

    >>> [batch.tolist() for batch in batches_of(np.arange(3), 2)]
    [[0, 1], [2, 0]]
    """
    count = -(-len(images) // batch_size)
    indices = np.arange(count * batch_size) % len(images)
    return [np.ascontiguousarray(images[part]) for part in indices.reshape(count, batch_size)]


class _Loops:
    """Streams that go on with their batches from one call to the next."""

    def __init__(
        self, engine: _Runs, batches: Sequence[np.ndarray], pool: ThreadPoolExecutor, streams: int
    ) -> None:
        self._engine, self._pool = engine, pool
        self._batches = [islice(cycle(batches), stream % len(batches), None) for stream in range(streams)]
        self._together = threading.Barrier(streams)

    def run(self, seconds: float) -> tuple[list[float], float]:
        """Latencies of all streams, and the seconds from the first call to the last results."""
        if len(self._batches) == 1:
            times = [self._loop(self._batches[0], seconds)]
        else:
            times = list(self._pool.map(self._loop, self._batches, [seconds] * len(self._batches)))
        latencies = [end - start for stream in times for start, end in stream]
        return latencies, max(stream[-1][1] for stream in times) - min(stream[0][0] for stream in times)

    def _loop(self, batches: Iterator[np.ndarray], seconds: float) -> list[tuple[float, float]]:
        times: list[tuple[float, float]] = []
        self._together.wait()
        for batch in batches:
            start = time.perf_counter()
            self._engine.run(batch)
            end = time.perf_counter()
            times.append((start, end))
            if end - times[0][0] >= seconds:
                break
        return times


def _warm(loops: _Loops, least: float, most: float) -> tuple[float, bool]:
    """Run windows until two in a row agree; returns the seconds spent and whether they did."""
    window = max(least / 2, most / _WINDOWS)
    spent, last = 0.0, 0.0
    while spent < most:
        latencies, wall = loops.run(min(window, most - spent))
        median, before = float(np.median(latencies)), last
        spent, last = spent + wall, median
        stable = before > 0 and abs(median - before) <= STABLE * before
        if stable and spent >= least:
            return spent, True
    return spent, False
