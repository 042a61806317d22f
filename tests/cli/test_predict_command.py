"""``python -m sparse_exp.predict``: what it leaves, and what it says when something is wrong."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from sparse_exp.data.loader import make_loader
from sparse_exp.errors import ConfigError, EngineError, SparseExpError
from sparse_exp.predict.__main__ import main
from sparse_exp.predict.detector import Detector
from sparse_exp.predict.models import find_model
from sparse_exp.predict.outputs import Results, alone
from sparse_exp.training.evaluation import Validation
from sparse_exp.zoo.samples import predict_with

IMGSZ, CLASSES = 64, 10


@pytest.fixture
def predict(monkeypatch, tmp_path, deployment):
    """Runs the command in this process, in a directory of its own; ``MODEL`` stands for the tiny model."""
    monkeypatch.chdir(tmp_path)

    def run_it(*words: str) -> int:
        named = [str(deployment) if word == "MODEL" else word for word in words]
        engine = [] if "--engine" in words else ["--engine", "onnxruntime"]
        monkeypatch.setattr(sys, "argv", ["predict", *named, *engine])
        return main()

    return run_it


@pytest.fixture
def photos_folder(tmp_path, digits) -> Path:
    """Five images of digits as JPEG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, sample in enumerate(digits.splits["val"][:5]):
        Image.open(sample.image).convert("RGB").resize((128, 96)).save(folder / f"{number}.jpg")
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


def test_a_folder(predict, photos_folder, capsys):
    assert predict("MODEL", "photos", "--conf", "0.01", "--batch", "2") == 0
    out = Path("outputs/predict/1")
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{number}.jpg" for number in range(5)), "coco.json", "predictions.csv", "predictions.json",
    ]  # fmt: skip
    found = record(out)
    assert [Path(image["file"]).name for image in found["images"]] == [f"{n}.jpg" for n in range(5)]
    detections = sum(len(image["detections"]) for image in found["images"])
    assert detections > 0
    assert len(list(csv.DictReader((out / "predictions.csv").open()))) == detections
    said = capsys.readouterr().out
    assert "5 images in" in said
    assert f"{detections} detections" in said
    assert "Written: outputs/predict/1" in said
    assert Image.open(out / "3.jpg").size == (384, 288)  # three times 128 x 96, or nothing could be read


def test_coco_results_are_those_of_the_evaluation(predict, deployment, digits):
    """faster-coco-eval on the files alone, against torchmetrics on the detections that `Validation` had.

    These are cut off at the image's edge here, as all that is shown to people.
    """
    words = ["--data", str(digits.root / "data.yaml"), "--no-pictures", "--multi-label", "--out", "out"]
    assert predict("MODEL", "val", "--conf", "0.001", "--iou", "0.6", *words) == 0
    map50, map50_95 = evaluated_detections(deployment, digits)
    assert map50 > map50_95 > 0
    assert record(Path("out"))["images"][0]["picture"] is None
    truth = COCO("out/coco_truth.json")
    measured = COCOeval_faster(truth, truth.loadRes("out/coco.json"), "bbox")
    measured.params.maxDets = [1, 10, 300]
    measured.evaluate()
    measured.accumulate()
    precision = np.ma.masked_less(measured.eval["precision"][:, :, :, 0, -1], 0)
    assert precision.mean() == pytest.approx(map50_95, abs=1e-5)
    assert precision[0].mean() == pytest.approx(map50, abs=1e-5)


def evaluated_detections(deployment, digits) -> tuple[float, float]:
    """mAP50 and mAP50-95 of what the evaluation detects, cut off at the edge."""
    loader = make_loader(digits.splits["val"], CLASSES, imgsz=IMGSZ, batch_size=6, train=False, workers=0)
    path = find_model(str(deployment), engine="onnxruntime").path
    result = Validation(loader, CLASSES).evaluate(
        lambda images: torch.from_numpy(predict_with("onnxruntime", path, images.contiguous().numpy())),
        keep_detections=True,
    )
    metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, 300], backend="faster_coco_eval")
    for found, sample in zip(result.detections, digits.splits["val"], strict=True):
        labels = torch.from_numpy(sample.labels_of(CLASSES).copy())
        corners = box_convert(labels[:, 1:] * IMGSZ, "cxcywh", "xyxy")
        predicted = {
            "boxes": found[:, :4].clamp(0, IMGSZ),
            "scores": found[:, 4],
            "labels": found[:, 5].long(),
        }
        metric.update([predicted], [{"boxes": corners, "labels": labels[:, 0].long()}])
    values = metric.compute()
    return float(values["map_50"]), float(values["map"])


