"""Artifacts of a local store that was moved or copied.

MLflow's database has the full address of each experiment's and each run's artifacts, so that after a move new
runs would write to the old place, and the UI would look there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "artifacts"
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_SQL = """
    UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1)
    WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'
"""


def moved_from(store: Path) -> list[str]:
    """Addresses of directories that the artifacts of a local store were in before it came to where it is.

    Args:
        store: directory of ``mlflow.db``.

    Returns:
        Those in which experiments still keep their artifacts, as ``file://``, although the files of runs are
        in this store, or those that are gone, but for what may lie on a share that is not mounted. Empty
        where nothing is wrong, or there is no database.
    """
    database = store.absolute() / "mlflow.db"
    if not database.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return list(_strange(connection, store.absolute() / ARTIFACTS))
    except sqlite3.Error:  # not MLflow's, or of another version: its own client says so
        return []


def relocate(store: Path) -> list[str]:
    """Let a store that was moved have its artifacts where they are now.

    Args:
        store: directory of ``mlflow.db``; no other process may be creating its tables.

    Returns:
        The former addresses; see `moved_from`.

    Raises:
        sqlite3.Error: the database cannot be written.
    """
    former, here = moved_from(store), (store.absolute() / ARTIFACTS).as_uri()
    if not former:
        return []
    with closing(sqlite3.connect(store.absolute() / "mlflow.db", timeout=60)) as connection, connection:
        for table, column in _COLUMNS:
            if column not in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
                continue
            for old in former:
                connection.execute(_SQL.format(table=table, column=column), {"old": old, "new": here})
    return former


def _strange(connection: sqlite3.Connection, here: Path) -> Iterator[str]:
    found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    for (location,) in found:
        place = urlsplit(location or "")
        # MLflow's own choice for an experiment that its UI has made ends with the experiment's number.
        if place.scheme != "file" or not location.endswith(f"/{ARTIFACTS}") or location == here.as_uri():
            continue
        runs = connection.execute(
            "SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) WHERE artifact_location = ?",
            (location,),
        )
        here_now = [(here / run_id).is_dir() for (run_id,) in runs]
        if any(here_now) or _was_moved(Path(unquote(place.path)), with_runs=bool(here_now)):
            yield location


def _was_moved(former: Path, *, with_runs: bool) -> bool:
    """Whether a directory is gone; what is below an empty one may be on a share that is not mounted."""
    if former.is_dir():
        return False
    above = next(parent for parent in former.parents if parent.is_dir())
    return not with_runs or any(above.iterdir())
