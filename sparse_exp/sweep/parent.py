"""The sweep's own run in the tracker, the parent of its jobs' runs; and ``sweep.json``, its state on disk."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.files import read_json, remove_parts, write_json
from sparse_exp.locks import exclusive
from sparse_exp.runs.past import HOST_TAG
from sparse_exp.tracking import RunInfo, Tracker, create_tracker

STATE = "sweep.json"
KIND_TAG = "sparse_exp.kind"


def ensure_parent(sweep: Path, tracker: TrackerConfig, store: Path) -> str | None:
    """Return the id of the sweep's run in the tracker. The first job that needs it starts the run.

    Args:
        sweep: directory of the sweep.
        tracker: the ``tracker`` group of the configuration.
        store: see `sparse_exp.tracking.create_tracker`.

    Returns:
        The id; None where runs are not tracked.

    Raises:
        SparseExpError: the tracker cannot be used.
    """
    with _state_lock(sweep):
        state = read_state(sweep)
        if state.get("parent") is None:
            # The tracker and its spool are released at once: the process that ends the sweep reopens them.
            state["parent"] = open_parent(sweep, tracker, store, state).run_id
        write_json(sweep / STATE, {**state, "open": True})
        parent: str | None = state["parent"]
        return parent


def open_parent(sweep: Path, tracker: TrackerConfig, store: Path, state: Mapping[str, Any]) -> Tracker:
    """Start the sweep's run, or open it again where ``state`` has its id, so that more can be logged.

    Args:
        sweep: directory of the sweep.
        tracker: the ``tracker`` group of the configuration.
        store: see `sparse_exp.tracking.create_tracker`.
        state: see `read_state`.

    Raises:
        SparseExpError: the tracker cannot be used.
    """
    opened = create_tracker(replace(tracker, system_metrics=False), store)
    opened.start(
        RunInfo(
            name=sweep.name,
            experiment=tracker.experiment,
            config={"sweep": {"command": state.get("command", ""), "launcher": state.get("launcher", "")}},
            tags={
                KIND_TAG: "sweep",
                "sweep": sweep.name,
                "sparse_exp.version": __version__,
                "run.directory": str(sweep.absolute()),
                HOST_TAG: platform.node(),
            },
            directory=sweep,
            run_id=state.get("parent"),
        )
    )
    return opened


def read_state(sweep: Path) -> dict[str, Any]:
    """Read the state: ``command``, ``launcher``, the id of the ``parent``, and whether that is ``open``.

    Under ``jobs_of`` it has the name that the command would give a sweep, whatever ``sweep.name`` says.
    """
    return read_json(sweep / STATE)


def update_state(sweep: Path, **values: Any) -> None:
    """Change some values of the state; what a killed process left half-written beside it goes."""
    with _state_lock(sweep):
        remove_parts(sweep, below=False)
        write_json(sweep / STATE, {**read_state(sweep), **values})


def _state_lock(sweep: Path) -> AbstractContextManager[None]:
    """Keep the other processes from changing the sweep's state while the block runs."""
    return exclusive(sweep / ".state.lock", f"The sweep {sweep} is being opened")
