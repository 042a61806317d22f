"""OpenVINO: the fastest dense runtime on most x86 CPUs. The only place that imports it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, OnnxEngine


class OpenVinoEngine(OnnxEngine):
    """OpenVINO on its CPU device; see `sparse_exp.engines.base.Engine`.

    Always the LATENCY hint, whatever the batch: inferences follow one another, and THROUGHPUT would
    cut the cores into streams of which one inference uses one. Layers in floating point run in f32:
    by itself OpenVINO takes bf16 where the CPU has it, and its numbers would then no longer compare
    with those of the other engines, nor its boxes with the exported model's. Quantized layers run in
    int8 all the same.
    """

    name = "openvino"
    requirement = "openvino>=2025.0"

    def _library(self) -> tuple[Any, str]:
        # Importing openvino reports usage to its maker, unless that package cannot be imported.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        return openvino, str(openvino.__version__).split("-")[0]

    def _compile(self, library: Any, model: Path, batch_size: int, cores: int) -> Execute:
        core = library.Core()
        network = core.read_model(str(model))
        network.reshape([batch_size, *list(network.inputs[0].partial_shape)[1:]])
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": cores,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        outputs = range(len(network.outputs))

        def execute(batch: np.ndarray) -> list[np.ndarray]:
            results = request.infer({0: batch}, share_inputs=True)  # outputs are copies
            return [results[index] for index in outputs]

        return execute
