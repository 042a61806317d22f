"""Run directories as past runs leave them, made by the writers that real runs use."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp.files import write_json
from sparse_exp.runs.directory import Run, StageRecord


@pytest.fixture
def past_run():
    """A function that makes a run directory: its metrics, the words of its command line, how it ended."""

    def make(
        path: Path, metrics: dict, overrides: list | None = (), status: str = "FINISHED", **state
    ) -> Path:
        run = Run.create(path, overwrite=False)
        said = {} if overrides is None else {"overrides": list(overrides)}
        run.update(name=path.name, version="0.1.0", **said, **state)
        run.record("evaluate", StageRecord("mark", metrics=metrics, seconds=2.0))
        write_json(run.path / "result.json", run.result())
        run.update(status=status)
        return run.path

    return make
