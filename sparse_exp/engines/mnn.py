"""MNN, which skips zeros of convolutions in floating point, on x86 and ARM; imported here only."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, LocalEngine, Setup, silence
from sparse_exp.engines.profile import Profile
from sparse_exp.engines.signature import Signature
from sparse_exp.errors import EngineError

_UNKNOWN = re.compile(r"Not Support: ONNX::(\w+)")
_CPU = 0  # of MNN's backends
_DO = "Take a network in fp32: it runs no quantized ONNX file."


class MnnEngine(LocalEngine):
    """MNN on its CPU backend; see `sparse_exp.engines.base.Engine`.

    A model is converted to MNN's own format as it is loaded, which takes a second; layers with enough zeros,
    single or in blocks of output channels, get its sparse kernels. Convolutions run in fp32. MNN's converter
    makes no network of a quantized ONNX file that MNN could run. Each stream has a network on its share of
    the cores.

    Options: ``sparse``: whether sparse kernels are used; of few zeros the dense ones can be faster.
    """

    name = "mnn"
    choices = MappingProxyType({"sparse": (True, False)})

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        return [{}, {"sparse": False}]

    def _library(self) -> tuple[Any, str]:
        import MNN

        return MNN, version("MNN")

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        signature = self._signature
        assert signature is not None
        with tempfile.TemporaryDirectory() as folder:
            converted = _converted(setup, Path(folder))
            lanes = [
                _execute(library, _network(library, converted, signature, threads))
                for threads in setup.threads()
            ]
        size = signature.size or (0, 0)
        for lane in lanes:
            if not lane(np.zeros((setup.batch_size, 3, *size), np.uint8)):
                raise EngineError(f"mnn cannot run {setup.model}. {_DO}")
        return lanes

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        raise EngineError("mnn has no profiler that Python can ask.")


def _converted(setup: Setup, folder: Path) -> Path:
    """The model in MNN's format."""
    import _tools  # MNN's converter; not MNN.tools, which runs pip install as it is imported

    target = folder / f"{setup.model.stem}.mnn"
    words = ["mnnconvert", "-f", "ONNX", "--modelFile", str(setup.model), "--MNNModel", str(target)]
    words += ["--detectSparseSpeedUp"] if setup.options.get("sparse", True) else []
    with silence() as printed:
        _tools.mnnconvert([*words, "--bizCode", "detector"])
        ctypes.CDLL(None).fflush(None)
        printed.seek(0)
        unknown = _UNKNOWN.search(printed.read().decode(errors="replace"))
    if not target.is_file():
        why = f"it has no operator {unknown[1]}" if unknown else "its converter makes nothing of it"
        raise EngineError(f"mnn cannot compile {setup.model}: {why}. {_DO}")
    return target


def _network(library: Any, file: Path, signature: Signature, threads: int) -> Any:
    settings = {"backend": _CPU, "numThread": threads, "precision": "high"}
    names = [[port.name for port in ports] for ports in (signature.inputs, signature.outputs)]
    manager = library.nn.create_runtime_manager((settings,))
    return library.nn.load_module_from_file(str(file), *names, runtime_manager=manager)


def _execute(library: Any, network: Any) -> Execute:
    express = library.expr

    def execute(batch: np.ndarray) -> list[np.ndarray]:
        images = express.const(batch, list(batch.shape), express.NCHW, express.uint8)
        return [np.array(output.read(), np.float32) for output in network.forward([images])]

    return execute
