"""Runs straight from the SQLite file that MLflow keeps them in.

Of 1,000 runs with 200 metrics each MLflow's client makes objects for half a minute, after it was imported for
some seconds; the same four tables are read here in less than one. Databases of another make, and servers,
are read through the client.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sparse_exp.tracking import PARENT_TAG, FoundRun

_RUNS = """
    SELECT r.run_uuid, r.name, r.status, r.start_time FROM runs r JOIN experiments e USING (experiment_id)
    WHERE r.lifecycle_stage = 'active' AND e.lifecycle_stage = 'active' AND {condition}
    ORDER BY r.start_time DESC, r.run_uuid LIMIT ?
"""
_CHILD_OF = f"r.run_uuid IN (SELECT run_uuid FROM tags WHERE key = '{PARENT_TAG}' AND value IN ({{marks}}))"


def read(
    database: Path, *, experiment: str | None, run_ids: Sequence[str], newest: int | None = None
) -> list[FoundRun]:
    """Runs of an MLflow database, newest first; see `sparse_exp.tracking.reading.read_runs`.

    Args:
        database: SQLite file; it is only read.
        experiment: name of the experiment to read, None: all.
        run_ids: read these runs and their children; empty: all.
        newest: of these, so many that started last; None: all.

    Raises:
        sqlite3.Error: it is no such database, or one whose tables have changed.
    """
    condition, values = _condition(experiment, run_ids)
    # As an address, so that nothing is made where there is no file, and nothing changed where there is one.
    with closing(
        sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", timeout=60, uri=True)
    ) as connection:
        limit = -1 if newest is None else newest  # -1: none, in SQLite
        runs = connection.execute(_RUNS.format(condition=condition), [*values, limit]).fetchall()
        wanted = {run_id for run_id, *_ in runs}
        metrics = _by_run(
            connection, "SELECT run_uuid, key, value FROM latest_metrics WHERE NOT is_nan", wanted
        )
        tags = _by_run(connection, "SELECT run_uuid, key, value FROM tags", wanted)
    return [
        FoundRun(run_id, tags[run_id], metrics[run_id], name or "", status, int(started or 0))
        for run_id, name, status, started in runs
    ]


def _condition(experiment: str | None, run_ids: Sequence[str]) -> tuple[str, list[str]]:
    if run_ids:
        marks = ", ".join("?" * len(run_ids))
        return f"(r.run_uuid IN ({marks}) OR {_CHILD_OF.format(marks=marks)})", [*run_ids, *run_ids]
    return ("e.name = ?", [experiment]) if experiment is not None else ("1", [])


def _by_run(connection: sqlite3.Connection, query: str, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Keys and values of each wanted run. The whole table is read: that is faster than asking run by run."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for run_id, key, value in connection.execute(query):
        if run_id in wanted:
            found[run_id][key] = value
    return found
