"""Detections of ``predict`` against those of the evaluation, and what is meant by a model's name."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sparse_exp.config.places import find_places
from sparse_exp.data.loader import make_loader
from sparse_exp.engines import create_engine
from sparse_exp.errors import ConfigError, EngineError, SourceUnavailable
from sparse_exp.files import write_json
from sparse_exp.predict.detector import Detector, find_model
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.training.evaluation import Validation

IMGSZ, CLASSES = 64, 10
EVALUATED = {"conf": 0.001, "iou": 0.6, "max_det": 300, "multi_label": True}


@pytest.fixture(scope="module")
def model(deployment):
    return find_model(str(deployment), engine="onnxruntime")


@pytest.fixture(scope="module")
def detector(model):
    with closing(Detector(model, batch_size=4, cores=1, **EVALUATED)) as running:
        yield running


def test_detections_are_those_of_the_evaluation(detector, model, digits):
    """The same boxes, mapped to the images, and so the same mAP."""
    samples = digits.splits["val"]
    loader = make_loader(samples, CLASSES, imgsz=IMGSZ, batch_size=4, train=False, workers=0)
    with closing(create_engine("onnxruntime")) as engine:
        engine.load(model.path, batch_size=4, cores=1)
        evaluated = Validation(loader, CLASSES).evaluate(
            lambda images: torch.from_numpy(engine.run(images.contiguous().numpy())[0]), keep_detections=True
        )
    prepared = [detector.prepare(sample.image) for sample in samples]
    found = [detector.detect([square], [box])[0] for square, box in prepared]
    assert sum(map(len, found)) > 100
    for (_, box), ours, theirs in zip(prepared, found, evaluated.detections, strict=True):
        wanted = theirs.numpy().copy()
        wanted[:, :4] = box.boxes_back(wanted[:, :4])
        np.testing.assert_allclose(ours, wanted, atol=1e-3)


def test_boxes_are_in_pixels_of_the_image(detector):
    """Of an image twice as high as the square, with grey beside it in the square."""
    tall = np.random.default_rng(0).integers(0, 256, (2 * IMGSZ, IMGSZ, 3), np.uint8)
    square, box = detector.prepare(tall)
    (found,) = detector.detect([square], [box])
    assert found[:, [0, 2]].max() <= 64
    assert found[:, [1, 3]].max() <= 128
    assert found[:, [1, 3]].max() > 64  # or they would still be those of the square


def test_any_number_of_images_up_to_the_batch(detector, digits):
    prepared = [detector.prepare(sample.image) for sample in digits.splits["val"][:4]]
    one_by_one = [detector.detect([square], [box])[0] for square, box in prepared]
    for count in (1, 3, 4):
        together = detector.detect(*map(list, zip(*prepared[:count], strict=True)))
        for alone, found in zip(one_by_one, together, strict=False):
            np.testing.assert_allclose(found, alone, atol=1e-3)


def test_one_label_a_box_unless_several_are_asked_for(detector, model, digits):
    square, box = detector.prepare(digits.splits["val"][0].image)
    several = detector.detect([square], [box])[0]
    with closing(Detector(model, cores=1, **{**EVALUATED, "multi_label": False})) as single:
        one = single.detect([square], [box])[0]

    def distinct(rows: np.ndarray) -> tuple[int, int]:
        """Boxes that are not cut off at the edge, and how many of them are distinct."""
        inside = rows[(rows[:, :4] > 0).all(1) & (rows[:, :4] < IMGSZ).all(1), :4]
        return len(inside), len(np.unique(inside, axis=0))

    assert distinct(several)[0] > distinct(several)[1]
    assert distinct(one)[0] == distinct(one)[1] > 10


def test_class_names_must_be_as_many_as_there_are(model):
    with pytest.raises(EngineError, match=r"\(1, A, 7\)"):
        Detector(replace(model, names=("cat", "dog")), cores=1)
    with closing(Detector(replace(model, names=()), cores=1)) as nameless:
        assert nameless.names == tuple(f"class {number}" for number in range(CLASSES))


@pytest.fixture
def run(deployment, tmp_path) -> Path:
    """A run's directory: quantized, for OpenVINO first."""
    made = Run.create(tmp_path / "outputs" / "runs" / "day" / "12-00-00-digits", overwrite=False)
    shutil.copytree(deployment, made.path / "deployment")
    names = [f"digit {number}" for number in range(CLASSES)]
    made.record("fetch", StageRecord("1", facts={"names": names}))
    made.record("train", StageRecord("2", facts={"checkpoint": "weights/best.pt"}))
    made.update(status="FINISHED", tracker_run_id="a" * 32)
    (made.path / "config.yaml").write_text("hardware: {engines: [openvino, deepsparse]}\n", encoding="utf-8")
    return made.path


