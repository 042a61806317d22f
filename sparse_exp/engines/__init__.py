"""Inference runtimes behind one Protocol; each imports its library when a model is loaded."""

from __future__ import annotations

from sparse_exp.engines.base import Engine, OnnxEngine
from sparse_exp.engines.deepsparse import DeepSparseEngine
from sparse_exp.engines.isolated import IsolatedEngine
from sparse_exp.engines.onnxruntime import OnnxRuntimeEngine
from sparse_exp.engines.openvino import OpenVinoEngine
from sparse_exp.errors import EngineError, expected

__all__ = ["Engine", "IsolatedEngine", "create_engine"]

_ENGINES: dict[str, type[OnnxEngine]] = {
    "deepsparse": DeepSparseEngine,
    "onnxruntime": OnnxRuntimeEngine,
    "openvino": OpenVinoEngine,
}


def create_engine(name: str, *, quiet: bool = True) -> Engine:
    """An engine in this process; `IsolatedEngine` is the same in a process of its own.

    Args:
        name: one of `sparse_exp.config.schema.ENGINES`.
        quiet: throw away what the runtime prints while it loads.

    Raises:
        EngineError: there is no engine of that name.
    """
    if name not in _ENGINES:
        choices = f"one of {', '.join(_ENGINES)}"
        raise EngineError(expected("an engine", choices, name, "Correct hardware.engines."))
    return _ENGINES[name](quiet=quiet)
