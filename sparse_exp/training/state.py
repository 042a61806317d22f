"""The state of a training that is not finished: all that it takes to go on as if nothing had happened."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_exp.errors import CheckpointError, first_line
from sparse_exp.files import landing

STATE = Path("weights") / "state.pt"
"""The state's file in a run directory, there until the train stage is recorded."""
_FORMAT = 1
_log = logging.getLogger(__name__)

State = dict[str, Any]


class StateError(CheckpointError):
    """A saved state does not fit the training that it is given to."""


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        phase: index of the phase that goes on; the number of phases when all are trained.
        step: the step behind the last one that was taken, counted from the start of the training.
        batches: taken from the loader so far; fewer than steps where a phase was left early.
    """

    phase: int = 0
    step: int = 0
    batches: int = 0

    @classmethod
    def of(cls, kept: Mapping[str, Any], phases: int, steps: int) -> Position:
        """Read a position.

        Args:
            kept: its attributes.
            phases: in the training.
            steps: in the training.

        Raises:
            ValueError: it lies outside of the training.
        """
        position = cls(**kept)
        numbers = (position.phase, position.step, position.batches)
        if not all(type(n) is int for n in numbers):
            raise ValueError(f"the position {numbers} is no position")
        if not (0 <= position.phase <= phases and 0 < position.step <= steps >= position.batches >= 0):
            raise ValueError(f"the position {numbers} is behind the end")
        return position


class StateFile:
    """Where the state of one training is kept: a file that is whole or not there.

    Args:
        path: the file; its directory must exist.
        mark: fingerprint of everything that the training depends on.
        tracker_run: the tracker's name of the run, which knows the epochs so far.
        earlier_mark: the fingerprint as an earlier version took it, whose state can be gone on with; None:
            no such state counts.
    """

    def __init__(
        self, path: Path, mark: str, tracker_run: str | None = None, *, earlier_mark: str | None = None
    ) -> None:
        self.path, self._mark, self.tracker_run = path, mark, tracker_run
        self._marks = {mark} if earlier_mark is None else {mark, earlier_mark}
        for left in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def write(self, state: State) -> None:
        """Replace the former state; it stays where the new one cannot be written whole.

        Args:
            state: builtin types and tensors; these are written as they are, without a copy.

        Raises:
            OSError: the disk is full, or may not be written to.
        """
        content = {"format": _FORMAT, "mark": self._mark, "tracker_run": self.tracker_run, **state}
        with landing(self.path) as temporary, temporary.open("wb") as file:  # to a path, torch hides OSErrors
            torch.save(content, file)

    def read(self) -> State | None:
        """The state that was saved last; None where there is none, or none that can be used.

        What cannot be used is said in the log. Nothing that the file asks for is run.
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
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise StateError(f"it cannot be read ({in_brackets(error)})") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise StateError("it is no state of a training of this version")
        if state.get("mark") not in self._marks:
            raise StateError("the configuration, the data or the code has changed since")
        return state


def in_brackets(error: BaseException) -> str:
    """What another library says, short enough to stand within a sentence."""
    return first_line(error)[:100].rstrip(".")


def not_used(path: Path, reason: str) -> str:
    """The sentence for a state that is left alone."""
    return f"The saved state {path} is not used: {reason}. The training starts from the beginning."


def random_state() -> State:
    """Where torch's, NumPy's and Python's generators of random numbers are."""
    _, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to where the generators were; see `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
