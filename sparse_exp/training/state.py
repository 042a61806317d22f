"""The state of an unfinished training: all that is needed to continue as if nothing had interrupted it."""

from __future__ import annotations

import logging
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_exp.errors import CheckpointError, first_line
from sparse_exp.files import landing

STATE = Path("weights") / "state.pt"
"""The state's file in a run directory; it is deleted when the train stage has been recorded."""
_FORMAT = 1
_log = logging.getLogger(__name__)

State = dict[str, Any]
"""Builtin types and tensors by name; see `sparse_exp.training.loop.Trainer`, which writes and reads them."""


class StateError(CheckpointError):
    """A saved state does not fit the training that it is given to."""


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        phase: index of the current phase; the number of phases when all are finished.
        step: the next step, counted from the start of the training.
        batches: number of batches taken from the loader so far; less than ``step`` if a phase ended early.
        mosaic: whether the current pass over the images has mosaics.
    """

    phase: int = 0
    step: int = 0
    batches: int = 0
    mosaic: bool = True

    @classmethod
    def of(cls, kept: Mapping[str, Any], phases: int, steps: int) -> Position:
        """Make a position from its attributes.

        Args:
            kept: the attributes by name.
            phases: number of phases of the training.
            steps: number of steps of the training.

        Raises:
            ValueError: the position lies outside of the training.
        """
        position = cls(**kept)
        numbers = (position.phase, position.step, position.batches)
        if not all(type(n) is int for n in numbers):
            raise ValueError(f"the position {numbers} is no position")
        if not (0 <= position.phase <= phases and 0 < position.step <= steps >= position.batches >= 0):
            raise ValueError(f"the position {numbers} is behind the end")
        return position


class StateFile:
    """The file that keeps the state of one training; it is whole or not there.

    Args:
        path: the file; its directory must exist.
        mark: fingerprint of everything that the training depends on.
        earlier_mark: the same as versions before 0.2 took it; None: no state of such a version counts.

    Attributes:
        path: as given.
    """

    def __init__(self, path: Path, mark: str, earlier_mark: str | None = None) -> None:
        self.path, self._mark, self._marks = path, mark, {mark, earlier_mark} - {None}

    def write(self, state: State) -> None:
        """Replace the kept state. If the new one cannot be written whole, the former one stays.

        Args:
            state: builtin types and tensors; tensors are written without a copy.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        content = {"format": _FORMAT, "mark": self._mark, **state}
        with landing(self.path) as temporary, temporary.open("wb") as file:  # to a path, torch hides OSErrors
            torch.save(content, file)

    def read(self) -> State | None:
        """The state that was written last; None if there is none, or if it cannot be used, which is logged.

        The file is read with ``weights_only``: no code in it is run.
        """
        if not self.path.is_file():
            return None
        try:
            return self._load()
        except StateError as error:
            _log.warning("%s", not_used(self.path, str(error)))
            return None

    def _load(self) -> State:
        try:
            require_whole(self.path)
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise StateError(f"it cannot be read ({short_reason(error)})") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise StateError("it is no state of a training of this version")
        if state.get("mark") not in self._marks:
            raise StateError("the configuration, the data or the code has changed since")
        return state


def require_whole(path: Path) -> None:
    """Compare a file that torch wrote with the checksums in it, which torch itself does not when it reads.

    Raises:
        OSError: it cannot be read.
        zipfile.BadZipFile: it has changed since it was written.
    """
    with zipfile.ZipFile(path) as archive:
        if (changed := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"its part {changed} has changed")


def short_reason(error: BaseException) -> str:
    """Another library's message, cut so short that it can stand in brackets within a sentence."""
    return first_line(error)[:100].rstrip(".")


def not_used(path: Path, reason: str) -> str:
    """The message for a state that is not used.

    Args:
        path: its file.
        reason: a clause without a full stop.
    """
    return f"The saved state {path} is not used: {reason}. The training starts from the beginning."


def random_state() -> State:
    """The states of torch's, NumPy's and Python's generators of random numbers."""
    _, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the states of the generators to those that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
