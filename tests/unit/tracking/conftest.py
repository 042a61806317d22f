"""Stores for the tests: making a database takes MLflow seconds, so one is made and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def new_database(tmp_path_factory) -> Path:
    """The database of a store without runs."""
    from sparse_exp.tracking.mlflow import connect

    path = tmp_path_factory.mktemp("new") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def make_store(new_database, tmp_path_factory):
    """A function that makes a store without runs in a directory of that name."""

    def make(name: str) -> Path:
        store = tmp_path_factory.mktemp(name) / "store"
        store.mkdir()
        shutil.copy(new_database, store)
        return store

    return make


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory of its own for each test, and no tracking server in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
