"""An engine in a child process of its own.

Engines start thread pools, pin threads to cores and can crash in native code. In a child process none of
that affects the run, or another engine.

The child is a fresh interpreter. `multiprocessing` would import the parent's main module again, which may be
a script without a guard, or import torch. `sparse_exp.engines.child` is what it runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from sparse_exp.children import start_child
from sparse_exp.engines.base import NO_OPTIONS, Options, not_loaded, reason
from sparse_exp.engines.deepsparse import DeepSparseEngine
from sparse_exp.engines.process import EngineProcess
from sparse_exp.engines.profile import Profile
from sparse_exp.engines.signature import Signature, read_signature
from sparse_exp.engines.timing import Timing
from sparse_exp.errors import EngineError, MissingDependency, SparseExpError, expected

# The parent handles an interrupt, and closes its engines. CPUs are chosen first: what is imported may start
# threads, and these keep to the CPUs that the process had at that moment.
_CHILD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[3]:
    os.sched_setaffinity(0, map(int, sys.argv[3].split(",")))
sys.path[:] = sys.argv[4:]
from sparse_exp.engines.child import serve
serve(int(sys.argv[1]), sys.argv[2])
"""


class IsolatedEngine:
    """An `Engine` in a child process; `close` ends it, and so does the end of the parent.

    It answers one question at a time: threads that call `run` wait for each other. The streams of `measure`
    run in the child.

    Args:
        name: one of `sparse_exp.config.schema.ENGINES`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""
        self._child: _Child | None = None
        self._asking = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while nothing is loaded."""
        return self._child.pid if self._child else None

    def load(
        self,
        model: Path,
        *,
        batch_size: int,
        cores: int,
        streams: int = 1,
        options: Options = NO_OPTIONS,
        signature: Signature | None = None,
        pin: Sequence[int] | None = None,
    ) -> None:
        """See `Engine.load`. Every load starts a fresh child.

        Args:
            model: see `Engine.load`, as the others.
            batch_size: images of one inference.
            cores: physical cores to use.
            streams: inferences that run at once.
            options: the engine's own.
            signature: see `Engine.load`.
            pin: logical CPUs that the child keeps to, as the kernel numbers them; None: those of this
                process.

        Raises:
            MissingDependency: the runtime is not installed.
            EngineError: see `Engine.load`; also if ``pin`` names a CPU that this process may not use.
        """
        self.close()
        model = Path(model)
        if signature is None and self.name != "torch" and model.suffix == ".onnx" and model.is_file():
            signature = read_signature(model)  # the memory that this takes must not count as the engine's
        self._start(_usable(pin))
        try:
            self.version = self._ask(
                "load",
                model,
                batch_size=batch_size,
                cores=cores,
                streams=streams,
                options=dict(options),
                signature=signature,
            )
        except SparseExpError:
            self.close()
            raise

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """See `Engine.run`."""
        outputs: list[np.ndarray] = self._ask("run", images)
        return outputs

    def measure(
        self,
        images: np.ndarray,
        seconds: float,
        *,
        warmup: float = 0.0,
        max_warmup: float | None = None,
        streams: int = 1,
    ) -> Timing:
        """Run batch after batch for a while in the child, and time each.

        See `sparse_exp.engines.timing.time_engine`.

        Args:
            images: uint8 (N, 3, H, W); batches are taken from them in turn, again and again.
            seconds: how long to measure; each stream runs one batch at least.
            warmup: least seconds of warm-up, which do not count.
            max_warmup: most seconds of warm-up, where latencies are not stable before; None: ``warmup``.
            streams: closed loops at once; the engine runs as many at once as it was loaded for.

        Raises:
            EngineError: see `Engine.run`; also if the child died.
        """
        timing: Timing = self._ask(
            "measure", images, seconds, warmup=warmup, max_warmup=max_warmup, streams=streams
        )
        return timing

    def peak_rss_mb(self) -> float:
        """Most main memory that the child has held so far, in units of 1e6 bytes.

        Python, the library, the model and the images all count. The number is the kernel's ``VmHWM``;
        ``ru_maxrss`` would include the memory that this process had when it started the child.

        Raises:
            EngineError: nothing is loaded.
        """
        if self.pid is None:
            raise EngineError(not_loaded(self.name))
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:  # not Linux: what it holds now
            return float(psutil.Process(self.pid).memory_info().rss) / 1e6
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
        return int(line.split()[1]) * 1024 / 1e6

    def profile(self, images: np.ndarray) -> Profile:
        """Time the layers of the loaded model, which is compiled once more for that.

        The memory that this takes counts in `peak_rss_mb`: ask for that before.

        Args:
            images: uint8 (N, 3, H, W); the first batch of them is run.

        Raises:
            EngineError: see `Engine.run`; also if the engine cannot profile the model.
        """
        profile: Profile = self._ask("profile", images)
        return profile

    def close(self) -> None:
        """See `Engine.close`. The child is gone when this returns."""
        child, self._child = self._child, None
        if child:
            child.close()

    def _start(self, pin: str) -> None:
        self._child = _Apart(pin) if self.name == DeepSparseEngine.name else _Fresh(self.name, pin)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        with self._asking:
            if self._child is None:
                raise EngineError(not_loaded(self.name))
            return self._child.ask(method, *arguments, **named)


class _Child(Protocol):
    """An engine in another process; see `IsolatedEngine`."""

    @property
    def pid(self) -> int | None: ...

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any: ...

    def close(self) -> None: ...


class _Fresh(EngineProcess):
    """A fresh interpreter as this one, which runs `sparse_exp.engines.child`."""

    def __init__(self, name: str, pin: str) -> None:
        process, pipe, output = start_child(_CHILD, name, pin)
        super().__init__(name, process, [pipe], output)

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        def dialogue(pipe: Connection[Any, Any]) -> Any:
            pipe.send((method, arguments, named))
            return pipe.recv()

        kind, value = self.talk(dialogue)
        if kind == "value":
            return value
        raise error_of(kind, value)


class _Apart:
    """DeepSparse, which always runs in a process of its own."""

    def __init__(self, pin: str) -> None:
        self._engine = DeepSparseEngine(pin=pin)
        self.close = self._engine.close

    @property
    def pid(self) -> int | None:
        return self._engine.pid

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        value = getattr(self._engine, method)(*arguments, **named)
        return self._engine.version if method == "load" else value


def _usable(pin: Sequence[int] | None) -> str:
    """CPUs as the child reads them; refuses those that this process may not use."""
    if not hasattr(os, "sched_setaffinity"):  # macOS leaves no choice
        return ""
    mine = os.sched_getaffinity(0)
    if pin is not None and not (pin and set(pin) <= mine):
        do = "Set hardware.pinning=false to leave the choice to the kernel."
        raise EngineError(expected("the CPUs to keep to", f"some of {sorted(mine)}", list(pin), do))
    return ",".join(map(str, pin or ()))


def answer(who: str, action: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, Any]:
    """Call a function for the process at the other end of a pipe, which gets its value or its error.

    Args:
        who: calls it, as the beginning of a sentence.
        action: the function.
        *arguments: its arguments.
        **named: likewise.

    Returns:
        What to send back: ("value", value), or the name of an error's class and its message, from which
        `error_of` makes the error again.
    """
    try:
        return "value", action(*arguments, **named)
    except SparseExpError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return "EngineError", f"{who} failed: {reason(error)}"


def error_of(kind: str, message: str) -> SparseExpError:
    """The error that an `answer` describes."""
    return (MissingDependency if kind == "MissingDependency" else EngineError)(message)
