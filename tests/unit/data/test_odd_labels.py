"""Label files and splits as they come from people: what is meant is read, the rest is said in one line."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from sparse_exp.data.check import inspect
from sparse_exp.data.detection import load_dataset
from sparse_exp.data.labels import read_boxes
from sparse_exp.errors import DataError

_YAML = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
_BOX = "0 0.5 0.5 0.2 0.2\n"


def write(root: Path, labels: dict[str, str | None], yaml: str = _YAML) -> Path:
    """A data set of one image, all of its own shade, for each label."""
    for shade, (name, text) in enumerate(labels.items()):
        for kind in ("images", "labels"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(root / "images" / f"{name}.png")
        if text is not None:
            (root / "labels" / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text(yaml)
    return root / "data.yaml"


def rows(tmp_path: Path, text: str, keypoints: int | None = None) -> list[list[float]]:
    (tmp_path / "label.txt").write_text(text)
    return read_boxes(tmp_path / "label.txt", 2, keypoints).astype(float).round(3).tolist()


@pytest.mark.parametrize(
    "again",
    [
        "0 0.5 0.5 0.2 0.2",
        "0 0.50 0.50 2e-1 .2",
        "0 0.499995 0.500003 0.199998 0.2",  # as another service rounds it
        "0 0.4 0.4 0.6 0.4 0.6 0.6 0.4 0.6",  # the same box as a polygon
    ],
)
def test_a_box_that_is_listed_twice_counts_once(tmp_path: Path, again: str) -> None:
    assert rows(tmp_path, f"{_BOX}1 0.5 0.5 0.2 0.2\n{again}\n", keypoints=0) == [
        [0.0, 0.5, 0.5, 0.2, 0.2],
        [1.0, 0.5, 0.5, 0.2, 0.2],
    ]


@pytest.mark.parametrize("other", ["0 0.5 0.5 0.2 0.21", "0 0.501 0.5 0.2 0.2"])
def test_boxes_that_differ_are_two(tmp_path: Path, other: str) -> None:
    assert len(rows(tmp_path, f"{_BOX}{other}\n")) == 2
    tiny = "0 0.5 0.5 0.0002 0.0002\n0 0.50005 0.5 0.0002 0.0002\n"  # near, but half apart
    assert len(rows(tmp_path, tiny)) == 2


def test_a_run_says_how_many_boxes_are_listed_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yaml = write(tmp_path, {"train/a": _BOX * 3, "train/b": _BOX * 2, "val/c": _BOX})
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_dataset(yaml, cache=tmp_path / "cache")
        assert "3 boxes stand in a label file twice" in caplog.text
    found = [f.where for f in inspect(yaml, 64).findings if f.kind == "duplicate box"]
    labels = tmp_path / "labels/train"
    assert found == [f"{labels / 'a.txt'}:2", f"{labels / 'a.txt'}:3", f"{labels / 'b.txt'}:2"]


POSE = "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1\n"


@pytest.mark.parametrize(
    "line",
    [
        "0 0.5 0.5 0.4 0.4 0.9",  # a confidence
        "0 0.5 0.5 0.4 0.4 0.9 1",  # and a track
        "0 0.5 0.5 0.4 0.4 0.9 7",
        "0 0.5 0.5 0.4 0.4 0.4 0.4 1 0.6 0.6 1",  # two keypoints
        "0 0.5 0.5 0.4 0.4 0.4 0.4 1 0 0 0",
        POSE,
    ],
)
def test_lines_that_go_on_behind_a_box_are_no_polygons(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"label\.txt:1 to be class x y w h"):
        rows(tmp_path, line)


@pytest.mark.parametrize(
    ("lines", "type_this"),
    [
        (["{x} {y} 0.1 0.3 {x} {y} 1.000000 0 0 0.000000"], "kpt_shape: [2, 3]"),
        (["{x} {y} 0.1 0.3 {x} {y} 2.000000 0 0 0.000000"], "kpt_shape"),
        (["{x} {y} 0.1 0.3 {x} {y} {right} {y}", "{x} {y} 0.1 0.3"], "kpt_shape: [2, 2]"),
        (["{x} {y} 0.1 0.3 {x} {y} {right} {y} {x} 0.35"], "kpt_shape: [3, 2]"),
    ],
)
def test_sets_of_keypoints_are_asked_for_their_shape(
    tmp_path: Path, lines: list[str], type_this: str
) -> None:
    labels: dict[str, str | None] = {
        f"{split}/{n}": "".join(
            f"1 {line.format(x=0.1 + 0.2 * n, right=0.12 + 0.2 * n, y=0.4)}\n" for line in lines
        )
        for n, split in enumerate(["train", "train", "train", "val"])
    }
    yaml = write(tmp_path, labels)
    with pytest.raises(DataError, match=re.escape(type_this)) as caught:
        load_dataset(yaml)
    assert f"{tmp_path / 'labels/train/0.txt'}:1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert inspect(yaml, 64).errors
    shape = re.search(r"kpt_shape: \[\d, \d\]", str(caught.value))
    (tmp_path / "data.yaml").write_text(f"{_YAML}{shape[0] if shape else 'kpt_shape: [2, 3]'}\n")
    boxes = [s.labels_of(2).round(3).tolist()[0] for s in load_dataset(yaml).splits["train"]]
    assert boxes == [pytest.approx([1, 0.1 + 0.2 * n, 0.4, 0.1, 0.3]) for n in range(3)]


def test_what_one_polygon_leaves_open_the_others_tell(tmp_path: Path) -> None:
    """A polygon around its own first numbers, alone, may be keypoints; not so among many others."""
    centred, other = "0 0.4 0.4 0.6 0.4 0.6 0.6 0.4 0.6\n", "0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4\n"
    yaml = write(tmp_path, {"train/a": centred, "val/b": centred})
    with pytest.raises(DataError, match="kpt_shape: null"):
        load_dataset(yaml, cache=tmp_path / "cache")
    wanted = [pytest.approx([0, 0.5, 0.5, 0.2, 0.2])]
    for change in ({"train/c": other}, {}):
        said = "" if change else "kpt_shape: null\n"
        write(tmp_path, {"train/a": centred, "val/b": centred, **change}, f"{_YAML}{said}")
        sample, *_ = load_dataset(yaml, cache=tmp_path / "cache").splits["train"]
        assert sample.labels_of(2).tolist() == wanted
        (tmp_path / "images/train/c.png").unlink(missing_ok=True)


def test_polygons_at_the_edges_stay_polygons(tmp_path: Path) -> None:
    text = "0 0.4 0.4 0.5 0.4 1 0.5 0.9 1 0.5 1\n1 0 0 1 0 1 1\n"
    assert rows(tmp_path, text) == [[0.0, 0.7, 0.7, 0.6, 0.6], [1.0, 0.5, 0.5, 1.0, 1.0]]


def test_keypoints_behind_boxes_are_left_out(tmp_path: Path) -> None:
    yaml = f"{_YAML}kpt_shape: [2, 3]\n"
    path = write(tmp_path, {"train/a": POSE + _BOX, "val/b": POSE}, yaml)
    (sample,) = load_dataset(path).splits["train"]
    wanted = [[0, 0.5, 0.5, 0.4, 0.4], [0, 0.5, 0.5, 0.2, 0.2]]
    assert [pytest.approx(row) for row in wanted] == sample.labels_of(2).tolist()
    # Of two numbers each, which nothing in the line itself tells from a polygon.
    assert rows(tmp_path, "1 0.5 0.5 0.4 0.4 0.4 0.45 0.6 0.65", keypoints=4) == [[1, 0.5, 0.5, 0.4, 0.4]]
    with pytest.raises(DataError, match="4 numbers, as kpt_shape"):
        rows(tmp_path, "1 0.5 0.5 0.4 0.4 0.4 0.45", keypoints=4)
    (tmp_path / "data.yaml").write_text(f"{_YAML}kpt_shape: 17\n")
    with pytest.raises(DataError, match=r"kpt_shape of .*count and numbers"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("labels", "entry", "message"),
    [
        ({}, "test: nowhere", "'test' of .*existing folder.*leave the key 'test' out"),
        ({}, "test: [images/none]", "'test' of .*existing folder.*leave the key 'test' out"),
        ({"test/note": None}, "test: labels", "'test' of .*at least one image.*leave the key 'test' out"),
        ({}, "test: list.txt", "'test' of .*at least one image.*leave the key 'test' out"),
        ({"test/d": ""}, "test: images/test", "No image of test has a box.*leave the key 'test' out"),
        ({"train/a": ""}, "", "No image of train has a box"),
        ({"val/b": None}, "", r"No image of val has a box.*labels/val/b\.txt"),
        ({"train/a": "", "val/b": ""}, "", "No image of train has a box"),
    ],
)
def test_what_a_run_refuses_is_an_error_of_the_check(
    tmp_path: Path, labels: dict, entry: str, message: str
) -> None:
    yaml = write(tmp_path, {"train/a": _BOX, "val/b": _BOX, **labels}, f"{_YAML}{entry}\n")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(yaml)
    assert "\n" not in str(caught.value)
    errors = 1
    with suppress(DataError):  # of a split that leads nowhere there is nothing to report on
        errors = inspect(yaml, 64).errors
    assert errors


def test_what_the_check_only_warns_of_a_run_says_and_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = write(tmp_path, {"train/a": _BOX, "val/b": _BOX, "val/d": "1 0.5 0.5 0.2 0.2"})
    image = tmp_path / "images/train/a.png"
    (tmp_path / "images/val/copy.png").write_bytes(image.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(yaml).splits["val"]) == 3
    assert "1 images are in two splits" in caplog.text
    assert "train has no box of 'dog', which other splits have" in caplog.text
    assert inspect(yaml, 64).errors == 0


def test_images_of_one_name_and_classes_of_one_name_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = write(tmp_path, {"train/a": _BOX, "val/b": _BOX}, _YAML.replace("dog", "cat, cat"))
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "images/train/a.jpg")
    with caplog.at_level(logging.WARNING):
        load_dataset(yaml)
    (line,) = (record.getMessage() for record in caplog.records)
    a, other = (tmp_path / "images/train" / name for name in ("a.jpg", "a.png"))
    assert f"1 images have the label file of another, such as {other} that of {a}" in line
    assert "the classes 0, 1, 2 are all called 'cat'" in line
    found = {finding.kind: finding for finding in inspect(yaml, 64).findings}
    assert found["shared label file"].where == str(other)
    assert "0, 1, 2" in found["class name twice"].message


def test_label_files_may_have_suffixes_in_capitals(tmp_path: Path) -> None:
    yaml = write(tmp_path, {"train/a": _BOX, "train/b": _BOX, "val/c": _BOX})
    labels = tmp_path / "labels/train"
    (labels / "a.txt").rename(labels / "a.TXT")
    (labels / "b.TXT").write_text("1 0.1 0.1 0.1 0.1\n")  # beside b.txt, which counts
    (labels / "stray.Txt").write_text(_BOX)
    samples = load_dataset(yaml).splits["train"]
    assert [sample.label.name for sample in samples] == ["a.TXT", "b.txt"]
    assert [sample.labels_of(2)[:, 0].tolist() for sample in samples] == [[0.0], [0.0]]
    found = {finding.kind: finding for finding in inspect(yaml, 64).findings}
    assert found["label without image"].where == str(labels / "stray.Txt")
    assert "no label file" not in found


@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_no_utf8(tmp_path: Path, listed: bool) -> None:
    entry = "list.txt" if listed else "images/train"
    yaml = write(tmp_path, {"train/a": _BOX, "val/b": _BOX}, _YAML.replace("images/train", entry))
    name = os.fsdecode(b"B\xe4ume")  # Latin 1
    (tmp_path / "images/train/a.png").rename(tmp_path / f"images/train/{name}.png")
    (tmp_path / "labels/train/a.txt").rename(tmp_path / f"labels/train/{name}.txt")
    (tmp_path / "list.txt").write_bytes(b"images/train/B\xe4ume.png\n")
    first, again = (load_dataset(yaml, cache=tmp_path / "cache") for _ in range(2))
    assert first == again
    assert first.splits["train"][0].image.stem == name
    assert len(first.splits["train"][0].labels_of(2)) == 1
    assert inspect(yaml, 64).errors == 0


def test_such_names_are_printed_as_escapes(tmp_path: Path) -> None:
    yaml = write(tmp_path, {"train/a": _BOX, "train/b": _BOX, "val/c": _BOX})
    label = tmp_path / "labels/train" / os.fsdecode(b"B\xe4ume.txt")
    (tmp_path / "labels/train/b.txt").rename(label)
    label.write_text("no label")
    (tmp_path / "images/train/b.png").rename(tmp_path / "images/train" / os.fsdecode(b"B\xe4ume.png"))
    command = [
        sys.executable,
        "-m",
        "sparse_exp.data",
        "check",
        str(yaml),
        "--cache",
        str(tmp_path / "cache"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "B\\udce4ume.txt:1" in ended.stdout


def test_a_label_file_without_an_end_is_refused(tmp_path):
    data = write(tmp_path, {"train/a": _BOX * 20_001, "val/b": _BOX})
    assert inspect(data, 64).errors == 2  # and nothing is left to train with
    with pytest.raises(DataError, match="at most 20000 boxes"):
        read_boxes(tmp_path / "labels/train/a.txt", 2)
