"""The process that an engine runs in, as the process sees it that has started it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sparse_exp.children import Output, obituary
from sparse_exp.engines.base import not_loaded
from sparse_exp.errors import EngineError

T = TypeVar("T")


class EngineProcess:
    """A child process and the pipes to it; `close` ends it, and so does the end of this process.

    Args:
        name: of the engine.
        process: the child.
        pipes: this process's ends; each is closed with the child.
        output: what the child prints.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        pipes: Sequence[Any],
        output: Output,
    ) -> None:
        self._name, self._process, self._pipes, self._output = name, process, list(pipes), output
        self._closing = threading.Lock()
        self._open = True

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def talk(self, dialogue: Callable[[Any], T], pipe: int = 0) -> T:
        """Ask, and wait for the answer.

        Args:
            dialogue: sends a question through a pipe and returns the answer to it.
            pipe: which; only one thread at a time may use it.

        Raises:
            EngineError: the child is closed, or it died.
        """
        if not self._open:
            raise EngineError(not_loaded(self._name))
        try:
            return dialogue(self._pipes[pipe])
        except (EOFError, OSError) as error:
            raise self._died() from error
        except BaseException:  # the next question must not get the answer to this one
            self.close()
            raise

    def close(self) -> None:
        """End the child and wait for its end. Closing twice does nothing."""
        with self._closing:
            self._close()

    def _close(self) -> None:
        if not self._open:
            return
        self._open = False
        for pipe in self._pipes:
            pipe.close()
        self._process.kill()  # it has nothing to save, and may be deep in native code
        self._process.wait()
        self._output.close()

    def _died(self) -> EngineError:
        with self._closing:  # several threads may notice it
            if not self._open:
                return EngineError(not_loaded(self._name))
            text = obituary(self._name, self._process.wait(), self._output)
            self._close()
        return EngineError(f"{text} Check that memory suffices, or take it out of hardware.engines.")
