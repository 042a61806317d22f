"""benchmarks/square.py, and that what it needs imports without the training's libraries."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import BENCHMARKS, load_script

from sparse_exp.errors import SparseExpError

SCRIPT = BENCHMARKS / "square.py"
ABSENT = (
    "torch",
    "torchvision",
    "filelock",
    "hydra",
    "omegaconf",
    "mlflow",
    "sparseml",
    "sparsezoo",
    "matplotlib",
    "PIL",
    "yaml",
)
BARE = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STATE = {"load_average": 0.1, "busy_cores": 0.0, "frequency_mhz": None, "steal": 0.0}
ROW = {
    "engine": "onnxruntime", "variant": "dense", "key": "b1", "scenario": "sync", "batch": 1, "streams": 1,
    "cores": 2, "imgsz": 320, "items_per_s": 10.0, "spread": 0.01, "version": "1.26", "cpu": "Z80",
    "isa": ["avx2"], "each": [10.0] * 5,
    "repeats": 5, "duration_s": 3.0, "before": STATE, "started": "2026-11-23T04:54:00", "network": "s",
    "ended": "2026-11-23T04:58:00",
}  # fmt: skip


@pytest.fixture(scope="module")
def square():
    return load_script("square")


@pytest.mark.parametrize(
    "text",
    [
        "model.onnx",
        "s=openvino:dense",
        "s=tvm:dense:a.onnx",
        "=openvino:dense:a.onnx",
        "s=openvino:pruned:a.onnx",
    ],
)
def test_a_cell_that_cannot_be_understood_says_what_it_should_be(square, text):
    with pytest.raises(argparse.ArgumentTypeError, match="NETWORK=ENGINE:VARIANT:FILE"):
        square._spec(text)


def test_a_cell_may_have_colons_and_equals_signs_in_its_file(square):
    assert square._spec("s-85=deepsparse:sparse:a=b:c.onnx") == (
        "s-85",
        "deepsparse",
        "sparse",
        Path("a=b:c.onnx"),
    )


def test_tables_of_several_files_are_one_and_need_none_of_the_trainings_libraries(tmp_path):
    sparse = {**ROW, "engine": "deepsparse", "variant": "sparse", "network": "s-85", "items_per_s": 35.0}
    sparse["each"] = [35.0] * 5
    none = {**ROW, "engine": "torch", "impossible": "It has none."}
    for name, rows in (("a", [ROW]), ("b", [sparse, none])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- square -->\nold\n<!-- /square -->\nafter\n")
    words = [SCRIPT, "--table", tmp_path / "a.json", tmp_path / "b.json", "--write", page]
    done = subprocess.run([sys.executable, "-c", BARE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| s-85 ")]
    assert [cell.strip() for cell in line.strip("|").split("|")][-2:] == ["3.50", "3.50"]
    assert "- s/torch/dense (b1): It has none." in text
    assert text.count("Z80 (avx2), 320 px") == 1  # both rows are of one measurement
    assert "onnxruntime 1.26, deepsparse 1.26; Z80" in text
    assert "old" not in text


def test_a_file_without_an_image_size_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.pt").touch()
    words = [SCRIPT, "--cell", f"s=torch:dense:{tmp_path / 'a.pt'}"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--imgsz" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cell=s=openvino:dense:none.onnx"], "none.onnx"),
        (["--cell=s=openvino:dense:text.onnx"], "text.onnx"),
        (["--cell=s=openvino:dense:text.onnx", "--cores", "4096"], "at most the"),
        (["--cell=s=openvino:dense:text.onnx", "--images", "text.onnx"], "npy"),
        (["--cell=s=openvino:dense:text.onnx", "--images", "floats.npy"], "uint8"),
        (["--table", "none.json"], "none.json"),
        (["--table", "text.onnx"], "text.onnx"),
        (["--table", "other.json"], "other.json"),
        (["--table", "rows.json", "--write", "none.md"], "none.md"),
        (["--table", "rows.json", "--write", "text.onnx"], "<!-- square -->"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(square, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("not a model")
    Path("other.json").write_text('{"a": 1}')
    Path("rows.json").write_text(json.dumps([ROW]))
    np.save("floats.npy", np.zeros((1, 3, 32, 32), np.float32))
    monkeypatch.setattr(sys, "argv", ["square.py", *words])
    with pytest.raises(SparseExpError, match=re.escape(told)) as error:
        square.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words", [["--batch", "0"], ["--repeats", "x"], ["--seconds", "-1"], ["--tune-s", "nan"]]
)
def test_nonsense_numbers_are_refused(square, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["square.py", "--cell=s=openvino:dense:a.onnx", *words])
    with pytest.raises(SparseExpError, match="at least") as error:
        square.main()
    assert "\n" not in str(error.value)
