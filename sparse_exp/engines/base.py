"""The Protocol of an inference engine, and the part that the engines share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from types import MappingProxyType
from typing import IO, Any, Protocol

import numpy as np

from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.engines.profile import Profile
from sparse_exp.engines.signature import Signature, check_detector, read_signature
from sparse_exp.engines.timing import Timing, batches_of, time_engine
from sparse_exp.errors import EngineError, MissingDependency, SparseExpError, expected
from sparse_exp.sources.layout import CHECKPOINT_SUFFIXES

Execute = Callable[[np.ndarray], list[np.ndarray]]
Options = Mapping[str, Any]
NO_OPTIONS: Options = MappingProxyType({})
_LONGEST_REASON = 200


class Engine(Protocol):
    """An inference runtime that runs one model on the CPU.

    Attributes:
        name: name of the runtime, as in `sparse_exp.config.schema.ENGINES`.
        version: version of the runtime; empty until `load`.
    """

    name: str
    version: str

    def load(
        self,
        model: Path,
        *,
        batch_size: int,
        cores: int,
        streams: int = 1,
        options: Options = NO_OPTIONS,
        signature: Signature | None = None,
    ) -> None:
        """Compile a model; the one loaded before is closed first.

        Args:
            model: ONNX file that takes uint8 images (N, 3, H, W), N dynamic, H and W fixed, and gives
                float32 (N, A, 5 + nc); for torch a checkpoint of this project or of Ultralytics YOLOv5.
            batch_size: images of one inference, at least 1.
            cores: physical cores to use, all streams together, at least 1.
            streams: inferences that run at once, which is how many threads may call `run` at a time.
            options: of this engine, as `sparse_exp.engines.search_space` lists them.
            signature: what `read_signature` returned for the model; None: `load` reads it.

        Raises:
            MissingDependency: the runtime is not installed.
            EngineError: the file is not such a model, an option is unknown, or the CPU cannot run it.
        """

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Run the model on any number of images, ``batch_size`` of them at a time.

        As many threads as there are streams may call it at a time; further ones wait.

        Args:
            images: uint8 (N, 3, H, W), RGB; N at least 1.

        Returns:
            The outputs, float32, N first, in the order of the file. They belong to the caller: a later
            run does not change them.

        Raises:
            EngineError: nothing is loaded, or the images do not fit the model.
        """

    def close(self) -> None:
        """Free the model. Closing twice, or before `load`, does nothing."""


@dataclass(frozen=True)
class Setup:
    """How a model is compiled.

    Attributes:
        model: its file.
        batch_size: images of one inference.
        cores: to use, all streams together.
        streams: inferences that are to run at once.
        options: of the engine; an option that is not named has its default.
    """

    model: Path
    batch_size: int
    cores: int
    streams: int
    options: Options

    @property
    def lanes(self) -> int:
        """Inferences that really run at once: if there are more streams than cores, streams take turns."""
        return min(self.streams, self.cores)

    def threads(self) -> list[int]:
        """Threads of each lane; their sum is `cores`."""
        each, rest = divmod(self.cores, self.lanes)
        return [each + (lane < rest) for lane in range(self.lanes)]


