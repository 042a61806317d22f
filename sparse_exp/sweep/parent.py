"""The sweep's own run in the tracker, which its jobs are children of, and what is kept of it on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.files import read_json, write_json
from sparse_exp.locks import exclusive
from sparse_exp.tracking import RunInfo, Tracker, create_tracker

STATE = "sweep.json"
KIND_TAG = "sparse_exp.kind"


def parent_of(sweep: Path, tracker: TrackerConfig, store: Path) -> str | None:
    """The tracker's name of the sweep's run. The first job that needs it opens it.

    Args:
        sweep: directory of the sweep.
        tracker: the ``tracker`` group of the configuration.
        store: see `sparse_exp.tracking.create_tracker`.

    Returns:
        None where runs are not tracked.

    Raises:
        SparseExpError: the tracker cannot be used.
    """
    with _alone(sweep):
        state = read_state(sweep)
        if state.get("parent") is None:
            # The tracker is let go of at once, and its spool with it: whoever ends the sweep opens it again.
            state["parent"] = open_parent(sweep, tracker, store, state).run_id
        write_json(sweep / STATE, {**state, "open": True})
        parent: str | None = state["parent"]
        return parent


def open_parent(sweep: Path, tracker: TrackerConfig, store: Path, state: Mapping[str, Any]) -> Tracker:
    """Open the sweep's run, or again where it was open before; nothing but what is logged happens to it."""
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
            },
            directory=sweep,
            run_id=state.get("parent"),
        )
    )
    return opened


def read_state(sweep: Path) -> dict[str, Any]:
    """What is kept of a sweep: its command and launcher, its ``parent``, and whether that is ``open``."""
    return read_json(sweep / STATE)


def note_state(sweep: Path, **values: Any) -> None:
    """Change some of `read_state`."""
    with _alone(sweep):
        write_json(sweep / STATE, {**read_state(sweep), **values})


def _alone(sweep: Path) -> AbstractContextManager[None]:
    """While the block runs no other job, in whatever process, looks at the sweep's state."""
    return exclusive(sweep / ".state.lock", f"The sweep {sweep} is being opened")
