"""ONNX Runtime: the baseline that everybody has. The only place that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, OnnxEngine

_ERRORS_ONLY = 3


class OnnxRuntimeEngine(OnnxEngine):
    """ONNX Runtime on its CPU provider; see `sparse_exp.engines.base.Engine`.

    All graph optimizations, one thread per core, nodes in sequence: a detector's graph is a chain,
    so that a second pool for parallel nodes would only take cores from the first.
    """

    name = "onnxruntime"
    requirement = "onnxruntime>=1.17"
    fixed_batch = False

    def _library(self) -> tuple[Any, str]:
        import onnxruntime

        return onnxruntime, str(onnxruntime.__version__)

    def _compile(self, library: Any, model: Path, batch_size: int, cores: int) -> Execute:
        options = library.SessionOptions()
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = cores
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        session = library.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def execute(batch: np.ndarray) -> list[np.ndarray]:
            outputs: list[np.ndarray] = session.run(None, {name: batch})
            return outputs

        return execute
