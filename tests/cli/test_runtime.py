"""``predict``, ``serve`` and ``load`` where nothing is installed that only training needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from served import FORM, form, png
from standin import write_detector

ABSENT = (
    "torch", "torchvision", "torchmetrics", "mlflow", "hydra", "matplotlib", "sklearn",
    "lightning_fabric", "faster_coco_eval", "sparseml", "sparsezoo", "deepsparse", "openvino", "nncf", "cv2",
)  # fmt: skip
ENGINE = ("--engine", "onnxruntime")
COLOUR = (20, 10, 12)
FOUND = [("car", 0.9, [14.0, 2.0, 26.0, 18.0]), ("tree", 0.5, [12.0, 12.0, 20.0, 20.0])]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, an image, and what hides packages from every interpreter that starts with it on its path."""
    folder = tmp_path_factory.mktemp("runtime")
    write_detector(folder / "model.onnx")
    Image.new("RGB", (32, 32), COLOUR).save(folder / "a.png")
    (folder / "best.pt").touch()
    (folder / "clip.mp4").touch()
    (folder / "hidden").mkdir()
    hide = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    (folder / "hidden" / "sitecustomize.py").write_text(hide, encoding="utf-8")
    return folder


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(place / "hidden"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(place: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(place, *words)
    said = process.communicate(timeout=120)
    return process.returncode, *said


def rows(detections: list[dict]) -> list[tuple[str, float, list[float]]]:
    corners = ("x1", "y1", "x2", "y2")
    return [(one["class"], round(one["confidence"], 4), [one[key] for key in corners]) for one in detections]


def test_the_packages_are_hidden_from_children_too(place):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])"
    assert "import of torch halted" in run(place, "-c", code)[2]


def test_predict(place):
    code, said, error = run(place, "-m", "sparse_exp.predict", "model.onnx", "a.png", *ENGINE, "--out", "out")
    assert (code, error) == (0, "")
    assert "2 detections (1 car, 1 tree)" in said
    record = json.loads((place / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert rows(record["images"][0]["detections"]) == FOUND
    assert record["model"]["engine"] == "onnxruntime"
    assert Image.open(place / "out" / "a.jpg").size == (320, 320)


def test_serve(place):
    process = start(place, "-m", "sparse_exp.serve", "model.onnx", *ENGINE, "--port", "0", "--cores", "1")
    try:
        said = process.stdout.readline()
        assert said.startswith("Serving model.onnx with onnxruntime"), process.communicate(timeout=10)[1]
        address = said.rsplit(" ", 1)[1].strip()
        request = urllib.request.Request(f"{address}/predict", form(png(COLOUR, (32, 32))), FORM)
        with urllib.request.urlopen(request, timeout=60) as response:
            (image,) = json.load(response)["images"]
        assert rows(image["detections"]) == FOUND
    finally:
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (0, "")


def test_load(place):
    code = (
        "import json\n"
        "from sparse_exp import load\n"
        "with load('model.onnx', engine='onnxruntime', cores=1) as detector: found = detector('a.png')\n"
        "print(json.dumps([[one.class_name, round(one.score, 4), one.box] for one in found]))"
    )
    returned, said, error = run(place, "-c", code)
    assert (returned, error) == (0, "")
    assert [tuple(one) for one in json.loads(said)] == FOUND


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["best.pt", "a.png"], "best.pt needs torch, which is not installed. Run: pip install 'torch"),
        (["model.onnx", "clip.mp4", *ENGINE], r"Run: pip install 'sparse-exp[video]'"),
        (["model.onnx", "a.png", "--engine", "openvino"], "Run: pip install 'openvino"),
    ],
)
def test_what_needs_more_says_what_in_one_line(place, words, said):
    code, _, error = run(place, "-m", "sparse_exp.predict", *words)
    assert code == 1
    assert said in error
    assert len(error.splitlines()) == 1
