"""Tracking stores as the tests write to them and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_exp.config.schema import TrackerConfig

QUIET = TrackerConfig(system_metrics=False)


def client(store: Path) -> Any:
    """MLflow's client of the database in a store."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
