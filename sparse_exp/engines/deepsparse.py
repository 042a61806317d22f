"""DeepSparse, the engine that turns zeros into speed.

It is never imported here: `sparse_exp.engines.deepsparse_worker` runs it in a process of its own, with the
interpreter that `sparse_exp.hardware.deepsparse` finds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_exp.children import Told, start_process
from sparse_exp.engines.base import Execute, LocalEngine, Setup
from sparse_exp.engines.deepsparse_worker import Channel
from sparse_exp.engines.process import EngineProcess
from sparse_exp.engines.profile import RUNS, Profile, merged
from sparse_exp.engines.timing import Timing
from sparse_exp.hardware.deepsparse import require_python

_WORKER = Path(__file__).with_name("deepsparse_worker.py")
_KINDS = {"ks_gemm": "sparse convolution", "pyramid": "several layers, tile by tile"}


class DeepSparseEngine(LocalEngine):
    """DeepSparse 1.8, the last release (2024); see `sparse_exp.engines.base.Engine`.

    It compiles for one batch size, and keeps to the CPU affinity of its process. What is asked of it is
    checked here; its process compiles, runs and times.

    Options: ``bind_threads`` binds each thread to a core, which ``deepsparse.benchmark`` does by default and
    the library does not; ``scheduler`` runs each of several streams on cores of its own (multi_stream), or on
    whichever are free (elastic).

    Args:
        quiet: print nothing of what the library prints, which is another process.
        pin: CPUs that its process keeps to, joined by commas; empty: those of this process.
    """

    name = "deepsparse"
    choices = MappingProxyType({"bind_threads": (False, True), "scheduler": ("multi_stream", "elastic")})

    def __init__(self, *, quiet: bool = True, pin: str = "") -> None:
        super().__init__(quiet=False)
        self._told = None if quiet else partial(print, flush=True)
        self._pin, self._worker = pin, None  # type: str, _Worker | None
        self._supported = 0.0  # share of the loaded model's operators, 0..1

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        bound: list[dict[str, Any]] = [{}, {"bind_threads": True}]
        return bound if streams == 1 else [*bound, {"scheduler": "elastic"}]

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while nothing is loaded."""
        return self._worker.process.pid if self._worker else None

    def _timed(self, images: np.ndarray, times: dict[str, Any]) -> Timing:
        """See `LocalEngine`; it is the worker that times."""
        ask = self._library_loaded.ask
        try:
            return Timing(*ask("measure", images, batch_size=self._setup.batch_size, **times))
        except RuntimeError as error:
            raise self._failed("measure", self._setup.model, error, "Export the model again.") from error

    def close(self) -> None:
        """See `Engine.close`."""
        super().close()
        worker, self._worker = self._worker, None
        if worker:
            worker.process.close()

    def _library(self) -> tuple[Any, str]:
        self._worker = _Worker(require_python(), self._pin, self._setup.lanes, self._told)
        return self._worker, str(self._worker.ask("library"))

    def _install(self) -> str:
        return f"Make the environment of {require_python()} anew."

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        several = setup.options.get("scheduler", "multi_stream")
        self._supported = library.ask(
            "compile",
            model=str(setup.model.absolute()),
            batch_size=setup.batch_size,
            num_cores=setup.cores,
            streams=setup.lanes,
            scheduler=several if setup.lanes > 1 else "single_stream",
            bind=setup.options.get("bind_threads", False),
        )
        return [partial(library.run, lane) for lane in range(setup.lanes)]

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """By the library's own analysis of layers; see `sparse_exp.engines.IsolatedEngine.profile`."""
        layers = library.ask(
            "profile",
            batch,
            model=str(setup.model.absolute()),
            batch_size=setup.batch_size,
            num_cores=setup.cores,
            num_iterations=RUNS,
            num_warmup_iterations=3,
        )
        times = [
            (called if node in ("", "<none>") else node, kind_of(called), ms) for called, node, ms in layers
        ]
        return Profile(merged(times), self._supported, "DeepSparse's analysis of layers, one stream")


class _Worker:
    """The process of `sparse_exp.engines.deepsparse_worker`, a channel for questions and one for each lane.

    Args:
        python: interpreter that has DeepSparse.
        pin: CPUs that it keeps to, joined by commas; empty: those of this process.
        lanes: batches that are to run at once.
        told: called with each line that it prints.
    """

    def __init__(self, python: Path, pin: str, lanes: int, told: Told | None) -> None:
        command = [str(python), "-I", str(_WORKER)]  # -I: neither this folder nor PYTHONPATH is searched
        memories = [os.memfd_create("batch") for _ in range(1 + lanes)]
        words = ",".join(map(str, memories)), pin
        process, pipes, output = start_process(
            command, *words, pipes=len(memories), files=memories, told=told
        )
        channels = [Channel(pipe, memory) for pipe, memory in zip(pipes, memories, strict=True)]
        self.process = EngineProcess(DeepSparseEngine.name, process, channels, output)

    def ask(self, method: str, *arrays: np.ndarray, **settings: Any) -> Any:
        """The answer to a question; see `sparse_exp.engines.deepsparse_worker.Worker`.

        Raises:
            ImportError: the library is not there, or not whole.
            OSError: it does not run on this CPU.
            EngineError: it fails, or the process died.
        """
        return self._exchange(0, (method, settings), arrays)[0]

    def run(self, lane: int, batch: np.ndarray) -> list[np.ndarray]:
        """The outputs for a batch."""
        return self._exchange(1 + lane, None, [batch])[1]

    def _exchange(
        self, channel: int, message: Any, arrays: Sequence[np.ndarray]
    ) -> tuple[Any, list[np.ndarray]]:
        def dialogue(channel: Channel) -> Any:
            channel.send(message, arrays)
            return channel.receive()

        (kind, value), outputs = self.process.talk(dialogue, channel)
        if kind == "value":
            return value, outputs
        raise {"ImportError": ImportError, "OSError": OSError}.get(kind, RuntimeError)(value)


def kind_of(called: str) -> str:
    """What a layer does, by the name that the analysis gives it.

    >>> [kind_of(name) for name in ("ks_gemm_q-76.2%_10", "shuffle_5", "Naive Subgraph 0")]
    ['sparse convolution', 'shuffle', 'Naive Subgraph']
    """
    kind = re.sub(r"[ _]\d+$", "", called)
    known = next((words for start, words in _KINDS.items() if kind.startswith(start)), None)
    return known or re.sub(r"-[\d.]+%$", "", kind)
