"""Which tracking store is meant, and whether it can be used, without importing MLflow."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from sparse_exp.config.places import SQLITE
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import expected
from sparse_exp.locks import exclusive
from sparse_exp.redaction import without_secrets
from sparse_exp.tracking.messages import one_line

LOCAL = "paths.mlflow"
"""What names the local store."""
_LOCK_TIMEOUT_S = 120
_ANSWER_TIMEOUT_S = 10
_POSTGRES_LOCK = 7_341_905_522  # any number that nobody else takes
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def tracking_uri(config: TrackerConfig, store: Path) -> tuple[str, str]:
    """The address that runs are logged to, and what named it.

    That is ``config.uri``, which `sparse_exp.config.places` leaves empty where the environment wins, then
    ``MLFLOW_TRACKING_URI`` of the environment, then SQLite in ``store``.
    """
    local = f"{SQLITE}{store.absolute() / 'mlflow.db'}"
    if config.uri:
        return config.uri, LOCAL if config.uri == local else "tracker.uri"
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, "MLFLOW_TRACKING_URI"
    return local, LOCAL


@contextmanager
def ready_database(uri: str) -> Iterator[None]:
    """Hold the lock of a database, which processes that create it at once would corrupt.

    Of a database server first looks whether something listens there: MLflow would try for minutes. A
    tracking server (http) looks after its database itself.

    Raises:
        ValueError: the path cannot be written in a database address.
        sqlite3.Error: it is no database, or not writable; MLflow would try for minutes.
        ConfigError: another process has been opening it for minutes.
        OSError: its directory cannot be made, or nothing answers at its host and port.
        Exception: the database server's, such as that there is no such user.
    """
    _require_listener(uri)
    if uri.startswith("postgresql"):
        with _postgres_lock(uri):
            yield
        return
    if not uri.startswith(SQLITE):
        yield
        return
    if "?" in uri:
        raise ValueError("a path with a question mark does not work for SQLite")
    database = Path(uri.removeprefix(SQLITE))
    lock, what = database.with_name(f"{database.name}.lock"), f"The database {database} is being opened"
    with exclusive(lock, what, at_most=_LOCK_TIMEOUT_S):
        with closing(sqlite3.connect(database, timeout=_LOCK_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        yield


@contextmanager
def _postgres_lock(uri: str) -> Iterator[None]:
    """Hold a lock that all processes on all machines see, for as long as the connection is open."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_POSTGRES_LOCK})"))
        yield


def _require_listener(uri: str) -> None:
    address = urlsplit(uri)
    port = _PORTS.get(address.scheme.partition("+")[0])
    if port is not None and address.hostname:
        socket.create_connection((address.hostname, address.port or port), _ANSWER_TIMEOUT_S).close()


def unusable(uri: str, named_by: str, error: BaseException) -> str:
    """What to tell of a store that cannot be used.

    Args:
        uri: its address; a password in it is not shown.
        named_by: see `tracking_uri`.
        error: what happened.
    """
    what = f"the MLflow tracking store ({named_by})"
    do = f"({one_line(error)}) Start or repair it, name another with tracker.uri, or set tracker=none."
    return expected(what, "usable", without_secrets(uri), do)
