"""Directories and files of predictions."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_exp.data.detection import list_dataset
from sparse_exp.errors import ConfigError, DataError
from sparse_exp.predict.outputs import FORMATS, PictureNames, Results, check_formats, new_directory
from sparse_exp.predict.pipeline import ImageResult, Input


@pytest.fixture
def results() -> Results:
    model = SimpleNamespace(origin="m", path=Path("m.onnx"), engine="onnxruntime", imgsz=64)
    results = Results(SimpleNamespace(model=model, names=("cat", "dog"), version="1"), {"conf": 0.25})
    rows = np.array([[1, 2, 11, 22, 0.75, 1], [0, 0, 5, 5, 0.5, 0]], np.float32)
    results.add(1, ImageResult(Input(Path("a, b.jpg")), (40, 30), rows), "a, b.jpg")
    results.add(3, ImageResult(Input(Path("v.mp4"), 5), (64, 48), rows[:1]), "v.mp4", fps=10.0)
    results.add(4, ImageResult(Input(Path("nothing.jpg")), (9, 9), rows[:0]), None)
    return results


def test_json(results, tmp_path):
    results.write(tmp_path, ("json",), None)
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
    results.write(tmp_path, ("csv",), None)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [(row["file"], row["frame"], row["class"], row["x2"]) for row in rows] == [
        ("a, b.jpg", "", "dog", "11.0"), ("a, b.jpg", "", "cat", "5.0"), ("v.mp4", "5", "dog", "11.0"),
    ]  # fmt: skip


def test_coco(results, tmp_path):
    results.write(tmp_path, ("coco",), None)
    first = json.loads((tmp_path / "coco.json").read_text())[0]
    assert first == {"image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.75}


def test_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [new_directory(None, overwrite=False, sources=[]) for _ in range(2)]
    (tmp_path / "outputs/predict/7").mkdir()
    made.append(new_directory(None, overwrite=False, sources=[]))
    assert [path.as_posix() for path in made] == [f"outputs/predict/{number}" for number in (1, 2, 8)]


def test_nothing_is_replaced_without_a_word(tmp_path):
    out = tmp_path / "out"
    assert new_directory(out, overwrite=False, sources=[]) == out
    (out / "photo.jpg").touch()
    for overwrite, said in ((False, "--overwrite"), (True, "is no prediction")):
        with pytest.raises(ConfigError, match=said):
            new_directory(out, overwrite=overwrite, sources=[])
    (out / "predictions.json").write_text('[{"image_id": 1}]', encoding="utf-8")
    with pytest.raises(ConfigError, match="of ours"):  # others give files that name, too
        new_directory(out, overwrite=True, sources=[])
    (out / "predictions.json").write_text(
        '{"format": "sparse_exp.predict/1", "images": []}', encoding="utf-8"
    )
    (out / "below").mkdir()
    with pytest.raises(ConfigError, match="lies in"):
        new_directory(out, overwrite=True, sources=[out / "photo.jpg"])
    assert new_directory(out, overwrite=True, sources=[]) == out
    assert not any(out.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot make"):
        new_directory(tmp_path / "file" / "out", overwrite=False, sources=[])


def test_a_link_to_a_directory_stays_one(results, tmp_path):
    link, real = tmp_path / "link", tmp_path / "real"
    real.mkdir()
    link.symlink_to(real)
    (real / "other").symlink_to(tmp_path)
    results.write(real, ("json",), None)
    assert new_directory(link, overwrite=True, sources=[]) == link
    assert link.is_symlink()
    assert not any(real.iterdir())
    assert tmp_path.exists()


def test_names_of_files_that_are_no_utf_8(results, tmp_path):
    odd = Path(os.fsdecode(b"\xfcber.jpg"))
    results.add(5, ImageResult(Input(odd), (9, 9), np.ones((1, 6), np.float32)), "ber.jpg")
    results.write(tmp_path, ("json", "csv"), None)
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
        results.write(tmp_path, FORMATS, data)
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
    with pytest.raises(ConfigError, match="json, csv, coco"):
        check_formats("xml")
