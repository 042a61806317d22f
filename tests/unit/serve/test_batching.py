"""How images are gathered into batches."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sparse_exp.data.letterbox import Letterbox
from sparse_exp.errors import EngineError
from sparse_exp.serve.batching import Batcher
from sparse_exp.serve.metrics import Metrics

BOX = Letterbox(1, 1, 0, 0, (1, 1))


class Engine:
    """Answers an image with its number, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.running = self.most = 0
        self.free = asyncio.Event()
        self.error: Exception | None = None

    async def detect(self, squares, boxes):
        self.batches.append([int(square[0, 0, 0]) for square in squares])
        self.running += 1
        self.most = max(self.most, self.running)
        await self.free.wait()
        self.running -= 1
        if self.error:
            raise self.error
        return [square.reshape(-1, 3).astype(np.float32) for square in squares]


def play(scenario, **options) -> None:
    """Run a coroutine function of an engine and of a function that asks for one number."""

    async def run() -> None:
        engine = Engine()
        batcher = Batcher(engine.detect, Metrics(), **options)

        async def ask(number: int) -> int:
            answer = await batcher.detect(np.full((1, 1, 3), number, np.uint8), BOX)
            return int(answer.detections[0, 0])

        async with batcher.open():
            await asyncio.wait_for(scenario(engine, ask), 10)

    asyncio.run(run())


def test_a_lone_image_leaves_when_it_has_waited():
    async def scenario(engine, ask):
        engine.free.set()
        assert await ask(5) == 5
        assert engine.batches == [[5]]

    play(scenario, batch_size=4, max_wait=0.01, streams=1)


def test_a_full_batch_does_not_wait():
    async def scenario(engine, ask):
        engine.free.set()
        assert await asyncio.gather(*map(ask, range(4))) == [0, 1, 2, 3]
        assert engine.batches == [[0, 1, 2, 3]]

    play(scenario, batch_size=4, max_wait=60, streams=1)


@pytest.mark.parametrize("streams", [1, 2])
def test_while_the_engine_is_busy_batches_fill_up(streams):
    async def scenario(engine, ask):
        asked = []
        for number in range(streams + 1):  # each leaves alone, one of them ahead of its time
            asked.append(asyncio.create_task(ask(number)))
            while len(engine.batches) == number:
                await asyncio.sleep(0.001)
        for number in range(streams + 1, streams + 6):
            asked.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(0.02)
        assert len(engine.batches) == engine.most == streams + 1
        engine.free.set()
        assert await asyncio.gather(*asked) == list(range(streams + 6))
        assert [len(batch) for batch in engine.batches] == [1] * (streams + 1) + [3, 2]

    play(scenario, batch_size=3, max_wait=0.001, streams=streams)


def test_an_image_that_was_given_up_is_not_computed():
    async def scenario(engine, ask):
        first = [asyncio.create_task(ask(number)) for number in (0, 1)]
        await asyncio.sleep(0.01)
        given_up, kept = asyncio.create_task(ask(2)), asyncio.create_task(ask(3))
        await asyncio.sleep(0.01)
        given_up.cancel()
        engine.free.set()
        assert await asyncio.gather(*first, kept) == [0, 1, 3]
        assert engine.batches == [[0], [1], [3]]

    play(scenario, batch_size=1, max_wait=0, streams=1)


def test_a_failure_is_that_of_its_batch_alone():
    async def scenario(engine, ask):
        engine.free.set()
        engine.error = EngineError("It failed.")
        failed = await asyncio.gather(ask(1), ask(2), return_exceptions=True)
        assert failed == [engine.error] * 2
        engine.error = None
        assert await ask(3) == 3

    play(scenario, batch_size=2, max_wait=0.01, streams=1)