def test_what_cannot_be_read_is_told_and_skipped(predict, photos_folder, tmp_path, capsys):
    (photos_folder / "2.jpg").write_bytes(b"no image")
    (photos_folder / "3.jpg").write_bytes((photos_folder / "3.jpg").read_bytes()[:400])
    with pytest.raises(SparseExpError, match="2 of 5 images cannot be used") as caught:
        predict("MODEL", "photos", "--out", "out")
    assert "\n" not in str(caught.value)
    assert "Written: out" in capsys.readouterr().out
    found = record(tmp_path / "out")
    assert [image["id"] for image in found["images"]] == [1, 2, 5]
    assert [Path(one["file"]).name for one in found["skipped"]] == ["2.jpg", "3.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == ["0.jpg", "1.jpg", "4.jpg"]


@pytest.fixture
def clip(photos_folder, tmp_path) -> Path:
    """A video of seven frames."""
    from sparse_exp.predict.video import write_video

    with write_video(tmp_path / "clip.mp4", 10.0) as writer:
        for number in (0, 1, 2, 3, 4, 3, 2):
            writer.add(Image.open(photos_folder / f"{number}.jpg"))
    return tmp_path / "clip.mp4"


def test_a_video(predict, clip, tmp_path):
    from sparse_exp.predict.video import Video

    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(SparseExpError, match=r"1 of 8 .*broken.mp4"):
        predict("MODEL", "broken.mp4", "clip.mp4", "--conf", "0.01", "--out", "out", "--streams", "2")
    frames = record(tmp_path / "out")["images"]
    assert [frame["frame"] for frame in frames] == list(range(7))
    assert {frame["picture"] for frame in frames} == {"clip.mp4"}
    with Video(tmp_path / "out" / "clip.mp4") as video:
        assert len(list(video.frames())) == 7


def test_of_an_interrupted_video_the_predictions_stay(predict, clip, tmp_path, monkeypatch):
    add = Results.add

    def interrupted(self, number, *others) -> None:
        if number == 4:
            raise KeyboardInterrupt
        add(self, number, *others)

    monkeypatch.setattr(Results, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict("MODEL", "clip.mp4", "--out", "out")
    assert not list((tmp_path / "out").glob("*.mp4"))
    assert not list((tmp_path / "out").glob(".*"))
    found = record(tmp_path / "out")
    assert (found["complete"], [frame["picture"] for frame in found["images"]]) == (False, [None] * 3)


def test_two_at_once_do_not_write_into_one_directory(predict, photos_folder, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with alone(Path("out")):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with pytest.raises(ConfigError, match="are being written into out by process"):
        predict("MODEL", "photos", "--out", "out")
    leave.set()
    thread.join()
    assert not (tmp_path / "out").exists()
    assert predict("MODEL", "photos", "--out", "out", "--no-pictures", "--formats", "jsonl") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize("words", [("~nosuchuser/model", "photos"), ("MODEL", "~nosuchuser/x.jpg")])
def test_the_home_of_nobody_is_one_line(predict, photos_folder, words):
    with pytest.raises(SparseExpError, match="~nosuchuser"):
        predict(*words)


def test_names_of_classes_that_differ_are_told(predict, photos_folder, tmp_path, deployment, caplog):
    for folder, names in (("named", "0123456789"), ("other", "0123456798")):
        shutil.copytree(deployment, tmp_path / folder)
        (tmp_path / folder / "class_names.json").write_text(json.dumps(list(names)), encoding="utf-8")
    (tmp_path / "data.yaml").write_text(
        f"{{train: photos, val: photos, names: {json.dumps(list('0123456789'))}}}", encoding="utf-8"
    )
    words = ["photos/0.jpg", "--data", "data.yaml", "--no-pictures"]
    assert predict("named", *words) == 0
    assert "named otherwise" not in caplog.text
    assert predict("other", *words) == 0
    assert "named otherwise" in caplog.text


def test_a_full_disk_is_one_line_and_leaves_whole_files(predict, photos_folder, tmp_path, monkeypatch):
    written = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if path.name.startswith(".3."):
            written(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(SparseExpError, match="No space left on device") as caught:
        predict("MODEL", "photos", "--out", "out")
    assert "\n" not in str(caught.value)
    found = record(tmp_path / "out")
    assert (found["complete"], [image["id"] for image in found["images"]]) == (False, [1, 2, 3])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == ["0.jpg", "1.jpg", "2.jpg"]
    assert not list((tmp_path / "out").glob(".*"))


def test_of_an_engine_that_fails_what_was_found_stays(predict, photos_folder, tmp_path, monkeypatch, capsys):
    for number in range(5, 30):
        (photos_folder / f"{number}.jpg").symlink_to(photos_folder / "0.jpg")
    infer, asked = Detector.infer, []

    def fail(self, squares):
        asked.append(len(squares))
        if len(asked) == 25:
            raise EngineError("No more memory.")
        return infer(self, squares)

    monkeypatch.setattr(Detector, "infer", fail)
    with pytest.raises(EngineError, match="No more memory"):
        predict("MODEL", "photos", "--out", "out", "--streams", "1", "--cores", "1")
    assert "Incomplete: out holds" in capsys.readouterr().out
    found = record(tmp_path / "out")
    assert found["complete"] is False
    ids = [image["id"] for image in found["images"]]
    assert ids == list(range(1, len(ids) + 1))
    assert 10 < len(ids) < 24  # without those that were on their way
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(ids)


def test_an_earlier_prediction_stays_where_the_model_cannot_be_loaded(predict, photos_folder, monkeypatch):
    assert predict("MODEL", "photos", "--out", "out", "--no-pictures") == 0
    before = record(Path("out"))
    with pytest.raises(SparseExpError, match="exists"):
        predict("MODEL", "photos", "--out", "out")

    def fail(self, squares):
        raise EngineError("It cannot run here.")

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "infer", fail)
        with pytest.raises(EngineError, match="cannot run"):
            predict("MODEL", "photos", "--out", "out", "--overwrite")
    assert record(Path("out")) == before
    assert predict("MODEL", "photos/0.jpg", "--out", "out", "--overwrite") == 0
    assert len(record(Path("out"))["images"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "photos"], "Expected MODEL"),
        (["notes.txt", "photos"], "ONNX file"),
        (["MODEL", "nowhere"], "Expected SOURCE"),
        (["MODEL", "notes.txt"], "must end in one of"),
        (["MODEL", "empty"], "with images or videos"),
        (["MODEL", "*.gif"], "Correct the pattern"),
        (["MODEL", "photos", "--engine", "tensorrt"], "one of deepsparse, onnxruntime"),
        (["MODEL", "photos", "--out", "photos"], "photos exists"),
        (["MODEL", "photos", "--out", "photos", "--overwrite"], "is no prediction"),
        (["MODEL", "photos", "--imgsz", "640"], "64, which"),
        (["MODEL", "photos", "--formats", "xml"], "json, jsonl, csv, coco"),
        (["MODEL", "photos", "--formats", "none", "--no-pictures"], "Nothing would be written"),
        (["MODEL", "photos", "--data", "two.yaml"], "the 10 of the model"),
        (["MODEL", "photos", "--data", "nowhere.yaml"], "the data yaml"),
    ],
)
def test_bad_input_is_one_line(predict, photos_folder, tmp_path, words, said, monkeypatch, deployment):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "two.yaml").write_text("{train: photos, val: photos, names: [a, b]}", encoding="utf-8")
    if "two.yaml" in words:  # that the model knows its classes
        named = tmp_path / "named"
        shutil.copytree(deployment, named)
        (named / "class_names.json").write_text(json.dumps(list("0123456789")), encoding="utf-8")
        words = [str(named), *words[1:]]
    with pytest.raises(SparseExpError, match=said) as caught:
        predict(*words)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("outputs/predict/*"))


