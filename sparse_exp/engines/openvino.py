"""OpenVINO, the fastest engine for dense networks on most x86 CPUs; imported here only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, LocalEngine, Setup
from sparse_exp.engines.profile import RUNS, Profile, merged
from sparse_exp.engines.signature import Port, Signature, check_detector

_IR = ".xml"


class OpenVinoEngine(LocalEngine):
    """OpenVINO on its CPU device; see `sparse_exp.engines.base.Engine`. It also opens its own IR (.xml).

    The hint is LATENCY for every batch size, with as many streams as are asked for: THROUGHPUT would cut
    the cores into streams of its own, and one inference after the other would use only one of them. Layers
    in floating point run in f32. By default OpenVINO takes bf16 where the CPU has it; then its speed could
    not be compared with that of other engines, nor its boxes with those of the exported model. Quantized
    layers run in int8 in any case.

    Options: ``pinning`` pins threads to cores; ``partitioner`` is how the work of a layer is divided among
    the threads; ``denormals`` are computed, or taken for zero, which is faster where there are some.
    """

    name = "openvino"
    choices = MappingProxyType(
        {"pinning": (True, False), "partitioner": ("STATIC", "AUTO"), "denormals": (True, False)}
    )

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        space: list[dict[str, Any]] = [{}, {"denormals": False}]
        if cores > streams:  # a stream of one thread has nothing to divide
            space.append({"partitioner": "AUTO"})
        return [*space, {"pinning": False}]

    def _library(self) -> tuple[Any, str]:
        openvino = import_openvino()
        return openvino, str(openvino.__version__).split("-")[0]

    def _read(self, model: Path) -> Signature | None:
        return None if model.suffix == _IR else super()._read(model)

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        compiled = self._network(library, setup, {})
        return [_execute(library, compiled.create_infer_request()) for _ in range(setup.lanes)]

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """By the library's own counters, averages; see `sparse_exp.engines.IsolatedEngine.profile`."""
        settings = {"PERF_COUNT": True, "NUM_STREAMS": 1}
        compiled = self._network(library, setup, settings)
        names, request = _original_names(compiled), compiled.create_infer_request()
        for _ in range(RUNS):
            request.infer({0: batch})
        times = [
            (names[node.node_name], node.node_type, node.real_time.total_seconds() * 1e3)
            for node in request.profiling_info
            if node.status == library.ProfilingInfo.Status.EXECUTED
        ]
        return Profile(merged(times), None, "OpenVINO's performance counters, one stream")

    def _network(self, library: Any, setup: Setup, more: dict[str, Any]) -> Any:
        core = library.Core()
        network = core.read_model(str(setup.model))
        if setup.model.suffix == _IR:
            self._signature = _signature(network)
            check_detector(setup.model, self._signature, setup.batch_size)
        network.reshape([setup.batch_size, *list(network.inputs[0].partial_shape)[1:]])
        return core.compile_model(network, "CPU", {**_settings(setup), **more})


def import_openvino() -> Any:
    """Import openvino without reporting to its maker that it is used.

    It reports that as it is imported, unless the package ``openvino_telemetry`` cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _settings(setup: Setup) -> dict[str, Any]:
    options = setup.options
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": setup.lanes,
        "INFERENCE_NUM_THREADS": setup.cores,
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_DENORMALS_OPTIMIZATION": not options.get("denormals", True),
        "ENABLE_CPU_PINNING": options.get("pinning"),
        "TBB_PARTITIONER": options.get("partitioner"),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _execute(library: Any, request: Any) -> Execute:
    """A function that runs into new arrays: copying the request's own takes up to a tenth of an inference."""
    outputs = [(index, tuple(port.shape)) for index, port in enumerate(request.model_outputs)]

    def execute(batch: np.ndarray) -> list[np.ndarray]:
        arrays = [np.empty(shape, np.float32) for _, shape in outputs]
        for (index, _), array in zip(outputs, arrays, strict=True):
            request.set_output_tensor(index, library.Tensor(array, shared_memory=True))
        request.set_input_tensor(library.Tensor(batch, shared_memory=True))
        request.infer(share_inputs=True, share_outputs=True)
        return arrays

    return execute


def _original_names(compiled: Any) -> dict[str, str]:
    """For each node that runs, the node of the file that it comes from, if it says so; else its own name."""
    names = {}
    for node in compiled.get_runtime_model().get_ops():
        own = node.get_friendly_name()
        originals = str(node.get_rt_info()["originalLayersNames"].value).split(",")
        names[own] = next((name for name in originals if name.startswith("/")), own)
    return names


def _signature(network: Any) -> Signature:
    return Signature(tuple(map(_port, network.inputs)), tuple(map(_port, network.outputs)))


def _port(port: Any) -> Port:
    shape = port.partial_shape
    sizes = None
    if shape.rank.is_static:
        sizes = tuple(size.get_length() if size.is_static else None for size in shape)
    return Port(port.any_name if port.names else "", port.element_type.to_dtype().name, sizes)
