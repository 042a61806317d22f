"""One list of stages, and that a file of its own is all that another one takes."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sparse_exp import experiment as experiments
from sparse_exp.config import schema
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.resolve import resolve
from sparse_exp.runs.directory import Run
from sparse_exp.stages.base import Outcome, Stage
from sparse_exp.stages.names import expected_names
from sparse_exp.stages.registry import STAGES

LEAST = {
    "name": "least",
    "model": {"name": "yolov5n", "size": "n", "weights": "scratch"},
    "dataset": {"name": "digits", "generator": "digits", "imgsz": 96},
    "recipe": {"name": "dense", "file": "dense.md"},
    "hardware": {"name": "cpu", "engines": ["onnxruntime"]},
    "tracker": {"backend": "none"},
    "paths": {"output": "out", "run": "run", "mlflow": "mlflow", "zoo": "zoo", "cache": "cache"},
}


def resolved(**changes) -> Experiment:
    return resolve(OmegaConf.merge(OmegaConf.structured(Experiment), LEAST, changes))


def test_what_runs_by_default_is_the_registry_in_its_order():
    assert list(STAGES) == list(schema.STAGES)
    assert all(stage.name == name for name, stage in STAGES.items())


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_what_a_stage_names_is_there(stage):
    assert set(stage.depends_on) <= {field.name for field in fields(Experiment)}
    if stage.held_until:
        assert list(STAGES).index(stage.held_until) > list(STAGES).index(stage.name)


@pytest.fixture
def toy(monkeypatch) -> list[str]:
    """Another stage behind all others; where it ran."""
    ran: list[str] = []

    def write(context) -> Outcome:
        ran.append(context.run.path.name)
        table = write_text(context.run.path / "toy.txt", context.experiment.name)
        return Outcome([table], {"toy/size": 5.0}, {"seed": context.experiment.seed})

    stage = Stage(
        "toy",
        write,
        depends_on=("seed",),
        certain_names=lambda _: iter(["toy/size"]),
        check=lambda experiment: iter(["A toy is no model."] if experiment.publish else []),
    )
    monkeypatch.setitem(STAGES, "toy", stage)
    return ran


def test_another_stage_runs_behind_the_others_and_is_kept(toy, caplog):
    caplog.set_level(logging.INFO, "sparse_exp")
    experiment = resolved(stages=["toy"])
    assert experiment.stages == ["toy"]
    result = experiments.run(experiment, {}, ["stages=[toy]"])
    assert result.keys() == {"toy/size", "time/toy_s"} == expected_names(experiment)
    assert json.loads(Path("run/result.json").read_text()) == result
    record = Run.read(Path("run")).records["toy"]
    assert (record.metrics, record.facts) == ({"toy/size": 5.0}, {"seed": 0})
    assert record.outputs.keys() == {"toy.txt"}
    assert Path("run/toy.txt").read_text() == "least"

    experiments.run(resolved(stages=["toy"], resume="run"), {}, [])
    assert toy == ["run"]
    assert "== toy: finished before, kept" in caplog.messages
    experiments.run(resolved(stages=["toy"], resume="run", seed=1), {}, [])
    assert toy == ["run", "run"]
    assert "== toy: done again, as seed changed" in caplog.messages


def test_another_stage_has_its_place_behind_those_that_are_chosen_with_it(done, toy):
    experiment = resolved(stages=["toy", "report", "fetch"])
    assert experiment.stages == ["fetch", "report", "toy"]
    experiments.run(experiment, {}, [])
    assert (done(), toy) == (["fetch", "report"], ["run"])
    assert list(Run.read(Path("run")).records) == ["fetch", "report", "toy"]


def test_another_stage_is_named_and_asked_where_choices_are_checked(toy):
    with pytest.raises(ConfigError, match="register, toy, but got 'play'"):
        resolved(stages=["play"])
    with pytest.raises(ConfigError, match=r"A toy is no model\."):
        resolved(stages=["evaluate", "export", "publish"], checkpoint="run.py", publish="auto")
