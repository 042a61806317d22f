"""Threads in order and in bounds, with a stand-in for the detector."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sparse_exp.errors import EngineError
from sparse_exp.predict.pipeline import Input, Pipeline, in_batches, in_order


def test_results_come_in_order_and_not_too_many_at_once():
    lock, begun, taken, most = threading.Lock(), 0, 0, 0

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    def items():
        nonlocal begun, most
        for item in range(40):
            with lock:
                begun += 1
                most = max(most, begun - taken)
            yield item

    with ThreadPoolExecutor(4) as pool:
        for expected, result in enumerate(in_order(pool, work, items(), 5)):
            assert result == expected**2
            taken += 1
    assert taken == 40
    assert most <= 5


def test_an_error_comes_in_its_turn():
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with ThreadPoolExecutor(2) as pool:
        results = in_order(pool, work, range(10), 4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)


def test_what_came_before_an_error_comes_through_all_steps_before_it():
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        results = in_order(second, lambda item: item * 10, in_order(first, fail_at_three, range(10), 2), 8)
        assert [next(results) for _ in range(3)] == [0, 10, 20]
        with pytest.raises(ValueError, match="three"):
            next(results)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_count_only_what_counts(size):
    items = list(range(20))
    batches = list(in_batches(items, size, lambda item: item % 3 != 0))
    assert [item for batch in batches for item in batch] == items
    assert all(sum(item % 3 != 0 for item in batch) == size for batch in batches[:-1])
    assert sum(item % 3 != 0 for item in batches[-1]) <= size


class Detector:
    """Finds one box in each image: its confidence says how dark the image is."""

    model = SimpleNamespace(imgsz=16)
    names = ("thing", "other")

    def __init__(self, batch_size: int, streams: int) -> None:
        self.batch_size, self.streams = batch_size, streams
        self.batches: list[int] = []

    def infer(self, squares):
        self.batches.append(len(squares))
        return np.stack([square.mean() for square in squares])

    def suppress(self, prediction, box):
        return np.array([[0, 0, *box.size, prediction / 255, 1]], np.float32)


@pytest.fixture
def images(tmp_path):
    paths = []
    for number in range(9):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16 + number, 16), (20 * number,) * 3).save(path)
        paths.append(path)
    paths[4].write_bytes(paths[4].read_bytes()[:40])  # cut off
    return paths


@pytest.mark.parametrize(("batch_size", "streams"), [(1, 1), (1, 3), (4, 2)])
def test_every_image_gets_its_own_answer(images, batch_size, streams):
    detector = Detector(batch_size, streams)
    with Pipeline(detector, None, threads=2) as pipeline:
        found = list(pipeline.run(map(Input, images)))
    assert [one.input.file for one in found] == images
    assert [bool(one.problem) for one in found] == [number == 4 for number in range(9)]
    for number, one in enumerate(found):
        if number != 4:
            assert one.size == (16 + number, 16)
            padded = number / (16 + number)  # share of the square that the letterbox's grey covers
            mean = 20 * number * (1 - padded) + 114 * padded
            assert one.detections[0, 4] * 255 == pytest.approx(mean, abs=8)
    assert "4.png" in found[4].problem
    assert max(detector.batches) == batch_size
    assert sum(detector.batches) == 8


def test_pictures_are_of_the_whole_image(tmp_path):
    """A JPEG that is scaled while it is decoded is drawn on at its own size."""
    path = tmp_path / "large.jpg"
    Image.new("RGB", (400, 330), (250, 250, 250)).save(path)
    with Pipeline(Detector(1, 1), lambda picture: picture.copy(), threads=1) as pipeline:
        (found,) = pipeline.run([Input(path)])
    assert found.drawn.size == (400, 330)
    assert found.drawn.getpixel((0, 200)) != (250, 250, 250)  # the left edge of the box


def test_a_failing_engine_ends_it(images):
    detector = Detector(1, 1)

    def fail(squares):
        raise EngineError("no more")

    detector.infer = fail
    before = threading.active_count()
    with Pipeline(detector, None, threads=2) as pipeline, pytest.raises(EngineError, match="no more"):
        list(pipeline.run(map(Input, images)))
    assert threading.active_count() == before
