import hashlib

import numpy as np
import pytest
from stores import QUIET, client

from sparse_exp.tracking import Model, RunInfo
from sparse_exp.tracking.mlflow import MlflowTracker

TAGS = {"map50": "0.5000", "sparsity": "0.7500", "run": "a run", "sparse_exp.version": "0.1.0"}


@pytest.fixture(scope="module")
def store(make_store):
    return make_store("läufe 1")


def register(store, directory, model, run_id=None):
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("a run", "trees", {}, {}, directory, run_id))
    tracker.log(model)
    tracker.finish("FINISHED")
    return tracker.run_id


@pytest.fixture
def model(tmp_path):
    """A graph with the ends of a deployed one: images as bytes in, 252 boxes of 15 numbers out."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
        helper.make_node("Slice", ["flat", "first", "last"], ["predictions"]),
    ]
    values = {"shape": [0, -1, 15], "first": [0, 0, 0], "last": [10**6, 252, 15]}
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 60, 64])],
        [helper.make_tensor_value_info("predictions", TensorProto.FLOAT, ["batch", 252, 15])],
        [helper.make_tensor(name, TensorProto.INT64, [3], data) for name, data in values.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


def versions(store, name):
    found = client(store).search_model_versions(f"name = '{name}'")
    return sorted((int(version.version), version.run_id) for version in found)


def test_the_registered_model_is_the_deployed_file_and_says_what_goes_in_and_out(store, tmp_path, model):
    import mlflow
    import onnx

    run_id = register(store, tmp_path / "run", Model(model, "crowns", "candidate", TAGS))
    mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
    try:
        loaded = mlflow.onnx.load_model("models:/crowns@candidate")
        signature = mlflow.models.get_model_info("models:/crowns@candidate").signature
        predict = mlflow.pyfunc.load_model("models:/crowns@candidate").predict
    finally:
        mlflow.set_tracking_uri(None)
    assert loaded == onnx.load(str(model))
    (image,), (prediction,) = signature.inputs.inputs, signature.outputs.inputs
    assert (image.name, image.type, image.shape) == ("images", np.dtype("uint8"), (-1, 3, 60, 64))
    assert (prediction.name, prediction.type, prediction.shape) == (
        "predictions", np.dtype("float32"), (-1, 252, 15)
    )  # fmt: skip
    answer = predict({"images": np.zeros((2, 3, 60, 64), np.uint8)})["predictions"]
    assert answer.shape == (2, 252, 15)
    version = client(store).get_model_version_by_alias("crowns", "candidate")
    assert version.tags == {**TAGS, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    assert (version.run_id, version.status) == (run_id, "READY")
    assert client(store).list_artifacts(run_id, "registered_model")
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_goes_on_does_not_register_twice_and_moves_the_alias(store, tmp_path, model):
    first = register(store, tmp_path / "run", Model(model, "twice", "candidate", TAGS))
    other = register(store, tmp_path / "other", Model(model, "twice", "candidate", TAGS))
    again = register(store, tmp_path / "run", Model(model, "twice", "shipped", TAGS), first)
    assert again == first
    assert versions(store, "twice") == [(1, first), (2, other)]
    of = client(store).get_model_version_by_alias
    assert (of("twice", "candidate").version, of("twice", "shipped").version) == (2, 1)


def test_a_file_that_changed_is_another_version(store, tmp_path, model):
    import onnx

    first = register(store, tmp_path / "run", Model(model, "changed", None, TAGS))
    graph = onnx.load(str(model))
    graph.producer_version = "another"
    onnx.save(graph, str(model))
    register(store, tmp_path / "run", Model(model, "changed", None, TAGS), first)
    assert versions(store, "changed") == [(1, first), (2, first)]
    assert client(store).get_registered_model("changed").aliases == {}


def test_a_model_waits_like_other_events(store, tmp_path, model, monkeypatch, caplog):
    from sparse_exp.runs.directory import Run, StageRecord
    from sparse_exp.tracking import as_plain
    from sparse_exp.tracking.__main__ import main

    run = Run.create(tmp_path / "run", overwrite=False)
    event = Model(model.rename(run.path / "model.onnx"), "late", "candidate", TAGS)
    run.record("register", StageRecord("mark", events=[as_plain(event, run.path)]))
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("a run", "trees", {}, {}, run.path))
    with monkeypatch.context() as patch:
        patch.setattr(tracker._delivery, "_send", out_of_reach)
        tracker.log(event)
        told = tracker.finish("FINISHED")
    address = {"tracker_run_id": tracker.run_id, "tracker_address": tracker.address}
    run.update(status="FINISHED", told=told, **address)
    assert "model" in caplog.text
    assert versions(store, "late") == []
    assert main(["sync", "run"]) == 0
    assert versions(store, "late") == [(1, tracker.run_id)]
    assert client(store).get_model_version_by_alias("late", "candidate").version == 1


def out_of_reach(*_):
    raise ConnectionError("out of reach")
