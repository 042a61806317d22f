"""Times inferences: after a warm-up, one or several streams run one inference after the other for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

import numpy as np

STABLE = 0.03  # relative difference that the medians of successive windows of a warm-up may have
_WINDOWS = 20  # most windows of a warm-up
_THREADS = "/proc/self/task"


@dataclass(frozen=True)
class Timing:
    """The times of an engine's inferences.

    Attributes:
        latencies: seconds of each inference, from its call to its results, stream by stream, in order.
        wall: seconds from the first call to the last results, without the warm-up.
        warmed: seconds that the warm-up took.
        stable: the median latencies of the last two windows of the warm-up differed by at most `STABLE`;
            False where there was no warm-up.
        waited: share of the time in which threads of this process could have run, 0..1, that they had no CPU
            meanwhile; 0 where the system does not tell.
    """

    latencies: tuple[float, ...]
    wall: float
    warmed: float
    stable: bool
    waited: float = 0.0


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

    Each stream calls ``run`` again as soon as its last call has returned. A call that is under way when the
    time is over is finished, and counts.

    Args:
        engine: what to time; it is called from ``streams`` threads at once.
        batches: at least one; each stream runs them in turn, again and again, and begins with another.
        seconds: how long to measure; each stream makes one call at least.
        warmup: least seconds of warm-up, which do not count.
        max_warmup: most seconds of warm-up, where latencies are not stable before; None: ``warmup``.
        streams: loops at once, each in a thread; a single one runs in the caller's thread.
    """
    # An engine may keep things for each thread, so the threads that are timed are also warmed up.
    with ThreadPoolExecutor(streams) as pool:
        loops = _Loops(engine, batches, pool, streams)
        warmed, stable = _warm(loops, warmup, max(warmup, max_warmup or 0.0))
        before = _times_of_threads()
        latencies, wall = loops.run(seconds)
        waited = _waited(before, _times_of_threads())
    return Timing(tuple(latencies), wall, warmed, stable, waited)


def batches_of(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Full batches of images (N, ...), each contiguous; the last is filled up with the first images.

    >>> [batch.tolist() for batch in batches_of(np.arange(3), 2)]
    [[0, 1], [2, 0]]
    """
    count = -(-len(images) // batch_size)
    indices = np.arange(count * batch_size) % len(images)
    return [np.ascontiguousarray(images[part]) for part in indices.reshape(count, batch_size)]


class _Loops:
    """The streams; each goes on with its batches from one call of `run` to the next."""

    def __init__(
        self, engine: _Runs, batches: Sequence[np.ndarray], pool: ThreadPoolExecutor, streams: int
    ) -> None:
        self._engine, self._pool = engine, pool
        self._batches = [islice(cycle(batches), stream % len(batches), None) for stream in range(streams)]
        self._together = threading.Barrier(streams)

    def run(self, seconds: float) -> tuple[list[float], float]:
        """Latencies of all streams, and seconds from the first call to the last results."""
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
    """Run windows until the medians of two in a row agree; returns the seconds, and whether they agreed."""
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


def _times_of_threads() -> dict[str, tuple[int, int]]:
    """Of each thread of this process the nanoseconds on a CPU, and those it could have run and had none.

    Linux counts both (https://docs.kernel.org/scheduler/sched-stats.html); elsewhere there is nothing.
    """
    found = {}
    for file in Path(_THREADS).glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, file.read_text().split())
        except (OSError, ValueError):  # the thread has ended; or the kernel does not count
            continue
        found[file.parent.name] = ran, waited
    return found


def _waited(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float:
    """The share of the threads' time that they had no CPU, 0..1, between two looks at their times."""
    spent = [
        (ran - before.get(thread, (0, 0))[0], waited - before.get(thread, (0, 0))[1])
        for thread, (ran, waited) in after.items()
    ]
    ran, waited = (sum(times) for times in zip(*spent)) if spent else (0, 0)  # noqa: B905 - Python 3.8
    return waited / (ran + waited) if ran + waited > 0 else 0.0
