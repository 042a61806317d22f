"""The timing loop, with engines that take as long as they are told."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from sparse_exp.engines.timing import batches_of, time_engine

BATCHES = [np.full((1, 1), index) for index in range(3)]


class Sleeper:
    """Takes the given seconds in turn, the last ones for ever; writes down what it was given."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.seen: list[int] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            seconds = self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]
            self.seen.append(int(images[0, 0]))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(seconds)
        with self._lock:
            self.at_once -= 1
        return []


def test_one_stream_runs_batches_round_and_round_until_the_time_is_over():
    engine = Sleeper(0.01)
    timing = time_engine(engine, BATCHES, 0.1)
    assert engine.seen == [index % 3 for index in range(len(timing.latencies))]
    assert min(timing.latencies) >= 0.01
    assert timing.wall >= 0.1
    assert sum(timing.latencies) <= timing.wall
    assert (timing.warmed, timing.stable) == (0.0, False)


def test_streams_run_at_once_begin_with_other_batches_and_all_count():
    engine = Sleeper(0.03)
    timing = time_engine(engine, BATCHES, 0.1, streams=3)
    assert engine.most_at_once == 3
    assert sorted(engine.seen[:3]) == [0, 1, 2]
    assert len(timing.latencies) == len(engine.seen)
    assert sum(timing.latencies) > timing.wall


def test_what_is_warmed_up_with_does_not_count():
    engine = Sleeper(0.2, 0.2, 0.01)
    timing = time_engine(engine, BATCHES, 0.05, warmup=0.3)
    assert max(timing.latencies) < 0.2
    assert timing.warmed >= 0.3
    assert len(timing.latencies) < len(engine.seen)


def test_the_warm_up_goes_on_until_latencies_are_stable():
    falling = [0.2 * 0.7**step for step in range(9)]  # to 12 ms
    timing = time_engine(Sleeper(*falling, 0.02), BATCHES, 0.01, warmup=0.01, max_warmup=6.0)
    assert timing.stable
    assert sum(falling) <= timing.warmed
    assert len(timing.latencies) == 1


def test_the_warm_up_ends_where_latencies_never_become_stable():
    endless = [0.01 * (1 + 4 * (step % 2)) for step in range(999)]
    timing = time_engine(Sleeper(*endless), BATCHES, 0.01, warmup=0.0, max_warmup=0.1)
    assert not timing.stable
    assert timing.warmed >= 0.1


def test_an_error_of_a_stream_is_not_lost():
    class Broken:
        def run(self, images: np.ndarray) -> list[np.ndarray]:
            raise ValueError("broken")

    for streams in (1, 2):
        with pytest.raises(ValueError, match="broken"):
            time_engine(Broken(), BATCHES, 0.1, streams=streams)


def test_batches_are_full_and_hold_every_image():
    batches = batches_of(np.arange(5), 2)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert all(batch.flags["C_CONTIGUOUS"] for batch in batches)
