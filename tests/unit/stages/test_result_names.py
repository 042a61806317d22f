"""Names of results before there is one, held against what runs really left."""

from __future__ import annotations

import pytest

from sparse_exp.benchmark import Measurement, cells_of
from sparse_exp.benchmark.measurements import Round
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    HardwareConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    RecoveryConfig,
)
from sparse_exp.errors import ConfigError
from sparse_exp.export.accuracy import FileSizes, size_metrics
from sparse_exp.export.differences import Differences, matched_shares
from sparse_exp.metrics.recovery import recovery_metrics
from sparse_exp.runs.deployment import wanted_files
from sparse_exp.stages import benchmark
from sparse_exp.stages.names import certain_names, expected_names, resolve_objective

STAGES = ["fetch", "plan", "train", "evaluate", "export", "verify", "benchmark", "report"]


def experiment(**changes) -> Experiment:
    parts = {
        "name": "x",
        "stages": list(STAGES),
        "model": ModelConfig("yolov5n", "n"),
        "dataset": DatasetConfig("digits", generator="digits"),
        "recipe": RecipeConfig("transfer_quant", "transfer_quant.md"),
        "hardware": HardwareConfig("cpu", ["deepsparse", "onnxruntime"], batch_sizes=[1, 16]),
        "paths": PathsConfig(run="run", mlflow="mlflow", zoo="zoo"),
    }
    return Experiment(**{**parts, **changes})


def speeds_of(cell) -> set[str]:
    return set(Measurement(cell, [Round([0.1], 0.1)]).metrics())


def test_speeds_of_every_scenario_and_every_possible_cell_are_expected(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "usable_physical_cores", lambda: 3)
    hardware = HardwareConfig(
        "cpu", engines=["openvino", "torch"], variants=["dense", "dense_int8", "sparse_fp32", "sparse"],
        scenarios=["sync", "throughput", "async"], batch_sizes=[1, 16],
    )  # fmt: skip
    certain, expected = (
        certain_names(experiment(hardware=hardware)),
        expected_names(experiment(hardware=hardware)),
    )
    for cell in cells_of(hardware, 3, lambda *_: tmp_path):
        sure = cell.engine != "torch" and cell.variant in ("dense", "sparse")
        assert speeds_of(cell) <= (certain if sure else expected - certain)
    assert "benchmark/torch/sparse_fp32/b1_async3/latency_p999_ms" in expected


def test_each_measured_name_is_expected(tmp_path):
    """The functions that make the numbers are asked, not a list of names."""
    certain = certain_names(experiment())
    cells = cells_of(experiment().hardware, 1, lambda *_: tmp_path)
    assert set().union(*(speeds_of(cell) for cell in cells)) <= certain
    files = {name: FileSizes(1.0, 1.0, 1.0) for name in ("model.onnx", "dense.onnx")}
    assert set(size_metrics(files)) <= certain
    names = {"qdq": "model.qdq.onnx", "onnxruntime": "model.onnxruntime.onnx"}
    quantized = set(size_metrics(dict.fromkeys(names.values(), FileSizes(1.0, 1.0, 1.0))))
    kinds = ("onnx_mb", "onnx_gzip_mb", "nonzero_mb")
    assert quantized == {f"size/{name}/{kind}" for name in names for kind in kinds}
    assert quantized <= expected_names(experiment()) - certain
    compared = {**Differences().result(), **matched_shares([], [])}
    assert {f"verify/deepsparse/{name}" for name in compared} <= certain
    recovered = recovery_metrics({"map50": 0.5}, {"deployed/onnxruntime/map50": 0.4}, ["onnxruntime"])
    with_baseline = experiment(recovery=RecoveryConfig("auto"))
    assert set(recovered) <= expected_names(with_baseline) - certain_names(with_baseline)
    assert not set(recovered) & expected_names(experiment())


def test_the_cells_of_the_square_may_be_measured():
    engines = ["deepsparse", "openvino", "torch"]
    square = experiment(
        hardware=HardwareConfig("cpu", engines, ["dense", "dense_int8", "sparse_fp32", "sparse"])
    )
    certain, possible = certain_names(square), expected_names(square) - certain_names(square)
    files = [name for name in wanted_files(engines, square.hardware.variants) if not name.endswith(".pt")]
    sizes = size_metrics({name: FileSizes(1.0, 1.0, 1.0) for name in files})
    assert len(sizes) == 9  # three files: two of the dense network in int8, one of the sparse in fp32
    maps = {
        f"deployed/{engine}/{variant}/map50" for engine in engines for variant in ("dense", "sparse_fp32")
    }
    assert {*sizes, *maps, "deployed/torch/map50", "deployed/openvino/dense_int8/map50"} <= possible
    assert {name for name in certain if "/torch/" in name} == set()
    assert not [name for name in expected_names(experiment()) if "int8" in name or "fp32" in name]


def test_names_follow_stages_engines_and_batch_sizes():
    trained = experiment(stages=["fetch", "train", "evaluate"])
    assert expected_names(trained) == {
        "time/fetch_s", "time/train_s", "time/evaluate_s", "weights/origin", "val/map50", "val/map50_95",
        "test/map50", "test/map50_95", "sparsity/prunable", "sparsity/total", "size/checkpoint_mb",
        "sparsity/macs", "size/macs", "size/dense_macs",
    }  # fmt: skip
    assert expected_names(trained) - certain_names(trained) == {"test/map50", "test/map50_95"}
    names = expected_names(experiment())
    assert "benchmark/onnxruntime/dense/b16/latency_p99_ms" in names
    assert not [name for name in names if "openvino" in name or "/b4/" in name]


def test_a_run_that_is_gone_on_with_has_what_its_earlier_stages_measured():
    only = experiment(stages=["benchmark"])
    assert "val/map50" not in expected_names(only)
    only.resume = "run"
    assert "val/map50" in expected_names(only)
    assert "val/map50" not in certain_names(only)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("map50", "val/map50"),
        ("items_per_s", "benchmark/deepsparse/sparse/b1/items_per_s"),
        ("onnxruntime/items_per_s", "benchmark/onnxruntime/sparse/b1/items_per_s"),
        ("size/onnx_gzip_mb", "size/onnx_gzip_mb"),
        ("b16/latency_p50_ms", "benchmark/deepsparse/sparse/b16/latency_p50_ms"),
    ],
)
def test_objectives_in_short(short, full):
    assert resolve_objective(short, experiment()) == full


def test_a_misspelt_objective_names_the_closest():
    with pytest.raises(ConfigError, match=r"sweep\.objectives: .* got 'mapp50'\. Nearest: map50") as caught:
        resolve_objective("mapp50", experiment())
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="objectives"):  # a text is no number
        resolve_objective("weights/origin", experiment())
    with pytest.raises(ConfigError, match="objectives"):  # not measured by these stages
        resolve_objective("items_per_s", experiment(stages=["fetch", "train", "evaluate"]))


def test_the_engines_share_of_a_dense_baseline_is_named_as_recovery_names_it():
    names = expected_names(experiment(recovery=RecoveryConfig("auto"), stages=["baseline", "verify"]))
    assert {"baseline/map50", "recovery/map50", "recovery/deepsparse/map50"} <= names