def test_a_run_by_path_name_and_id(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [find_model(name) for name in (str(run), "12-00-00-digits", "day/12-00-00-digits", "a" * 32)]
    assert {one.path.resolve() for one in found} == {run / "deployment" / "model.qdq.onnx"}
    assert {(one.engine, one.imgsz) for one in found} == {("openvino", IMGSZ)}
    assert found[0].names[3] == "digit 3"


@pytest.mark.parametrize(
    ("absent", "of_run", "of_file"),
    [
        ((), "openvino", "deepsparse"),
        (("openvino",), "deepsparse", "deepsparse"),
        (("deepsparse",), "openvino", "onnxruntime"),
        (("openvino", "deepsparse"), "onnxruntime", "onnxruntime"),
        (("deepsparse", "onnxruntime"), "openvino", "openvino"),
    ],
)
def test_without_a_choice_the_first_engine_that_can_run_here(run, monkeypatch, absent, of_run, of_file):
    monkeypatch.setattr(
        "sparse_exp.predict.models.unusable", lambda engine, _: "not installed" if engine in absent else None
    )
    assert find_model(str(run)).engine == of_run
    assert find_model(str(run / "deployment" / "model.onnx")).engine == of_file


def test_the_file_suits_the_engine(run):
    assert find_model(str(run), engine="deepsparse").path.name == "model.onnx"
    assert find_model(str(run), engine="onnxruntime").path.name == "model.onnxruntime.onnx"


def test_names_in_the_file_win(run):
    path = run / "deployment" / "model.qdq.onnx"
    network = onnx.load(str(path))
    onnx.helper.set_model_props(network, {"names": json.dumps([f"nr {n}" for n in range(CLASSES)])})
    onnx.save(network, str(path))
    assert find_model(str(path), engine="onnxruntime").names[1] == "nr 1"


def test_a_published_model_by_its_stub(deployment, tmp_path):
    place = tmp_path / "cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned75_quant-none"
    shutil.copytree(deployment, place / "deployment")
    (place / "training").mkdir()
    write_json(place / "deployment" / "class_names.json", list("abcdefghij"))
    zoo = find_places(typed={"paths.zoo": str(tmp_path)})
    found = find_model("zoo:yolov5-n-digits-pruned75_quant", engine="deepsparse", places=zoo)
    assert (found.path, found.names) == (place / "deployment" / "model.onnx", tuple("abcdefghij"))
    with pytest.raises(SourceUnavailable, match="not in the local zoo"):
        find_model("zoo:yolov5-n-digits-pruned99", places=zoo)


def test_what_is_no_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "notes.onnx"
    text.write_text("not a network", encoding="utf-8")
    shutil.copytree(run, tmp_path / "outputs" / "runs" / "later" / "12-00-00-digits")
    for name, engine, kind, said in (
        ("nowhere", None, ConfigError, "Expected MODEL to be"),
        ("x" * 300, None, ConfigError, "File name too long"),
        (str(tmp_path), None, ConfigError, "holds no model.onnx"),
        ("12-00-00-digits", None, ConfigError, "one run"),
        (str(text), None, EngineError, "ONNX file"),
        (str(text), "tensorrt", EngineError, "one of deepsparse"),
        (str(text), "torch", EngineError, "torch runs checkpoints"),
        (str(run), "torch", ConfigError, "no checkpoint"),
    ):
        with pytest.raises(kind, match=said) as caught:
            find_model(name, engine=engine)
        assert "\n" not in str(caught.value)


def test_another_kind_of_network_is_refused(tmp_path):
    shape = ["n", 3, 32, 32]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", onnx.TensorProto.FLOAT, shape)], [value("y", onnx.TensorProto.FLOAT, shape)],
    )  # fmt: skip
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(EngineError, match="uint8"):
        find_model(str(path), engine="onnxruntime")
