"""The process of the detector, where none can be had."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from sparse_exp.errors import EngineError
from sparse_exp.predict.models import Model
from sparse_exp.serve.worker import DetectorSettings, Worker


def test_without_room_for_a_process_the_engine_cannot_be_started():
    """What the service may try again later, and no other error, which would end that."""

    async def start() -> None:
        worker = Worker(Model(Path("model.onnx"), (), 64, "onnxruntime", "model"), DetectorSettings())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # what is open stays
        try:
            with pytest.raises(EngineError, match="open files") as caught:
                await worker.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            worker.close()
        assert "\n" not in str(caught.value)

    asyncio.run(start())
