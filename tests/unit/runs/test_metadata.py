"""What files say of themselves, and what is made of files that say nothing or nonsense."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.runs.metadata import describe, read_metadata, write_metadata
from sparse_exp.yolov5 import YOLOv5

NAMES = ("tree", 'a "quoted" näme')


@pytest.fixture
def file(tmp_path):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(helper.make_model(graph), str(tmp_path / "m.onnx"))
    return tmp_path / "m.onnx"


def test_what_is_written_is_read(file):
    write_metadata(file, {"by": "others", "imgsz": "1"})
    facts = {"run": "a, 2026-11-30/15-30-a", "sparsity": 0.75, "checkpoint_sha256": "c3b1", "licence": "MIT."}
    write_metadata(file, describe(NAMES, 320, {**facts, "recipe": "transfer_quant", "version": "0.2.0"}))
    assert read_metadata(file) == {
        "names": NAMES, "imgsz": 320, "stride": 32, "task": "detect", "conf": 0.25, "iou": 0.45,
        "recipe": "transfer_quant", "version": "0.2.0", **facts,
    }  # fmt: skip
    texts = {item.key: item.value for item in onnx.load(str(file)).metadata_props}
    assert texts["by"] == "others"
    assert json.loads(texts["names"]) == list(NAMES)


@pytest.mark.parametrize("names", ["{0: 'person'}", "[1, 2]", "null", "[]", "not json"])
def test_names_of_other_exporters_are_not_guessed(file, names):
    write_metadata(file, {"names": names, "imgsz": "[640, 640]", "stride": "32", "conf": "1.5", "iou": "x"})
    assert read_metadata(file) == {"imgsz": 640, "stride": 32}


def test_files_without_entries_and_no_files(file, tmp_path):
    assert read_metadata(file) == {}
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "text.xml").write_text("<net")
    assert [read_metadata(tmp_path / f"{name}") for name in ("text.onnx", "text.xml", "none.onnx")] == [
        {}
    ] * 3


def test_an_export_says_its_classes_and_reading_them_needs_no_torch(tmp_path):
    export_float(YOLOv5("n", 2), tmp_path / "m.onnx", FileForm(64, opset=13, names=NAMES))
    code = (
        "import sys; from pathlib import Path; from sparse_exp.runs.metadata import read_metadata\n"
        "print(ascii(read_metadata(Path(sys.argv[1]))['names']), 'torch' in sys.modules, sep=';')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{NAMES!a};False"


def test_the_size_of_rectangles(file):
    write_metadata(file, describe(NAMES, (384, 640), {}))
    assert read_metadata(file)["imgsz"] == (384, 640)
    texts = {item.key: item.value for item in onnx.load(str(file)).metadata_props}
    assert texts["imgsz"] == "[384, 640]"  # as Ultralytics writes it