class LocalEngine:
    """An engine in this process: checks, streams, batches and one-line errors, the same for all.

    A subclass imports its library in `_library`, compiles in `_compile`, and names its options.

    Args:
        quiet: throw away what the library prints while it loads, and whatever else the process prints
            meanwhile.

    Attributes:
        name: one of `sparse_exp.config.runtimes.RUNTIMES`.
        fixed_batch: the model is compiled for one batch size; a smaller batch is filled up with zeros.
        choices: the values that each option may have; the first is its default.
    """

    name: str
    fixed_batch: bool = True
    choices: Mapping[str, tuple[Any, ...]] = MappingProxyType({})

    def __init__(self, *, quiet: bool = True) -> None:
        self.version = ""
        self._quiet = quiet
        self._library_loaded: Any = None
        self._setup = Setup(Path(), 1, 1, 1, NO_OPTIONS)
        self._signature: Signature | None = None
        self._lanes: LifoQueue[Execute] | None = None

    @classmethod
    def search_space(cls, *, batch_size: int, cores: int, streams: int) -> list[dict[str, Any]]:
        """See `sparse_exp.engines.search_space`."""
        return [{}]

    def _library(self) -> tuple[Any, str]:
        """Import the library; returns it and its version."""
        raise NotImplementedError

    def _compile(self, library: Any, setup: Setup) -> Sequence[Execute]:
        """Compile for `Setup.lanes` inferences at once: for each a function of one contiguous batch."""
        raise NotImplementedError

    def _profile(self, library: Any, setup: Setup, batch: np.ndarray) -> Profile:
        """Compile once more, with the library's profiler, and run one contiguous batch."""
        raise NotImplementedError

    def _install(self) -> str:
        """How to get the library, a sentence."""
        return f"Run: pip install '{RUNTIMES[self.name].requirement}'."

    def _read(self, model: Path) -> Signature | None:
        """The inputs and outputs that the file names, not yet checked; None where it names none."""
        if model.suffix in CHECKPOINT_SUFFIXES:
            do = "Take model.onnx of the run's deployment directory, or the engine torch."
            raise EngineError(expected(f"the model of {self.name}", "an ONNX file", str(model), do))
        return read_signature(model)

    def load(
        self,
        model: Path,
        *,
        batch_size: int,
        cores: int,
        streams: int = 1,
        options: Options = NO_OPTIONS,
        signature: Signature | None = None,
    ) -> None:
        """See `Engine.load`."""
        self.close()
        setup = Setup(Path(model), batch_size, cores, streams, options)
        self._check_options(options)
        self._setup, self._signature = setup, self._checked(setup, signature)
        try:
            with silence() if self._quiet else nullcontext():
                library, self.version = self._import()
                lanes: LifoQueue[Execute] = LifoQueue()
                for lane in self._compiled(library, setup):
                    lanes.put(lane)
        except BaseException:
            self.close()
            raise
        self._library_loaded, self._lanes = library, lanes

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """See `Engine.run`."""
        self._check_images(images)
        size = self._setup.batch_size
        batches = [self._run_batch(images[start : start + size]) for start in range(0, len(images), size)]
        if len(batches) == 1:
            return batches[0]
        return [np.concatenate(outputs) for outputs in zip(*batches, strict=True)]

    def measure(
        self,
        images: np.ndarray,
        seconds: float,
        *,
        warmup: float = 0.0,
        max_warmup: float | None = None,
        streams: int = 1,
    ) -> Timing:
        """See `sparse_exp.engines.IsolatedEngine.measure`."""
        self._check_images(images)
        times = {"seconds": seconds, "warmup": warmup, "max_warmup": max_warmup, "streams": streams}
        return self._timed(images, times)

    def _timed(self, images: np.ndarray, times: dict[str, Any]) -> Timing:
        """Time batches of images that were checked; ``times`` are arguments of `time_engine`."""
        return time_engine(self, batches_of(images, self._setup.batch_size), **times)

    def profile(self, images: np.ndarray) -> Profile:
        """See `sparse_exp.engines.IsolatedEngine.profile`."""
        self._check_images(images)
        batch = np.resize(images, (self._setup.batch_size, *images.shape[1:]))
        try:
            with silence() if self._quiet else nullcontext():
                return self._profile(self._library_loaded, self._setup, batch)
        except EngineError:
            raise
        except Exception as error:
            do = "Leave this engine out where layers are compared."
            raise self._failed("profile", self._setup.model, error, do) from error

    def close(self) -> None:
        """See `Engine.close`."""
        self._lanes = None

    def _import(self) -> tuple[Any, str]:
        try:
            return self._library()
        except ImportError as error:
            what = expected(f"the package {self.name}", "installed", reason(error), self._install())
            raise MissingDependency(what) from error
        except OSError as error:
            do = f"Take {self.name} out of hardware.engines."
            needed = RUNTIMES[self.name].cpu
            raise EngineError(expected(f"the CPU for {self.name}", needed, reason(error), do)) from error

    def _check_options(self, options: Options) -> None:
        for name, value in options.items():
            do = "Remove it: hardware.tune finds the options that serve."
            if name not in self.choices:
                known = f"one of {', '.join(self.choices) or 'none'}"
                raise EngineError(expected(f"an option of {self.name}", known, name, do))
            if value not in self.choices[name]:
                known = f"one of {', '.join(map(str, self.choices[name]))}"
                raise EngineError(expected(f"the option {name} of {self.name}", known, value, do))

    def _checked(self, setup: Setup, signature: Signature | None) -> Signature | None:
        """The model's inputs and outputs, checked; None where the file does not name them."""
        if not setup.model.is_file():
            do = "Run the export stage first, or check the path."
            raise EngineError(expected("the model", "an existing file", str(setup.model), do))
        signature = signature or self._read(setup.model)
        if signature is not None:
            check_detector(setup.model, signature, setup.batch_size)
        return signature

    def _compiled(self, library: Any, setup: Setup) -> Sequence[Execute]:
        try:
            return self._compile(library, setup)
        except SparseExpError as error:
            raise EngineError(str(error)) from error
        except Exception as error:
            do = "Export the model again, or take this engine out of hardware.engines."
            raise self._failed("compile", setup.model, error, do) from error

    def _check_images(self, images: np.ndarray) -> None:
        if self._lanes is None:
            raise EngineError(not_loaded(self.name))
        check_images(images)
        size = self._signature.size if self._signature else None
        if size is not None and images.shape[2:] != size:
            should_be = f"{size[0]} px high and {size[1]} px wide, as {self._setup.model} takes them"
            do = "Resize them, or export the model for their size."
            raise EngineError(expected("images", should_be, images_like(images), do))

    def _run_batch(self, images: np.ndarray) -> list[np.ndarray]:
        """Outputs for at most one batch of images."""
        signature, batch = self._signature, images
        if self.fixed_batch or (signature is not None and signature.batch is not None):
            batch = pad(images, self._setup.batch_size)
        try:
            outputs = self._in_a_lane(np.ascontiguousarray(batch))
        except EngineError:
            raise
        except Exception as error:
            do = "Pass images of the size that the model was exported for."
            model = self._setup.model
            raise self._failed(f"run images {images_like(images)} through", model, error, do) from error
        return [output[: len(images)].astype(np.float32, copy=False) for output in outputs]

    def _in_a_lane(self, batch: np.ndarray) -> list[np.ndarray]:
        """Run a batch as soon as one of the lanes is free."""
        lanes = self._lanes
        if lanes is None:
            raise EngineError(not_loaded(self.name))
        lane = lanes.get()
        try:
            return lane(batch)
        finally:
            lanes.put(lane)

    def _failed(self, what: str, model: Path, error: Exception, do: str) -> EngineError:
        return EngineError(f"{self.name} cannot {what} {model}: {reason(error)} {do}")


