"""What every inference engine offers, and what the three ONNX engines share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from sparse_exp.errors import EngineError, MissingDependency, expected

Execute = Callable[[np.ndarray], list[np.ndarray]]
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_LONGEST_REASON = 200


class Engine(Protocol):
    """An inference runtime that runs one ONNX file on the CPU.

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
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        """Compile a model; what was loaded before is closed first.

        Args:
            model: ONNX file that takes uint8 images (N, 3, H, W), N dynamic, H and W fixed.
            batch_size: images of one inference, at least 1.
            cores: physical cores to use, all streams together, at least 1.
            streams: inferences that run at once: from so many threads `run` may be called at a time.
            options: the engine's own, one of those that `sparse_exp.engines.search_space` lists.

        Raises:
            MissingDependency: the runtime is not installed.
            EngineError: the file is no such ONNX file, or the CPU cannot run it.
        """

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Run the model on any number of images, ``batch_size`` of them at a time.

        Args:
            images: uint8 (N, 3, H, W), RGB; N at least 1.

        Returns:
            The outputs, float32, N first, in the order of the file. They are the caller's own: a
            later run does not change them.

        Raises:
            EngineError: nothing is loaded, or the images do not fit the model.
        """

    def close(self) -> None:
        """Free the model. Closing twice, or before `load`, does nothing."""


class OnnxEngine:
    """The shared part of the ONNX engines: checks, batches and one-line errors.

    A subclass imports its runtime in `_library` and compiles in `_compile`.

    Args:
        quiet: what the runtime prints while it loads is thrown away, with all else that the process
            prints meanwhile.

    Attributes:
        requirement: what to install, as pip takes it.
        needs: the CPU that the runtime needs, in words.
        fixed_batch: the model is compiled for one batch size; smaller batches are filled up.
    """

    name: str
    requirement: str
    needs: str = "x86 with 64 bits"
    fixed_batch: bool = True

    def __init__(self, *, quiet: bool = True) -> None:
        self.version = ""
        self._quiet = quiet
        self._execute: Execute | None = None
        self._batch_size = 1
        self._model = Path()

    def _library(self) -> tuple[Any, str]:
        """Import the runtime; returns it and its version."""
        raise NotImplementedError

    def _compile(self, library: Any, model: Path, batch_size: int, cores: int) -> Execute:
        """Compile ``model``; returns a function of one contiguous batch."""
        raise NotImplementedError

    def load(
        self,
        model: Path,
        *,
        batch_size: int,
        cores: int,
        streams: int = 1,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        """See `Engine.load`."""
        self.close()
        self._model, self._batch_size = Path(model), batch_size
        _check_file(self._model)
        with silence() if self._quiet else nullcontext():
            library, self.version = self._import()
            try:
                self._execute = self._compile(library, self._model, batch_size, cores)
            except Exception as error:
                do = "Export the model again, or take this engine out of hardware.engines."
                raise self._failed("compile", error, do) from error

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """See `Engine.run`."""
        if self._execute is None:
            raise EngineError(not_loaded(self.name))
        check_images(images)
        parts = [self._run_part(self._execute, part) for part in self._parts(images)]
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def close(self) -> None:
        """See `Engine.close`."""
        self._execute = None

    def _import(self) -> tuple[Any, str]:
        try:
            return self._library()
        except ImportError as error:
            do = f"Run: pip install '{self.requirement}'."
            raise MissingDependency(
                expected(f"the package {self.name}", "installed", reason(error), do)
            ) from error
        except OSError as error:
            do = f"Take {self.name} out of hardware.engines."
            raise EngineError(expected(f"the CPU for {self.name}", self.needs, reason(error), do)) from error

    def _parts(self, images: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(images), self._batch_size):
            yield images[start : start + self._batch_size]

    def _run_part(self, execute: Execute, part: np.ndarray) -> list[np.ndarray]:
        batch = pad(part, self._batch_size) if self.fixed_batch else part
        try:
            outputs = execute(np.ascontiguousarray(batch))
        except Exception as error:
            do = "Pass images of the size that the model was exported for."
            raise self._failed(f"run images {images_like(part)} through", error, do) from error
        return [output[: len(part)].astype(np.float32, copy=False) for output in outputs]

    def _failed(self, what: str, error: Exception, do: str) -> EngineError:
        return EngineError(f"{self.name} cannot {what} {self._model}: {reason(error)} {do}")


def check_images(images: np.ndarray) -> None:
    """Refuse what is no batch of images.

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
    """The end of an error's text, on one line: runtimes put places in their source first."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _LONGEST_REASON else f"... {text[-_LONGEST_REASON:]}"
    return text if text.endswith(".") else f"{text}."


def not_loaded(name: str) -> str:
    """The message for the use of an engine that has no model."""
    return expected(f"the engine {name}", "loaded", "closed", "Call load() before run() or measure().")


@contextmanager
def silence() -> Iterator[None]:
    """Keep native code from printing: file descriptors 1 and 2 lead nowhere while the block runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def _check_file(model: Path) -> None:
    if not model.is_file():
        do = "Run the export stage first, or check the path."
        raise EngineError(expected("the model", "an ONNX file", str(model), do))
