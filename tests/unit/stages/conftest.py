"""Runs on a data set of one's own whose expensive stages do next to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from webserver import server  # noqa: F401

from sparse_exp import experiment as experiments
from sparse_exp import locks
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    HardwareConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    TrackerConfig,
)
from sparse_exp.data.digits import materialize
from sparse_exp.files import sha256_of, write_text
from sparse_exp.runs.directory import MANIFEST
from sparse_exp.stages.base import Context, Outcome
from sparse_exp.stages.registry import STAGES

Done = Callable[[], list[str]]
MadeUp = Callable[..., Experiment]


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "default_lock_path", lambda: tmp_path / "host.lock")


@pytest.fixture
def done(monkeypatch) -> Done:
    """All stages but fetch write a line each; a function that says which were done since it last did."""
    log: list[str] = []

    def counted(stage: str, real: Callable[[Context], Outcome] | None) -> Callable[[Context], Outcome]:
        def do(context: Context) -> Outcome:
            log.append(stage)
            files = [write_text(context.run.path / f"{stage}.txt", stage)]
            return real(context) if real else Outcome(files, {f"{stage}/x": 1.0})

        return do

    for name, stage in STAGES.items():
        do = counted(name, stage.run if name == "fetch" else None)
        monkeypatch.setitem(STAGES, name, replace(stage, run=do))
    monkeypatch.setattr(experiments, "packages", list)  # what is written down of this host
    monkeypatch.setattr(experiments, "current", lambda recipe: {"recipe": sha256_of(recipe)})

    def said() -> list[str]:
        names = log.copy()
        log.clear()
        return names

    return said


@pytest.fixture
def data(tmp_path) -> Path:
    """The yaml of a data set of two images a split; its label files may be changed."""
    return materialize(tmp_path / "data", imgsz=64, train=2, val=2, test=0)


@pytest.fixture
def start(tmp_path) -> Path:
    """A file that stands for a start checkpoint: no stage here reads it."""
    return write_text(tmp_path / "start.pt", "start")


@pytest.fixture
def experiment(data, start) -> MadeUp:
    """A function that makes the experiment of a run in a directory, with some groups replaced."""

    def make(run: str = "run", **changes) -> Experiment:
        values = {
            "name": "tiny",
            "stages": ["fetch", "plan", "train", "evaluate"],
            "model": ModelConfig(name="yolov5n", size="n", weights=str(start)),
            "dataset": DatasetConfig(name="own", path=str(data), imgsz=64),
            "recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 1}),
            "hardware": HardwareConfig(name="cpu", engines=["onnxruntime"], cores=[1]),
            "tracker": TrackerConfig(backend="none"),
            "paths": PathsConfig(output="out", run=run, mlflow="mlflow", zoo="zoo", cache="cache"),
        }
        return Experiment(**{**values, **changes})

    return make


@pytest.fixture
def go(experiment) -> Callable[..., dict]:
    """A function that starts the run, or goes on with it where it was started before; its manifest."""

    def start_or_resume(run: str = "run", **changes) -> dict:
        there = run if (Path(run) / MANIFEST).is_file() else None
        experiments.run(experiment(run, resume=there, **changes), {}, [])
        return json.loads((Path(run) / MANIFEST).read_text(encoding="utf-8"))

    return start_or_resume
