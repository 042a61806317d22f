"""Inference engines behind one Protocol; each imports its library when a model is loaded."""

from __future__ import annotations

from typing import Any

from sparse_exp.engines.base import Engine, LocalEngine
from sparse_exp.engines.deepsparse import DeepSparseEngine
from sparse_exp.engines.isolated import IsolatedEngine
from sparse_exp.engines.mnn import MnnEngine
from sparse_exp.engines.onnxruntime import OnnxRuntimeEngine
from sparse_exp.engines.openvino import OpenVinoEngine
from sparse_exp.engines.profile import LayerTime, Profile
from sparse_exp.engines.timing import Timing
from sparse_exp.engines.torch import TorchEngine
from sparse_exp.errors import EngineError, expected

__all__ = ["Engine", "IsolatedEngine", "LayerTime", "Profile", "Timing", "create_engine", "search_space"]

_ENGINES: dict[str, type[LocalEngine]] = {
    engine.name: engine
    for engine in (DeepSparseEngine, OnnxRuntimeEngine, OpenVinoEngine, MnnEngine, TorchEngine)
}


def create_engine(name: str, *, quiet: bool = True) -> LocalEngine:
    """An engine in this process; `IsolatedEngine` runs one in a process of its own.

    Args:
        name: one of `sparse_exp.config.schema.ENGINES`.
        quiet: throw away what the library prints while it loads.

    Raises:
        EngineError: there is no engine of that name.
    """
    return _engine(name)(quiet=quiet)


def search_space(name: str, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
    """The options worth a try, each as plain data for `Engine.load`.

    No option changes what is computed: fp32 stays fp32, int8 stays int8.

    Args:
        name: one of `sparse_exp.config.schema.ENGINES`.
        batch_size: images of one inference.
        cores: physical cores to use, all streams together.
        streams: inferences that run at once.

    Returns:
        Two to five candidates. The first is empty, which means the engine's defaults.

    Raises:
        EngineError: there is no engine of that name.
    """
    return _engine(name).search_space(batch_size=batch_size, cores=cores, streams=streams)


def _engine(name: str) -> type[LocalEngine]:
    if name not in _ENGINES:
        choices = f"one of {', '.join(_ENGINES)}"
        raise EngineError(expected("an engine", choices, name, "Correct hardware.engines."))
    return _ENGINES[name]