def check_images(images: np.ndarray) -> None:
    """Refuse an array that is not a batch of images.

    Raises:
        EngineError: ``images`` is not uint8 (N, 3, H, W) with N at least 1.
    """
    good = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
    if not good:
        do = "Pass RGB images as they come from the data set."
        raise EngineError(expected("images", "uint8 (N, 3, H, W), N >= 1", images_like(images), do))


def images_like(images: np.ndarray) -> str:
    """Type and shape of an array, in words: ``uint8 (2, 3, 64, 64)``."""
    return f"{images.dtype} {images.shape}"


def pad(images: np.ndarray, batch_size: int) -> np.ndarray:
    """Fill a batch up with zeros: (n, ...) with n <= ``batch_size`` to (``batch_size``, ...)."""
    if len(images) == batch_size:
        return images
    padded = np.zeros((batch_size, *images.shape[1:]), images.dtype)
    padded[: len(images)] = images
    return padded


def reason(error: BaseException) -> str:
    """The end of an error's text, on one line; libraries begin with places in their source."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _LONGEST_REASON else f"... {text[-_LONGEST_REASON:]}"
    return text if text.endswith(".") else f"{text}."


def not_loaded(name: str) -> str:
    """The message for an engine that is used without a model."""
    return expected(f"the engine {name}", "loaded", "closed", "Call load() before run() or measure().")


@contextmanager
def silence() -> Iterator[IO[bytes]]:
    """Keep what is printed while the block runs, also by native code: to file descriptors 1 and 2.

    It goes into the file that the block is given, and is thrown away at its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with tempfile.TemporaryFile() as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            yield printed
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def files_of(model: Path) -> list[Path]:
    """The files of a model; in OpenVINO's own format (``.xml``) the weights are in a second, ``.bin``."""
    return [model, model.with_suffix(".bin")] if model.suffix == ".xml" else [model]
