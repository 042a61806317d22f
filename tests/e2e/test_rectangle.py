"""Images that are no squares, over all stages, the zoo and the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from test_base import run
from test_slim import command

import sparse_exp
from sparse_exp.data.digits import materialize
from sparse_exp.engines.signature import read_signature
from sparse_exp.runs.metadata import read_metadata
from sparse_exp.sources.local import published
from sparse_exp.yolov5 import read_checkpoint

SIZE = (96, 128)  # which 128 x 72 px fit with the least grey


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    materialize(folder / "digits", imgsz=(72, 128), train=16, val=6, test=2)
    return folder


@pytest.mark.slow
def test_a_rectangle_from_training_to_prediction(place):
    words = [
        "dataset.path=digits/data.yaml", "dataset.name=digits", "dataset.imgsz=[96,128]",
        "recipe=transfer_quant", "recipe.variables.num_epochs=2", "model.weights=scratch", "publish=auto",
        "trainer.augment.mosaic=1.0", "hardware.engines=[onnxruntime,openvino,torch]",
        "hardware.variants=[dense,sparse]",
    ]  # fmt: skip
    stages = run(place, "wide", *words)
    folder = place / "wide"
    assert yaml.safe_load((folder / "config.yaml").read_text())["dataset"]["imgsz"] == list(SIZE)
    assert stages["export"]["facts"]["imgsz"] == list(SIZE)
    assert read_checkpoint(folder / "weights/best_pruned_quant.pt").imgsz == SIZE
    for file in sorted((folder / "deployment").glob("*.onnx")):
        assert (read_signature(file).size, read_metadata(file)["imgsz"]) == (SIZE, SIZE), file
    rows = json.loads((folder / "benchmark.json").read_text())
    assert {tuple(row["imgsz"]) for row in rows} == {SIZE}
    assert "digits" in (folder / "report.md").read_text()
    assert "[96,128] px" in (folder / "report.md").read_text()

    command(place, "sparse_exp", "resume=wide")
    kept = json.loads((folder / "manifest.json").read_text())["stages"]
    assert {name: one["ended"] for name, one in kept.items()} == {
        name: one["ended"] for name, one in stages.items()
    }

    (model,) = published(place / "outputs/zoo")
    assert model.metadata["imgsz"] == list(SIZE)
    assert "[96,128] px" in (model.directory / "model.md").read_text()
    picture = next((place / "digits/images/val").iterdir())
    options = ["--imgsz", "96,128", "--engine", "onnxruntime", "--out", "found"]
    command(place, "sparse_exp.predict", "wide", str(picture), *options)
    assert json.loads((place / "found/predictions.json").read_text())["model"]["imgsz"] == list(SIZE)

    for engine in ("onnxruntime", "openvino", "torch"):
        with sparse_exp.load(folder, engine=engine, conf=0.001, cores=1) as detector:
            assert detector.model.imgsz == SIZE
            boxes = detector(Image.open(picture)).boxes
        assert len(boxes) > 3, engine
        assert (boxes >= 0).all()
        assert (boxes <= np.array([128, 72, 128, 72])).all()
