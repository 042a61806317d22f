"""Class names are any text: every writer takes them, and every reader gives back what was written."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from sparse_exp.data.__main__ import main
from sparse_exp.data.detection import list_dataset
from sparse_exp.data.writing import write_yaml
from sparse_exp.files import write_json, write_text
from sparse_exp.predict.detections import Detections
from sparse_exp.predict.drawing import draw
from sparse_exp.report.plots import detection_sheet
from sparse_exp.runs.deployment import Deployment
from sparse_exp.runs.metadata import describe, read_metadata, write_metadata
from sparse_exp.text import console_table, in_markdown, in_picture, markdown_table, plain_text, whole_text
from sparse_exp.yolov5.checkpoint import read_checkpoint, save_checkpoint
from sparse_exp.zoo.card import write_card

ODD = [
    *("$$", "$a_1$", "a\nb", "\\n", "\U0001f333", "<b>&amp;</b>", "a|b", "yes", "null", "1.0", "[red]"),
    *("-", "#1", "", "\x00\x1b[31m", "'\"", "{x}", "w" * 500, "\u202eabc", "\x85\u2028", "e\u0301", "~"),
    *("%s", "*a*", "a ; b", "=1+1"),
]
NAMES = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=12)), min_size=1, max_size=6)
each = given(names=NAMES)
often = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
seldom = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


@often
@each
@example(names=ODD)
def test_the_data_yaml_gives_back_what_was_written(folder: Path, names: list[str]) -> None:
    image = folder / "images/train/a.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(image)
    write_yaml(folder, names, {"train": "images/train", "val": "images/train"})
    assert list_dataset(folder / "data.yaml").names == tuple(names)
    # as other tools write it: as JSON, which spells some letters in halves, and as their YAML library does
    places = {"train": "images/train", "val": "images/train"}
    (folder / "data.yaml").write_text(json.dumps({**places, "names": names}))
    assert list_dataset(folder / "data.yaml").names == tuple(names)
    (folder / "data.yaml").write_text(yaml.safe_dump({**places, "names": dict(enumerate(names))}))
    assert list_dataset(folder / "data.yaml").names == tuple(names)


def test_words_that_yaml_reads_as_something_else_are_names(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    (folder / "data.yaml").write_text(
        "train: a.png\nval: a.png\nnames: [yes, No, null, 1.0, 010, 2024-01-01, ~]\n"
    )
    assert list_dataset(folder / "data.yaml").names == ("yes", "No", "null", "1.0", "010", "2024-01-01", "~")


@often
@each
@example(names=ODD)
def test_files_for_machines_give_back_what_was_written(folder: Path, names: list[str]) -> None:
    entries = describe(names, 64, {})
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(folder / "a.onnx"))
    write_metadata(folder / "a.onnx", entries)
    assert read_metadata(folder / "a.onnx")["names"] == tuple(names)
    write_json(Deployment(folder).class_names, names)
    assert Deployment(folder).names == tuple(names)
    found = Detections.of_rows(np.zeros((1, 6), np.float32), names, (8, 8))
    assert [detection.class_name for detection in found] == names[:1]


@seldom
@each
@example(names=ODD)
def test_checkpoints_give_back_what_was_written(folder: Path, names: list[str]) -> None:
    save_checkpoint(
        folder / "a.pt", model_state={"a": torch.zeros(1)}, size="n", num_classes=len(names), names=names,
        imgsz=64, recipe="", phase="dense", epoch=1, metrics={},
    )  # fmt: skip
    assert read_checkpoint(folder / "a.pt").names == tuple(names)


@often
@each
@example(names=ODD)
def test_pages_show_names_and_no_marks(names: list[str]) -> None:
    page = markdown_table(("name", "boxes"), [(in_markdown(name), "1") for name in names])
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    cells = [token for token in tokens if token.type == "inline"][2::2]
    assert len(cells) == len(names)
    for cell, name in zip(cells, names, strict=True):
        assert all(child.type == "text" for child in cell.children or ())
        shown = "".join(child.content for child in cell.children or ())
        visible = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(name.split()))
        assert shown == visible.replace("\\|", "|")


@often
@each
@example(names=ODD)
def test_tables_on_the_console(names: list[str]) -> None:
    lines = plain_text(console_table(["name"], [[in_picture(name)] for name in names]), width=80).splitlines()
    shown = " ".join(line.strip() for line in lines)
    for name in names:
        assert in_picture(name).strip() in shown
        assert len(in_picture(name)) <= 40
        assert in_picture(name).isprintable()


@seldom
@each
@example(names=ODD)
def test_pictures(folder: Path, names: list[str]) -> None:
    rows = np.array([[2, 2, 60, 60, 0.9, number] for number in range(len(names))], np.float32)
    image = np.full((3, 64, 64), 90, np.uint8)
    with_labels = draw(Image.fromarray(image.transpose(1, 2, 0)), rows, names)
    assert with_labels.size == (320, 320)
    path = folder / "sheet.png"
    detection_sheet([(image, np.zeros((0, 4)), rows)], names, path, title=" ".join(names))
    assert Image.open(path).size == (429, 520)


@seldom
@each
@example(names=ODD)
def test_the_model_card(folder: Path, names: list[str]) -> None:
    stub = "zoo:cv/detection/yolov5-s/pytorch/mine/trees/base-none"
    keys = ("short", "size", "dataset", "tag", "recipe", "origin", "published", "by", "sparse_exp")
    metadata = {"stub": stub, "sparsity": 0.5, "block4": False, "quantized": False, "classes": names,
                "metrics": {}, **dict.fromkeys(keys, "x")}  # fmt: skip
    write_card(folder, metadata)
    page = (folder / "model.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("| classes")]
    assert not re.search(r"(?<!\\)[<>*`$]", line)


def test_the_check_prints_its_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / f"images/{split}/a.png")
        lines = (f"{number} 0.5 0.5 {0.1 + number / 50:.3f} 0.5\n" for number in range(len(ODD)))
        (folder / f"labels/{split}/a.txt").write_text("".join(lines))
    write_yaml(folder, ODD, ["train", "val"])
    assert main(["check", str(folder / "data.yaml"), "--cache", str(folder / "cache")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert [name for name in ODD if len(name) < 20 and in_picture(name).strip() not in printed] == []


def test_text_that_is_no_utf8_is_made_whole(folder: Path) -> None:
    assert whole_text("\ud83c\udf33 \udce4") == "\U0001f333 \ufffd"
    write_text(folder / "a.txt", "B\udce4ume")  # a name of a file in Latin 1
    assert (folder / "a.txt").read_text(encoding="utf-8") == "B\\udce4ume"