@pytest.fixture
def command(deployment, tmp_path):
    """Starts the command as a process, which says on standard error what it imported."""
    code = (
        "import sys; from sparse_exp.predict.__main__ import main, run_command\n"
        "try: run_command(main)\n"
        "finally: print([m for m in ('torch', 'mlflow', 'cv2') if m in sys.modules], file=sys.stderr)"
    )

    def start(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("words", [["--help"], ["nowhere", "photos"]])
def test_nothing_heavy_before_it_is_needed(command, words):
    process = command(*words)
    said = process.communicate(timeout=60)[1].splitlines()
    assert said[0] == "[]"
    assert process.returncode == (0 if "--help" in words else 1)
    assert len(said) == (1 if "--help" in words else 2)


def test_of_two_processes_at_once_one_writes(command, deployment, photos_folder, tmp_path):
    words = [str(deployment), "photos", "--engine", "onnxruntime", "--out", "out", "--no-pictures"]
    both = [command(*words) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    refused = said[both[0].returncode == 0]
    assert "are being written into out by process" in refused or "out exists." in refused
    assert len(record(tmp_path / "out")["images"]) == 5
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_complete(command, deployment, tmp_path, digits):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(5000):
        (folder / f"{number:05}.png").symlink_to(digits.splits["val"][0].image)
    process = command(str(deployment), "many", "--engine", "onnxruntime", "--out", "out")
    out, deadline = tmp_path / "out", time.monotonic() + 60
    while not list(out.glob("*.jpg")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted: out holds what was complete." in said
    found = record(out)
    assert found["complete"] is False
    pictures = {path.name for path in out.glob("*.jpg")}
    assert {image["picture"] for image in found["images"]} <= pictures
    assert 0 < len(pictures) <= len(found["images"]) + 1  # one may have been written just then
    assert not list(out.glob(".*"))
    for name in pictures:
        Image.open(out / name).load()
