"""Tracking stores as the tests write to them and look into them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from percentiles import needs_many_inferences

from sparse_exp.config.schema import TrackerConfig

QUIET = TrackerConfig(system_metrics=False)


def client(store: Path) -> Any:
    """MLflow's client of the database in a store."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


# Of a run, as its name is, which its files hold, too: they differ between two undisturbed runs.
_OWN = re.compile(
    r"time/|size/|benchmark/|images_per_s|seconds|run\.directory|overrides|mlflow\.runName|paths\.run"
)


def known(client: Any, run_id: str) -> dict[str, Any]:
    """What a store knows of a run and must know of each run that was started with the same words."""
    run = client.get_run(run_id)
    keys = [key for key in run.data.metrics if not _OWN.search(key)]
    return {
        "metrics": {key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys},
        "names": {name for name in (*run.data.metrics, *run.data.params) if not needs_many_inferences(name)},
        "params": {key: value for key, value in run.data.params.items() if not _OWN.search(key)},
        "tags": {key: value for key, value in run.data.tags.items() if not _OWN.search(key)},
        "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
        "files": _files_below(client, run_id),
        "status": run.info.status,
    }


def _files_below(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    found = set()
    for file in client.list_artifacts(run_id, folder):
        found |= _files_below(client, run_id, file.path) if file.is_dir else {file.path}
    return found
