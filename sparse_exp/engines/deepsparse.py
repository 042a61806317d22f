"""DeepSparse, the engine that turns zeros into speed; imported here only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, LocalEngine, Setup
from sparse_exp.engines.profile import RUNS, Profile, merged

# DeepSparse imports these if it can, for functions that are not used here: 3 seconds and hundreds of MB.
_NOT_NEEDED = ("torch", "matplotlib", "matplotlib.pyplot")
_BIND = "NM_BIND_THREADS_TO_CORES"
_KINDS = {"ks_gemm": "sparse convolution", "pyramid": "several layers, tile by tile"}


class DeepSparseEngine(LocalEngine):
    """DeepSparse 1.8, the last release (2024); see `sparse_exp.engines.base.Engine`.

    It compiles for one batch size, and keeps to the CPU affinity of the process.

    Options: ``bind_threads`` binds each thread to a core, which ``deepsparse.benchmark`` does by default and
    the library does not; ``scheduler`` runs each of several streams on cores of its own (multi_stream), or on
    whichever are free (elastic).
    """

    name = "deepsparse"
    choices = MappingProxyType({"bind_threads": (False, True), "scheduler": ("multi_stream", "elastic")})
    _supported = 0.0  # share of the loaded model's operators, 0..1

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        bound: list[dict[str, Any]] = [{}, {"bind_threads": True}]
        return bound if streams == 1 else [*bound, {"scheduler": "elastic"}]

    def _library(self) -> tuple[Any, str]:
        with _without(*_NOT_NEEDED):
            import deepsparse

        return deepsparse, str(deepsparse.__version__)

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        os.environ[_BIND] = str(int(setup.options.get("bind_threads", False)))  # read when an engine is made
        several = setup.options.get("scheduler", "multi_stream")
        engine = library.Engine(
            str(setup.model),
            batch_size=setup.batch_size,
            num_cores=setup.cores,
            num_streams=setup.lanes,
            scheduler=several if setup.lanes > 1 else "single_stream",
        )
        self._supported = float(engine.fraction_of_supported_ops)

        def execute(batch: np.ndarray) -> list[np.ndarray]:
            outputs: list[np.ndarray] = engine.run([_with_numpys_dtype(batch)])
            return outputs

        return [execute] * setup.lanes

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """By the library's own analysis of layers; see `sparse_exp.engines.IsolatedEngine.profile`."""
        found = library.model_debug_analysis(
            str(setup.model),
            [_with_numpys_dtype(batch)],
            batch_size=setup.batch_size,
            num_cores=setup.cores,
            num_iterations=RUNS,
            num_warmup_iterations=3,
        )
        times = [time for layer in found["layer_info"] for time in _times(layer)]
        return Profile(merged(times), self._supported, "DeepSparse's analysis of layers, one stream")


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide modules that are not imported yet, as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _with_numpys_dtype(batch: np.ndarray) -> np.ndarray:
    """DeepSparse compares dtypes by identity, and an unpickled array has a dtype object of its own."""
    return batch.view(np.uint8)


def _times(layer: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Name, kind and milliseconds of a layer, or of each of its sublayers."""
    if layer["sub_layer_info"]:
        return [time for inner in layer["sub_layer_info"] for time in _times(inner)]
    called, node = str(layer["name"]), str(layer["canonical_name"])
    name = called if node in ("", "<none>") else node
    return [(name, kind_of(called), float(layer["average_run_time_in_ms"]))]


def kind_of(called: str) -> str:
    """What a layer does, by the name that the analysis gives it.

    >>> [kind_of(name) for name in ("ks_gemm_q-76.2%_10", "shuffle_5", "Naive Subgraph 0")]
    ['sparse convolution', 'shuffle', 'Naive Subgraph']
    """
    kind = re.sub(r"[ _]\d+$", "", called)
    known = next((words for start, words in _KINDS.items() if kind.startswith(start)), None)
    return known or re.sub(r"-[\d.]+%$", "", kind)
