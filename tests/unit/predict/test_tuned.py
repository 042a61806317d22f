"""Which settings of a run's benchmark are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.predict.models import Model
from sparse_exp.predict.tuned import tuned

OPTIONS = {"spinning": False}


@pytest.fixture
def model(tmp_path) -> Model:
    path = tmp_path / "run" / "deployment" / "model.onnxruntime.onnx"
    path.parent.mkdir(parents=True)
    path.touch()
    return Model(path, (), 32, "onnxruntime", "run")


def row(**changed) -> dict:
    return {
        "engine": "onnxruntime",
        "model": "model.onnxruntime.onnx",
        "batch": 1,
        "streams": 2,
        "options": OPTIONS,
        "cores": usable_physical_cores(),
        "cpu": host_facts().cpu,
        "items_per_s": 10.0,
        **changed,
    }


def found(model: Model, rows: object, *, beside: str = "benchmark.json", **asked) -> tuple[int, dict]:
    place = model.path.parent.parent / beside
    place.parent.mkdir(exist_ok=True)
    place.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    settings = tuned(model, {"batch_size": 1, "cores": None, "streams": None, "conf": 0.5, **asked})
    assert settings["conf"] == 0.5
    return settings["streams"], settings["options"]


def test_the_fastest_setting_of_this_file_on_such_a_cpu_counts(model):
    slower = row(streams=1, items_per_s=5, options={})
    assert found(model, [slower, row()]) == (2, OPTIONS)
    assert found(model, [slower, row()], streams=1) == (1, {})
    assert found(model, [row()], beside="logs/benchmark.json") == (2, OPTIONS)


@pytest.mark.parametrize(
    "other",
    [
        {"engine": "openvino"},
        {"model": "dense.onnx"},
        {"batch": 8},
        {"cores": 999},
        {"cpu": "Z80"},
        {"items_per_s": None},
        {"impossible": "why", "items_per_s": None},
        {"options": {"gone": 1}},
        {"options": {"spinning": "never"}},
        {"options": None},
        {"streams": 0},
    ],
)
def test_other_measurements_do_not(model, other):
    assert found(model, [row(**other)]) == (1, {})


@pytest.mark.parametrize("text", ["", "{}", "[1, null]", "[" * 100_000])
def test_what_is_no_benchmark_is_none(model, text):
    assert found(model, text) == (1, {})
    assert found(model, text, streams=4) == (4, {})


def test_without_a_benchmark(model):
    assert tuned(
        Model(Path("model.onnx"), (), 32, "torch", ""), {"batch_size": 1, "cores": 1, "streams": None}
    ) == {
        "batch_size": 1,
        "cores": 1,
        "streams": 1,
        "options": {},
    }
