"""Stores for the tests, and what keeps them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


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
