"""The stage that registers: which file, under which tags, and not without a verified deployment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sparse_exp import __version__
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.stages.base import Outcome
from sparse_exp.stages.baseline import dense_experiment
from sparse_exp.stages.register import STAGE
from sparse_exp.tracking import Model

VERIFIED = {"deployed/onnxruntime/map50": 0.51234, "deployed/deepsparse/map50": 0.5, "sparsity/onnx": 0.75}


@pytest.fixture
def context(tmp_path):
    """A run that asks for registration."""
    experiment = Experiment(name="a run")
    experiment.tracker.register, experiment.tracker.alias = "crowns", "candidate"
    run = Run.create(tmp_path / "run", overwrite=False)
    (run.path / "deployment").mkdir()
    (run.path / "deployment" / "model.onnx").write_bytes(b"graph")
    return SimpleNamespace(experiment=experiment, run=run)


@pytest.mark.parametrize(
    ("engines", "engine", "map50"),
    [
        (["deepsparse", "onnxruntime"], "onnxruntime", "0.5123"),  # which computes what MLflow loads
        (["deepsparse", "openvino"], "deepsparse", "0.5000"),
    ],
)
def test_the_deployed_file_goes_with_what_was_measured_of_it(context, engines, engine, map50):
    context.experiment.hardware.engines = engines
    context.run.record("verify", StageRecord("mark", metrics=VERIFIED))
    outcome = STAGE.run(context)
    file = context.run.path / "deployment" / "model.onnx"
    tags = {
        "map50": map50,
        "engine": engine,
        "sparsity": "0.7500",
        "run": "a run",
        "sparse_exp.version": __version__,
    }
    assert outcome.events == [Model(file, "crowns", "candidate", tags)]
    assert outcome.facts == {"name": "crowns", "alias": "candidate", "sha256": sha256_of(file)}


@pytest.mark.parametrize(
    ("engines", "file"),
    [
        (["onnxruntime", "deepsparse"], "model.qdq.onnx"),
        (["openvino", "deepsparse"], "model.onnx"),
        (["openvino"], "model.qdq.onnx"),
        (["torch"], "model.onnx"),
    ],
)
def test_of_a_quantized_run_the_file_goes_whose_accuracy_is_told(context, engines, file):
    (context.run.path / "deployment" / "model.qdq.onnx").write_bytes(b"pairs")
    context.experiment.hardware.engines = engines
    context.run.record("verify", StageRecord("mark", metrics=VERIFIED))
    (event,) = STAGE.run(context).events
    assert event.path.name == file


def test_a_quantized_file_for_which_only_torch_was_asked_has_no_accuracy(context):
    context.experiment.hardware.engines = ["torch"]
    context.run.record("verify", StageRecord("mark", metrics=VERIFIED))
    (event,) = STAGE.run(context).events
    assert event.tags == {
        "engine": "torch",
        "sparsity": "0.7500",
        "run": "a run",
        "sparse_exp.version": __version__,
    }


def test_what_was_not_verified_is_not_registered(context):
    with pytest.raises(ConfigError, match="no verified deployment"):
        STAGE.run(context)
    context.experiment.tracker.register = None
    assert STAGE.run(context) == Outcome()


def test_the_dense_counterpart_does_not_register_or_publish_itself(context):
    context.experiment.publish = "auto"
    dense = dense_experiment(context.experiment, 3.0)
    assert (dense.tracker.register, dense.tracker.alias, dense.publish) == (None, None, None)
    assert "register" not in dense.stages
    assert context.experiment.tracker.register == "crowns"
