"""Directories and files of predictions."""

from __future__ import annotations

import csv
import json
import os
import shutil
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_exp.data.detection import list_dataset
from sparse_exp.errors import ConfigError, DataError
from sparse_exp.predict.outputs import (
    FORMATS,
    PictureNames,
    Results,
    alone,
    check_formats,
    new_directory,
    require_replaceable,
)
from sparse_exp.predict.pipeline import ImageResult, Input


def made(folder: Path) -> Results:
    """Results without an image."""
    model = SimpleNamespace(origin="m", path=Path("m.onnx"), engine="onnxruntime", imgsz=64)
    return Results(SimpleNamespace(model=model, names=("cat", "dog"), version="1"), {"conf": 0.25}, folder)


@pytest.fixture
def results(tmp_path) -> Results:
    results = made(tmp_path)
    rows = np.array([[1, 2, 11, 22, 0.75, 1], [0, 0, 5, 5, 0.5, 0]], np.float32)
    results.add(1, ImageResult(Input(Path("a, b.jpg")), (40, 30), rows), "a, b.jpg")
    results.add(3, ImageResult(Input(Path("v.mp4"), 5), (64, 48), rows[:1]), "v.mp4", fps=10.0)
    results.add(4, ImageResult(Input(Path("nothing.jpg")), (9, 9), rows[:0]), None)
    return results


def test_json(results, tmp_path):
    results.write(("json",), None)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert (record["format"], record["complete"]) == ("sparse_exp.predict/1", True)
    image, frame, empty = record["images"]
    assert image["detections"][0] == {
        "class_id": 1, "class": "dog", "confidence": 0.75, "x1": 1.0, "y1": 2.0, "x2": 11.0, "y2": 22.0,
    }  # fmt: skip
    assert (image["id"], image["width"], image["height"], image["picture"]) == (1, 40, 30, "a, b.jpg")
    assert (frame["frame"], frame["seconds"]) == (5, 0.5)
    assert empty["detections"] == []


def test_csv(results, tmp_path):
    results.write(("csv",), None)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [(row["file"], row["frame"], row["class"], row["x2"]) for row in rows] == [
        ("a, b.jpg", "", "dog", "11.0"), ("a, b.jpg", "", "cat", "5.0"), ("v.mp4", "5", "dog", "11.0"),
    ]  # fmt: skip


def test_coco(results, tmp_path):
    results.write(("coco",), None)
    first = json.loads((tmp_path / "coco.json").read_text())[0]
    assert first == {"image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.75}


def test_predictions_are_there_as_they_come(results, tmp_path):
    first, *lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert json.loads(first)["format"] == "sparse_exp.predict/1"
    assert [json.loads(line)["id"] for line in lines] == [1, 3, 4]
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "predictions.jsonl").rename(out / "predictions.jsonl")  # as a killed process leaves it
    assert new_directory(out, Path("outputs"), overwrite=True, sources=[]) == out


def test_json_lines_stay_where_they_are_asked_for(results, tmp_path):
    results.skipped.append({"file": "x", "reason": "y"})
    results.write(("json", "jsonl"), None)
    _, *lines, last = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert lines == record.pop("images")
    assert last == {"end": record}


def test_an_annotated_video_that_was_not_finished_is_not_named(results, tmp_path):
    results.unfinished.add("v.mp4")
    results.write(("json",), None)
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert [image["picture"] for image in record["images"]] == ["a, b.jpg", None, None]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    results, rows = made(tmp_path), np.ones((20, 6), np.float32)
    tracemalloc.start()
    for number in range(2000):
        results.add(number, ImageResult(Input(Path("v.mp4"), number), (64, 48), rows), "v.mp4", fps=10.0)
    results.write(FORMATS, None)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert len(json.loads((tmp_path / "predictions.json").read_text())["images"]) == 2000
    assert len(json.loads((tmp_path / "coco.json").read_text())) == results.classes.total() == 40_000


