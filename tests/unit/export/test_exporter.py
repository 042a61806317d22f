"""The files that a run is asked for, and what is measured of them: the stages export and verify."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse_exp.config.schema import (
    VARIANTS,
    DatasetConfig,
    Experiment,
    ExportConfig,
    HardwareConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    TrainerConfig,
)
from sparse_exp.engines.signature import read_signature
from sparse_exp.errors import Impossible
from sparse_exp.export import exporter as exporting
from sparse_exp.metrics.classes import PREFIX
from sparse_exp.recipes.checkpoints import CheckpointWriter
from sparse_exp.runs.deployment import MODEL, QDQ
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.stages.base import Context, Stage
from sparse_exp.stages.fingerprint import Fingerprint, take_fingerprint
from sparse_exp.stages.names import expected_names
from sparse_exp.stages.registry import STAGES
from sparse_exp.yolov5 import YOLOv5

ALL = list(VARIANTS)
EXPORT, VERIFY = STAGES["export"], STAGES["verify"]
LOOSE = ExportConfig(box_atol=100.0, score_atol=1.0, map_atol=1.0)  # of a training of a few steps


def context_of(run: Run, digits, engines, variants) -> Context:
    experiment = Experiment(
        name="x",
        stages=["train", "export", "verify"],
        model=ModelConfig("yolov5n", "n"),
        dataset=DatasetConfig("digits", generator="digits", imgsz=64),
        recipe=RecipeConfig("transfer_quant", "transfer_quant.md", calibration_images=8),
        hardware=HardwareConfig("cpu", engines, variants, cores=[1]),
        trainer=TrainerConfig(val_batch_size=4),
        export=LOOSE,
        paths=PathsConfig(run=str(run.path), mlflow="mlflow", zoo="zoo"),
    )
    context = Context(experiment, run, None, SimpleNamespace(text=""))
    context.__dict__["dataset"] = digits
    return context


def do(context: Context, stage: Stage) -> StageRecord:
    outcome = stage.run(context)
    record = StageRecord("mark", context.run.digests(outcome.files), outcome.metrics, 1.0, outcome.facts)
    context.run.record(stage.name, record)
    return record


def run_of(path, weights, phases) -> Run:
    """The directory of a run that trained some phases, of which the last is deployed."""
    run = Run.create(path, overwrite=False)
    (run.path / "weights").symlink_to(weights)
    names = [f"weights/best_{phase}.pt" for phase in phases]
    run.record("train", StageRecord("mark", dict.fromkeys(names, ""), facts={"checkpoint": names[-1]}))
    return run


@pytest.fixture
def quantized_run(tmp_path, tiny_run) -> Run:
    return run_of(tmp_path / "run", tiny_run.weights, ("pruned", "pruned_quant"))


@pytest.fixture
def run(tmp_path, tiny_run) -> Run:
    return run_of(tmp_path / "run", tiny_run.weights, ("pruned",))


@pytest.fixture
def baseline(tmp_path, digits):
    torch.manual_seed(2)
    (tmp_path / "dense").mkdir()
    writer = CheckpointWriter(tmp_path / "dense", digits.names, 64, "")
    return writer.save("best_dense.pt", YOLOv5("n", 10), "dense", {"epoch": 1.0}, {})


def test_files_are_exported_for_images_of_the_datas_size(run, digits, caplog):
    context = context_of(run, digits, ["onnxruntime"], ["dense", "sparse"])
    context.experiment.dataset.imgsz = 96  # and the training's was 64
    assert do(context, EXPORT).facts["imgsz"] == 96
    sizes = {read_signature(run.path / "deployment" / name).size for name in ("model.onnx", "dense.onnx")}
    assert sizes == {(96, 96)}
    assert "The checkpoint was trained at 64 px, and is exported for 96 px." in caplog.text


def without_classes(metrics):
    """Names of metrics but those of single classes, which depend on the data."""
    return {name for name in metrics if not name.startswith(PREFIX)}


@pytest.mark.slow
def test_the_square_of_a_quantized_run(quantized_run, digits, baseline):
    quantized_run.record("baseline", StageRecord("mark", facts={"checkpoint": str(baseline)}))
    context = context_of(quantized_run, digits, ["deepsparse", "onnxruntime", "openvino", "torch"], ALL)
    exported, verified = do(context, EXPORT), do(context, VERIFY)
    assert exported.facts["impossible"] == {}
    assert exported.facts["sparse_fp32"]["origin"] == "the run's own best_pruned.pt"
    cells = {(cell["engine"], cell["variant"]): cell for cell in verified.facts["cells"]}
    assert len(cells) == 16
    impossible = {name for name, cell in cells.items() if cell["impossible"]}
    assert impossible == {("torch", "dense_int8"), ("torch", "sparse")}
    assert {cell["file"] for cell in cells.values()} == {
        "model.onnx", "model.qdq.onnx", "model.onnxruntime.onnx", "dense.onnx", "dense.pt",
        "sparse.fp32.onnx", "sparse.fp32.pt", "",
        "dense.int8.deepsparse.onnx", "dense.int8.onnxruntime.onnx", "dense.int8.openvino.xml",
    }  # fmt: skip
    assert all(cell["map50"] is not None for name, cell in cells.items() if name not in impossible)
    maps = {cell["map50"] for name, cell in cells.items() if name[1] == "sparse_fp32"}
    assert max(maps) - min(maps) < 1e-3  # the same weights in fp32
    assert verified.metrics["size/qdq/onnx_mb"] == cells["openvino", "sparse"]["sizes"]["onnx_mb"]
    assert without_classes(verified.metrics) <= expected_names(context.experiment)


@pytest.mark.slow
def test_the_square_of_a_run_in_fp32(run, digits, baseline):
    run.record("baseline", StageRecord("mark", facts={"checkpoint": str(baseline)}))
    context = context_of(run, digits, ["onnxruntime", "torch"], ALL)
    exported, verified = do(context, EXPORT), do(context, VERIFY)
    made = [MODEL, "dense.onnx", "dense.pt", "dense.int8.onnxruntime.onnx"]
    assert set(exported.outputs) == {f"deployment/{name}" for name in made}
    assert set(exported.facts["impossible"]) == {"sparse.fp32.onnx", "sparse.fp32.pt"}
    cells = {(cell["engine"], cell["variant"]): cell for cell in verified.facts["cells"]}
    impossible = {name for name, cell in cells.items() if cell["impossible"]}
    assert impossible == {("torch", "dense_int8"), ("torch", "sparse_fp32"), ("onnxruntime", "sparse_fp32")}
    assert "does not quantize" in cells["onnxruntime", "sparse_fp32"]["impossible"]
    for variant in ("dense", "sparse"):  # the same weights in fp32
        maps = [cells[engine, variant]["map50"] for engine in ("onnxruntime", "torch")]
        assert maps[0] == pytest.approx(maps[1], abs=1e-3)
    found = verified.metrics
    assert found["deployed/torch/map50"] == cells["torch", "sparse"]["map50"]
    assert found["deployed/torch/dense/map50"] == cells["torch", "dense"]["map50"]
    assert found["deployed/onnxruntime/dense_int8/map50"] == cells["onnxruntime", "dense_int8"]["map50"]
    assert found["size/dense_int8/onnxruntime/onnx_mb"] < 0.5 * found["size/dense_onnx_mb"]
    assert found["size/dense_checkpoint_mb"] == baseline.stat().st_size / 1e6
    assert without_classes(found) <= expected_names(context.experiment)


def test_initial_weights_are_not_evaluated_and_old_files_go(run, digits):
    context = context_of(run, digits, ["onnxruntime"], ["dense", "sparse"])
    (run.path / "deployment").mkdir()
    for name in (
        "model.qdq.onnx",
        "sparse.fp32.onnx",
        "dense.int8.openvino.bin",
        "model.mine.onnx",
        "notes.txt",
    ):
        (run.path / "deployment" / name).write_text("from before")
    do(context, EXPORT)
    verified = do(context, VERIFY)
    assert {path.name for path in (run.path / "deployment").iterdir()} == {
        MODEL, "dense.onnx", "model.mine.onnx", "notes.txt",  # what is not ours stays
    }  # fmt: skip
    assert "deployed/onnxruntime/map50" in verified.metrics
    assert not [name for name in verified.metrics if name.startswith("deployed/onnxruntime/dense")]
    assert verified.facts["cells"][0]["sizes"]["onnx_mb"] == verified.metrics["size/dense_onnx_mb"]
    with pytest.raises(
        Impossible, match=r"sparse\.fp32\.onnx .*Run the export stage with sparse_fp32"
    ) as error:
        context.run.deployment.file("onnxruntime", "sparse_fp32")
    assert "\n" not in str(error.value)


def test_what_a_quantizer_cannot_do_ends_a_cell_and_not_the_run(quantized_run, digits, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'nncf'", name="nncf")

    def failing(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(exporting, "trace_quantized", lambda *_: None)
    for name in ("export_float", "export_integer", "export_qdq", "export_onnxruntime"):
        monkeypatch.setattr(exporting, name, lambda _, path, *__, name=name: path.write_text(name))
    monkeypatch.setattr(exporting, "quantize_openvino", missing)
    monkeypatch.setattr(exporting, "quantize_onnxruntime", failing)
    (quantized_run.path / "deployment").mkdir()
    context = context_of(quantized_run, digits, ["onnxruntime", "openvino"], ALL)
    do(context, EXPORT)
    with pytest.raises(Impossible, match=r"nncf is not installed\. Run: pip install nncf\."):
        context.run.deployment.file("openvino", "dense_int8")
    with pytest.raises(Impossible, match="could not be made: first line second line"):
        context.run.deployment.file("onnxruntime", "dense_int8")
    assert context.run.deployment.file("openvino", "sparse").name == QDQ
    assert context.run.deployment.file("onnxruntime", "dense").name == "dense.onnx"


def test_without_training_images_only_the_file_that_needs_them_is_missing(quantized_run, digits):
    digits = replace(digits, splits={name: digits.splits[name] for name in ("val", "test")})
    exported = do(context_of(quantized_run, digits, ["onnxruntime", "openvino"], ["dense", "sparse"]), EXPORT)
    assert set(exported.outputs) == {f"deployment/{name}" for name in (MODEL, QDQ, "dense.onnx")}
    reason = "The data set digits has no training images to calibrate with."
    assert exported.facts["impossible"] == {"model.onnxruntime.onnx": reason}


def test_the_export_depends_on_the_files_that_are_wanted_and_on_the_baseline(run, digits, baseline):
    def mark(engines, variants) -> str:
        context = context_of(run, digits, engines, variants)
        return take_fingerprint(context, EXPORT, Fingerprint("before")).mark

    two = mark(["onnxruntime"], ["dense", "sparse"])
    assert mark(["openvino", "deepsparse"], ["sparse"]) == two  # the same files
    marks = {two, mark(["torch"], ["dense", "sparse"]), mark(["onnxruntime"], ALL), mark(["openvino"], ALL)}
    assert len(marks) == 4
    run.record("baseline", StageRecord("mark", facts={"checkpoint": str(baseline)}))
    trained = mark(["onnxruntime"], ["dense", "sparse"])
    baseline.write_bytes(b"another")
    assert len({two, trained, mark(["onnxruntime"], ["dense", "sparse"])}) == 3


def test_initial_weights_have_a_checkpoint_where_one_was_written_for_torch(run, digits, monkeypatch):
    monkeypatch.setattr(exporting, "export_float", lambda _, path, __: path.touch())
    (run.path / "deployment").mkdir()
    for engines, size in ((["onnxruntime"], None), (["torch"], True)):
        context = context_of(run, digits, engines, ["dense", "sparse"])
        dense = do(context, EXPORT).facts["dense"]
        file = run.path / "deployment" / "dense.pt"
        assert dense["checkpoint_mb"] == (size and file.stat().st_size / 1e6)
        assert not dense["trained"]
