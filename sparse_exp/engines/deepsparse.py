"""DeepSparse: the runtime that turns zeros into speed. The only place that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, OnnxEngine


class DeepSparseEngine(OnnxEngine):
    """DeepSparse 1.8, the last release (2024); see `sparse_exp.engines.base.Engine`.

    It compiles for one batch size, and pins its threads to cores.
    """

    name = "deepsparse"
    requirement = "deepsparse==1.8.0"
    needs = "x86 with AVX2 or AVX-512"

    def _library(self) -> tuple[Any, str]:
        import deepsparse

        return deepsparse, str(deepsparse.__version__)

    def _compile(self, library: Any, model: Path, batch_size: int, cores: int) -> Execute:
        engine = library.Engine(str(model), batch_size=batch_size, num_cores=cores)

        def execute(batch: np.ndarray) -> list[np.ndarray]:
            # DeepSparse knows types by identity, and an array that was unpickled has a dtype of its own.
            outputs: list[np.ndarray] = engine.run([batch.view(np.uint8)])
            return outputs

        return execute