def test_one_process_at_a_time_writes_into_a_directory(tmp_path):
    out = tmp_path / "deep" / "out"
    told: list[str] = []

    def other() -> None:
        try:
            with alone(out):
                told.append("in")
        except ConfigError as error:
            told.append(str(error))

    with alone(out):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(20)
        assert new_directory(out, Path("outputs"), overwrite=False, sources=[]) == out
    assert not out.exists()
    assert "are being written" in told[0]
    other()
    assert told[1:] == ["in"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make"), alone(tmp_path / "file" / "out"):
        pass


def test_what_a_killed_prediction_left_half_written_is_in_nobodys_way(tmp_path):
    (tmp_path / ".picture.4711.part.jpg").touch()
    require_replaceable(tmp_path, overwrite=False, sources=[])
    assert new_directory(tmp_path, Path("outputs"), overwrite=False, sources=[]) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [new_directory(None, Path("outputs"), overwrite=False, sources=[]) for _ in range(2)]
    (tmp_path / "outputs/predict/7").mkdir()
    made.append(new_directory(None, Path("outputs"), overwrite=False, sources=[]))
    elsewhere = new_directory(None, tmp_path / "mine", overwrite=False, sources=[])
    assert elsewhere == tmp_path / "mine/predict/1"
    assert [path.as_posix() for path in made] == [f"outputs/predict/{number}" for number in (1, 2, 8)]


def test_nothing_is_replaced_without_a_word(tmp_path):
    out = tmp_path / "out"
    assert new_directory(out, Path("outputs"), overwrite=False, sources=[]) == out
    (out / "photo.jpg").touch()
    for overwrite, said in ((False, "--overwrite"), (True, "is no prediction")):
        with pytest.raises(ConfigError, match=said):
            new_directory(out, Path("outputs"), overwrite=overwrite, sources=[])
    (out / "predictions.json").write_text('[{"image_id": 1}]', encoding="utf-8")
    with pytest.raises(ConfigError, match="of ours"):  # others give files that name, too
        new_directory(out, Path("outputs"), overwrite=True, sources=[])
    (out / "predictions.json").write_text(
        '{"format": "sparse_exp.predict/1", "images": []}', encoding="utf-8"
    )
    (out / "below").mkdir()
    with pytest.raises(ConfigError, match="lies in"):
        new_directory(out, Path("outputs"), overwrite=True, sources=[out / "photo.jpg"])
    assert new_directory(out, Path("outputs"), overwrite=True, sources=[]) == out
    assert not any(out.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make"):
        new_directory(tmp_path / "file" / "out", Path("outputs"), overwrite=False, sources=[])


def test_a_link_to_a_directory_stays_one(tmp_path):
    link, real = tmp_path / "link", tmp_path / "real"
    real.mkdir()
    link.symlink_to(real)
    (real / "other").symlink_to(tmp_path)
    made(real).write(("json",), None)
    assert new_directory(link, Path("outputs"), overwrite=True, sources=[]) == link
    assert link.is_symlink()
    assert not any(real.iterdir())
    assert tmp_path.exists()


def test_names_of_files_that_are_no_utf_8(results, tmp_path):
    odd = Path(os.fsdecode(b"\xfcber.jpg"))
    results.add(5, ImageResult(Input(odd), (9, 9), np.ones((1, 6), np.float32)), "ber.jpg")
    results.write(("json", "csv"), None)
    assert json.loads((tmp_path / "predictions.json").read_text())["images"][-1]["file"] == str(odd)
    assert "\\udcfcber.jpg" in (tmp_path / "predictions.csv").read_text(encoding="utf-8")


def test_what_was_found_is_written_even_where_labels_are_damaged(results, digits, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(digits.root, folder)
    data = list_dataset(folder / "data.yaml")
    sample = data.splits["val"][0]
    results.add(5, ImageResult(Input(sample.image), (9, 9), np.ones((1, 6), np.float32)), None)
    for label in (folder / "labels").rglob(f"{sample.image.stem}.txt"):
        label.write_text("no label", encoding="utf-8")
    with pytest.raises(DataError, match="label"):
        results.write(FORMATS, data)
    assert {"predictions.json", "predictions.csv", "coco.json"} <= {path.name for path in tmp_path.iterdir()}


def test_long_names_leave_room_for_an_ending():
    names = PictureNames()
    for source in (Path("ä" * 125 + ".png"), Path("x" * 250 + ".png"), Path("x" * 250 + ".bmp")):
        assert len(names.name(source, ".jpg").encode()) < 215
    assert names.name(Path(os.fsdecode(b"\xfcber.png")), ".jpg") == "ber.jpg"
    assert names.name(Path(os.fsdecode(b"\xfc.png")), ".jpg") == "image.jpg"


def test_names_of_pictures():
    names = PictureNames()
    sources = ("a/x.jpg", "b/x.png", "b/X.png", "c/x-2.jpg", "c/y.jpg")
    given = [names.name(Path(source), ".jpg") for source in sources]
    assert given[:2] == ["x.jpg", "x-2.jpg"]
    assert len({name.lower() for name in given}) == len(given)


def test_formats():
    assert check_formats("json, coco") == ("json", "coco")
    assert check_formats("none") == ()
    with pytest.raises(ConfigError, match="json, jsonl, csv, coco"):
        check_formats("xml")
