from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from sparse_exp.config.imgsz import in_words
from sparse_exp.data.__main__ import main
from sparse_exp.data.check import Finding, inspect


def write(
    root: Path, name: str, label: str | None, *, size: tuple[int, int] = (640, 640), shade: int = 0
) -> Path:
    """An image, all of one shade, and its label file."""
    image = root / "images" / f"{name}.png"
    text = root / "labels" / f"{name}.txt"
    for path in (image, text):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(image)
    if label is not None:
        text.write_text(label)
    return image


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A data set with nothing to say about: boxes of 64, 320 and 16 px."""
    root = tmp_path / "my set"
    write(root, "train/a", "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.5 0.5\n", shade=1)
    write(root, "train/b", "", shade=2)
    write(root, "val/c", "0 0.5 0.5 0.025 0.025\n", shade=3)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return root


def findings(root: Path) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in inspect(root / "data.yaml", 640).findings:
        found.setdefault(f"{finding.level} {finding.kind}", []).append(finding)
    return found


def test_facts_of_a_clean_set(clean: Path) -> None:
    report = inspect(clean / "data.yaml", 640)
    assert report.findings == []
    train, val = report.splits["train"], report.splits["val"]
    assert (train.images, train.background, train.boxes, train.classes) == (2, 1, 2, {0: 1, 1: 1})
    assert (train.small, train.medium, train.large) == (0.0, 0.5, 0.5)
    assert train.median_side == pytest.approx((64 + 320) / 2)
    assert (val.small, val.median_side) == (1.0, pytest.approx(16))
    # at half of the size boxes are of half the size
    assert inspect(clean / "data.yaml", 320).splits["train"].median_side == pytest.approx(96)


def test_everything_at_once(clean: Path) -> None:
    lines = ["0 0.5 0.5 0.1 0.1"] * 2 + ["0 0.5 0.5 0.1", "", "5 0.5 0.5 0.1 0.1", "0 1.5 0.5 0.1 0.1"]
    label = "\n".join([*lines, "0 .1 .1 .001 .1"])
    bad = write(clean, "train/bad", label, shade=4)
    broken = write(clean, "train/broken", "", shade=5)
    broken.write_bytes(broken.read_bytes()[:50])
    found = findings(clean)
    labels = clean / "labels/train/bad.txt"
    assert [f.where for f in found["error bad label"]] == [f"{labels}:{line}" for line in (3, 5, 6)]
    assert [f.where for f in found["error bad image"]] == [str(broken)]
    assert [f.where for f in found["warning duplicate box"]] == [f"{labels}:2"]
    assert "line 1 again" in found["warning duplicate box"][0].message
    assert [f.where for f in found["warning tiny box"]] == [f"{labels}:7"]
    assert "0.6 x 64.0 px at 640 px" in found["warning tiny box"][0].message
    assert inspect(clean / "data.yaml", 640).splits["train"].unusable == 2
    assert bad.is_file()


def test_leaks_and_duplicates_are_told_apart(clean: Path) -> None:
    copy = write(clean, "val/copy", "", shade=1)
    twin = write(clean, "train/twin", "", shade=2)
    found = findings(clean)
    assert [f.where for f in found["warning leak"]] == [str(copy)]
    assert str(clean / "images/train/a.png") in found["warning leak"][0].message
    assert [f.where for f in found["warning duplicate image"]] == [str(twin)]


def test_val_that_is_train_is_meant(clean: Path) -> None:
    (clean / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n")
    found = findings(clean)
    assert list(found) == ["warning no split of its own"]


def test_classes_without_boxes(clean: Path) -> None:
    write(clean, "val/d", "3 0.5 0.5 0.1 0.1", shade=9)
    (clean / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog, emu, fox]\n")
    found = findings(clean)
    assert [f.where for f in found["warning class not in train"]] == ["fox"]
    assert [f.where for f in found["warning class never seen"]] == ["emu"]


def test_labels_and_images_that_miss_each_other(clean: Path) -> None:
    lonely = write(clean, "train/lonely", None, shade=6)
    stray = clean / "labels/train/stray.txt"
    stray.write_text("0 0.5 0.5 0.1 0.1")
    (clean / "labels/train/classes.txt").write_text("cat\ndog\n")
    found = findings(clean)
    assert [f.where for f in found["warning label without image"]] == [str(stray)]
    assert [f.where for f in found["warning no label file"]] == [str(lonely)]
    assert "1 of 3 images" in found["warning no label file"][0].message


def test_labels_in_the_wrong_place(clean: Path) -> None:
    (clean / "labels").rename(clean / "annotations")
    found = findings(clean)
    assert [f.level for f in found["error no labels"]] == ["error", "error"]
    assert str(clean / "labels/train/a.txt") in found["error no labels"][0].message


def test_missing_images_and_long_ones(clean: Path) -> None:
    strip = write(clean, "train/strip", "", size=(900, 100), shade=8)
    (clean / "list.txt").write_text("images/train/a.png\nimages/train/gone.png\nimages/train/strip.png\n")
    (clean / "data.yaml").write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    found = findings(clean)
    assert [f.where for f in found["error missing image"]] == [f"{clean / 'list.txt'}:2"]
    assert [f.where for f in found["warning long image"]] == [str(strip)]


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[int, str]:
    code = main(["check", "--cache", str(tmp_path / "cache"), *words])
    return code, capsys.readouterr().out


def test_exit_code_and_text(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = str(clean / "data.yaml")
    code, text = run(capsys, tmp_path, yaml)
    assert code == 0
    assert text.endswith("0 errors, 0 warnings\n")
    for number in range(12):
        write(clean, f"train/twin{number}", "", shade=2)
    code, text = run(capsys, tmp_path, yaml)
    assert code == 0
    assert "... and 2 more (--all)" in text
    assert "more" not in run(capsys, tmp_path, yaml, "--all")[1]
    (clean / "labels/val/c.txt").write_text("[odd] 0.5 0.5 0.1 0.1\n")
    code, text = run(capsys, tmp_path, yaml)
    assert code == 1
    assert f"{clean / 'labels/val/c.txt'}:1" in text
    assert "[odd]" in text  # not taken for markup
    assert "2 errors, 12 warnings" in text  # the label, and val without a usable box


def test_json(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clean / "labels/val/c.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    code, text = run(capsys, tmp_path, str(clean / "data.yaml"), "--json")
    report = json.loads(text)
    assert code == 1
    assert (report["errors"], report["warnings"], report["names"]) == (2, 0, ["cat", "dog"])
    assert report["findings"][0]["where"] == f"{clean / 'labels/val/c.txt'}:1"
    assert report["splits"]["train"]["classes"] == {"0": 1, "1": 1}


def test_a_wrong_yaml_is_one_line(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "data.yaml").write_text("train: .\nval: .\n")
    command = [sys.executable, "-m", "sparse_exp.data", "check", str(tmp_path / "data.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("Error: Expected names of ")
    assert ended.stderr.count("\n") == 1


def test_boxes_that_no_anchor_answers_for(clean: Path) -> None:
    """One of two is 300 x 6 px at 640 px: no published anchor is both wide and low enough."""
    write(clean, "train/a", "0 0.5 0.5 0.47 0.0094\n1 0.5 0.5 0.5 0.5\n", shade=1)
    report = inspect(clean / "data.yaml", 640)
    assert (report.splits["train"].with_anchor, report.splits["val"].with_anchor) == (0.5, 1.0)
    (finding,) = [f for f in report.findings if f.kind == "boxes without anchor"]
    assert finding.level == "warning"
    assert "50.0% of the boxes in train" in finding.message
    assert "model.anchors=auto" in finding.message
    assert report.splits["train"].with_anchor_by_class == {0: 0.0, 1: 1.0}
    (of_class,) = [f for f in report.findings if f.kind == "class without anchor"]
    assert of_class.where == "cat"
    assert "100.0% of the boxes of this class" in of_class.message


def test_a_rare_class_that_no_anchor_answers_for_is_named(clean: Path) -> None:
    """One box of 300 x 6 px among a hundred: nothing of the whole says it."""
    others = "".join(f"1 {0.3 + 0.004 * n:.3f} 0.5 0.1 0.1\n" for n in range(100))
    write(clean, "train/a", f"0 0.5 0.5 0.47 0.0094\n{others}", shade=1)
    found = findings(clean)
    assert "warning boxes without anchor" not in found
    (of_class,) = found["warning class without anchor"]
    assert of_class.where == "cat"
    assert "model.anchors" not in of_class.message  # would fit none


@pytest.mark.parametrize(
    ("sizes", "imgsz", "fitting", "saved"),
    [
        ([(192, 108)], 640, (384, 640), 0.4),  # 640 x 360 px, enlarged
        ([(108, 192)], 640, (640, 384), 0.4),
        ([(192, 108), (108, 192)], 640, 640, 0.0),
        ([(192, 108)] * 40 + [(64, 64)], 640, (384, 640), 0.4),  # one in twenty may be smaller
        ([(640, 480)], (480, 640), (480, 640), 0.25),
        ([(500, 500)], 320, 320, 0.0),
    ],
)
def test_which_rectangle_fits(tmp_path: Path, capsys, sizes, imgsz, fitting, saved) -> None:
    for number, size in enumerate(sizes):
        for split in ("train", "val"):
            write(tmp_path, f"{split}/{number}", "0 0.5 0.5 0.5 0.5\n", size=size, shade=number)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    report = inspect(tmp_path / "data.yaml", imgsz)
    assert (report.fitting, report.saved) == (fitting, pytest.approx(saved))
    main(["check", str(tmp_path / "data.yaml"), "--imgsz", in_words(imgsz)])
    said = (
        f"set dataset.imgsz=[{','.join(map(str, fitting))}], which saves 40%"
        if saved == 0.4
        else "which saves"
    )
    assert (said in capsys.readouterr().out) == (saved == 0.4)
