"""ONNX Runtime, the baseline that everybody has; imported here and in `sparse_exp.export.post_training`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_exp.engines.base import Execute, LocalEngine, Setup
from sparse_exp.engines.profile import RUNS, Profile, merged

_ERRORS_ONLY = 3


class OnnxRuntimeEngine(LocalEngine):
    """ONNX Runtime on its CPU provider; see `sparse_exp.engines.base.Engine`.

    One thread per core, nodes in sequence: a detector's graph is a chain, so a second pool of threads for
    parallel nodes would only take cores from the first. Each stream has a session on its share of the
    cores.

    Options: ``optimization`` of the graph, with the blocked layout of convolutions (all) or without it
    (extended); ``spinning`` lets idle threads wait actively, so that they begin sooner but keep cores busy;
    ``shared_session`` gives all streams one session, whose threads help whichever stream is running.
    """

    name = "onnxruntime"
    fixed_batch = False
    choices = MappingProxyType(
        {"optimization": ("all", "extended"), "spinning": (True, False), "shared_session": (False, True)}
    )

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        space: list[dict[str, Any]] = [{}, {"optimization": "extended"}]
        if cores > streams:  # one thread per stream never waits
            space.append({"spinning": False})
        return space if streams == 1 else [*space, {"shared_session": True}]

    def _library(self) -> tuple[Any, str]:
        import onnxruntime

        return onnxruntime, str(onnxruntime.__version__)

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        if setup.options.get("shared_session", False):
            # The calling threads work as well: with them there are as many threads as cores.
            settings = _settings(library, setup, setup.cores - setup.lanes + 1)
            return [_execute(_session(library, setup, settings))] * setup.lanes
        each = [_settings(library, setup, threads) for threads in setup.threads()]
        return [_execute(_session(library, setup, settings)) for settings in each]

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """By the library's own profiler; see `sparse_exp.engines.IsolatedEngine.profile`."""
        settings = _settings(library, setup, setup.cores)
        with tempfile.TemporaryDirectory() as folder:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(library, setup, settings)
            execute = _execute(session)
            for _ in range(RUNS + 1):
                execute(batch)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Profile(merged(_times(events), RUNS), None, "ONNX Runtime's profiler, one stream")


def _settings(library: Any, setup: Setup, threads: int) -> Any:
    levels = library.GraphOptimizationLevel
    options = library.SessionOptions()
    extended = setup.options.get("optimization", "all") == "extended"
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if extended else levels.ORT_ENABLE_ALL
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    spinning = setup.options.get("spinning", True)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return options


def _session(library: Any, setup: Setup, settings: Any) -> Any:
    return library.InferenceSession(str(setup.model), settings, providers=["CPUExecutionProvider"])


def _execute(session: Any) -> Execute:
    name = session.get_inputs()[0].name

    def execute(batch: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = session.run(None, {name: batch})
        return outputs

    return execute


def _times(events: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """Name, kind and milliseconds of each node that ran, without the first inference, the warm-up."""
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    nodes = sorted((event for event in events if event.get("cat") == "Node"), key=lambda event: event["ts"])
    suffix = "_kernel_time"
    return [
        (event["name"].removesuffix(suffix), event["args"]["op_name"], event["dur"] / 1e3)
        for event in nodes
        if event["name"].endswith(suffix) and event["ts"] >= runs[1]
    ]
