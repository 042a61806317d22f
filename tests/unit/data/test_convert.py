from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_exp.config.schema import DatasetConfig, SourceConfig
from sparse_exp.data import load_dataset, prepare
from sparse_exp.data.__main__ import main
from sparse_exp.data.archives import open_tree
from sparse_exp.data.public import COCO_NAMES
from sparse_exp.errors import ConfigError, DataError, SourceUnavailable
from sparse_exp.locks import exclusive


def image_bytes(width: int = 100, height: int = 50, shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def labels(yaml: Path, split: str) -> dict[str, list[list[float]]]:
    dataset = load_dataset(yaml)
    return {
        sample.image.name: sample.labels_of(len(dataset.names)).round(4).tolist()
        for sample in dataset.splits[split]
    }


def coco(split: str, **changes: list) -> str:
    whole = {
        "images": [
            {"id": 7, "file_name": f"{split}1.jpg", "width": 100, "height": 50},
            {"id": 8, "file_name": f"{split}2.jpg", "width": 100, "height": 50},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 9, "bbox": [10, 10, 20, 10], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [90, 40, 20, 20]},  # hangs out
            {"image_id": 7, "category_id": 3, "bbox": [5, 5, 9, 9], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9]},
            {"image_id": 7, "category_id": 3, "bbox": [120, 5, 9, 9]},
        ],
    }
    return json.dumps({**whole, **changes})


def numbered(*ids: int) -> dict[str, list]:
    """Images and their annotations for `coco`: of each id an image of that name, with one box."""
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 0, "height": 0} for n in ids],
        "annotations": [{"image_id": n, "category_id": 3, "bbox": [0, 0, 10, 5]} for n in ids],
    }


@pytest.fixture
def coco_set(tmp_path: Path) -> Path:
    pictures = {
        f"{split}2017/{split}{n}.jpg": image_bytes(shade=n) for split in ("train", "val") for n in (1, 2)
    }
    notes = {f"annotations/instances_{split}2017.json": coco(split) for split in ("train", "val")}
    notes["annotations/captions_train2017.json"] = json.dumps(
        {"images": [], "annotations": [{"caption": "a"}]}
    )
    return put(tmp_path / "coco", {**pictures, **notes})


def test_coco(coco_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "coco", str(coco_set), str(tmp_path / "out")]) == 0
    yaml = tmp_path / "out/data.yaml"
    assert load_dataset(yaml).names == ("cat", "dog")  # by id, 3 before 9
    # 20 x 10 px at 10, 10 of 100 x 50; and 20 x 20 at 90, 40, of which 10 x 10 are inside.
    wanted = [[1, 0.2, 0.3, 0.2, 0.2], [0, 0.95, 0.9, 0.1, 0.2]]
    assert {name: np.round(rows, 4).tolist() for name, rows in labels(yaml, "val").items()} == {
        "val1.jpg": [pytest.approx(row) for row in wanted], "val2.jpg": [],
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "train: 2 images, 2 boxes" in printed
    assert "left out: 2 boxes of crowds" in printed
    assert "left out: 4 empty boxes" in printed
    assert (tmp_path / "out/images/train/train1.jpg").read_bytes() == image_bytes(shade=1)


def test_coco_images_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a/x.jpg", "b/x.jpg", "b/x.jpg", "c/X.png", "gone.jpg"]
    images = [{"id": n, "file_name": name, "width": 0, "height": 0} for n, name in enumerate(names)]
    boxes = [{"image_id": n, "category_id": 3, "bbox": [0, 0, 10 * (n + 1), 5]} for n in range(5)]
    files = {name: image_bytes(shade=n) for n, name in enumerate(names[:4])}
    note = coco("train", images=images, annotations=boxes)
    source = put(tmp_path / "set", {"labels.json": note, **{f"pictures/{n}": c for n, c in files.items()}})
    arguments = [
        "convert",
        "coco",
        str(source),
        str(tmp_path / "out"),
        "--images",
        "pictures",
        "--val-share",
        "0.4",
    ]
    assert main(arguments) == 0
    found = [labels(tmp_path / "out/data.yaml", split) for split in ("train", "val")]
    assert [len(images) for images in found] == [2, 1]
    assert sorted(len(rows) for images in found for rows in images.values()) == [1, 1, 2]
    printed = capsys.readouterr().out
    assert "1 images not found" in printed
    assert "1 images listed twice" in printed
    assert "1 boxes without an image" in printed


def voc_xml(
    boxes: dict[str, tuple[int, int, int, int]], difficult: tuple[str, ...] = (), size: str = ""
) -> str:
    items = (
        f"<object><name>{name}</name><difficult>{int(name in difficult)}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in boxes.items()
    )
    return f"<annotation>{size}{''.join(items)}</annotation>"


def voc_files(year: str, stems: dict[str, list[str]]) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for image_set, names in stems.items():
        files[f"VOCdevkit/{year}/ImageSets/Main/{image_set}.txt"] = "".join(f"{name}\n" for name in names)
        for name in names:
            note = voc_xml({"dog": (1, 1, 100, 50), "cat": (11, 11, 20, 20), "bird": (1, 1, 9, 9)}, ("bird",))
            files[f"VOCdevkit/{year}/Annotations/{name}.xml"] = note
            files[f"VOCdevkit/{year}/JPEGImages/{name}.jpg"] = image_bytes(shade=len(files))
    return files


def test_voc_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(
        tmp_path / "Pascal Größe", voc_files("VOC2007", {"train": ["000001", "000002"], "val": ["000003"]})
    )
    assert main(["convert", "voc", str(source), str(tmp_path / "out")]) == 0
    yaml = tmp_path / "out/data.yaml"
    assert load_dataset(yaml).names == ("cat", "dog")
    # Pixels 1..100 of 100 are the whole image; 11..20 are ten pixels from the tenth on.
    assert labels(yaml, "val") == {
        "000003.jpg": [pytest.approx(r) for r in ([1, 0.5, 0.5, 1, 1], [0, 0.15, 0.3, 0.1, 0.2])]
    }
    printed = capsys.readouterr().out
    assert "train: 2 images, 4 boxes" in printed
    assert "left out: 3 difficult objects" in printed


def test_voc_images_of_another_split_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of train is missing; the one of its name in val is another picture."""
    dog, cat = voc_xml({"dog": (1, 1, 100, 50)}), voc_xml({"cat": (11, 11, 20, 20)})
    for number, (mine, note) in enumerate((("a", cat), ("c", "<filename>c.jpg</filename>"))):
        files = {
            "train/Annotations/a.xml": dog.replace("<annotation>", f"<annotation>{note}") if number else dog,
            "train/Annotations/b.xml": dog,
            "train/JPEGImages/b.jpg": image_bytes(shade=1),
            f"val/Annotations/{'z' if number else mine}.xml": cat,
            "val/JPEGImages/z.jpg": image_bytes(shade=2),
            f"val/JPEGImages/{mine}.jpg": image_bytes(shade=3),
        }
        source, out = put(tmp_path / f"set{number}", files), tmp_path / f"out{number}"
        assert main(["convert", "voc", str(source), str(out)]) == 0
        every = {**labels(out / "data.yaml", "train"), **labels(out / "data.yaml", "val")}
        assert set(every) == {"b.jpg", "z.jpg" if number else "a.jpg"}
        assert sum(map(len, every.values())) == 2
        assert "1 images not found" in capsys.readouterr().out


def test_coco_images_of_another_split_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "annotations/instances_train2017.json": coco("train", **numbered(0, 1)),
        "annotations/instances_val2017.json": coco("val", **numbered(0)),
        "train2017/1.jpg": image_bytes(shade=1),
        "val2017/0.jpg": image_bytes(shade=2),
    }
    assert main(["convert", "coco", str(put(tmp_path / "set", files)), str(tmp_path / "out")]) == 0
    assert list(labels(tmp_path / "out/data.yaml", "train")) == ["1.jpg"]
    assert list(labels(tmp_path / "out/data.yaml", "val")) == ["0.jpg"]
    assert "1 images not found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", ["images/val/a.jpg", "val/deep/a.jpg", "pictures/validation2/a.png", "b/val_images/x/a.jpg"]
)
def test_voc_images_of_a_folder_that_names_another_split_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    files = {
        "annotations/train/a.xml": voc_xml({"dog": (1, 1, 100, 50)}),
        **{f"annotations/train/{name}.xml": voc_xml({"dog": (1, 1, 100, 50)}) for name in "bc"},
        **{f"images/train/{name}.jpg": image_bytes(shade=ord(name)) for name in "bc"},
        other: image_bytes(shade=2),
    }
    out = tmp_path / "out"
    assert main(["convert", "voc", str(put(tmp_path / "set", files)), str(out), "--val-share", "0.5"]) == 0
    assert "1 images not found" in capsys.readouterr().out
    found = [labels(out / "data.yaml", split) for split in ("train", "val")]
    assert sorted(name for split in found for name in split) == ["b.jpg", "c.jpg"]


def test_images_below_the_folder_of_other_annotations_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sites, each with its own annotations and pictures in a folder that neither names."""
    files = {
        "north/labels.json": coco("train", **numbered(0, 1)),
        "south/labels.json": coco("train", **numbered(0)),
        "north/pictures/1.jpg": image_bytes(shade=1),
        "south/pictures/0.jpg": image_bytes(shade=2),
    }
    arguments = [str(put(tmp_path / "set", files)), str(tmp_path / "out"), "--val-share", "0.5"]
    assert main(["convert", "coco", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "1 images not found" in printed
    found = [labels(tmp_path / "out/data.yaml", split) for split in ("train", "val")]
    assert sorted(len(rows) for split in found for rows in split.values()) == [1, 1]


def test_an_image_that_several_have_the_name_of_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "notes/a.xml": voc_xml({"dog": (1, 1, 100, 50)}), "notes/b.xml": voc_xml({"dog": (1, 1, 100, 50)}),
        "notes/c.xml": voc_xml({"dog": (1, 1, 100, 50)}), "monday/c.jpg": image_bytes(shade=4),
        "monday/a.jpg": image_bytes(shade=1), "tuesday/a.png": image_bytes(shade=2),
        "monday/b.jpg": image_bytes(shade=3),
    }  # fmt: skip
    arguments = [str(put(tmp_path / "set", files)), str(tmp_path / "out"), "--val-share", "0.5"]
    assert main(["convert", "voc", *arguments]) == 0
    assert "1 images that several have the name of" in capsys.readouterr().out
    found = [labels(tmp_path / "out/data.yaml", split) for split in ("train", "val")]
    assert sorted(name for split in found for name in split) == ["b.jpg", "c.jpg"]


def test_voc_beside_images(tmp_path: Path) -> None:
    size = "<filename>b ä.jpg</filename><size><width>200</width><height>100</height></size>"
    files = {
        "train/a.xml": voc_xml({"cat": (1, 1, 50, 50)}), "train/a.jpg": image_bytes(),
        "valid/1.xml": voc_xml({"cat": (1, 1, 50, 50)}, size=size), "valid/b ä.jpg": image_bytes(),
    }  # fmt: skip
    assert main(["convert", "voc", str(put(tmp_path / "set", files)), str(tmp_path / "out")]) == 0
    assert labels(tmp_path / "out/data.yaml", "train") == {"a.jpg": [[0, 0.25, 0.5, 0.5, 1]]}
    assert labels(tmp_path / "out/data.yaml", "val") == {"b ä.jpg": [[0, 0.125, 0.25, 0.25, 0.5]]}


@pytest.mark.parametrize("suffix", [".JPG", ".Jpg", ".jpg", ".PNG"])
def test_voc_boxes_lie_on_the_image_of_the_files_own_name(tmp_path: Path, suffix: str) -> None:
    size = "<size><width>200</width><height>100</height></size>"
    named = {one: f"<filename>{one}{suffix}</filename>{size}" for one in "ab"}
    files = {
        "a.xml": voc_xml({"cat": (1, 1, 50, 50)}, size=named["b"]), f"a{suffix}": image_bytes(shade=1),
        "b.xml": voc_xml({"cat": (1, 1, 100, 50)}, size=named["a"]), f"b{suffix}": image_bytes(shade=2),
    }  # fmt: skip
    arguments = [str(put(tmp_path / "set", files)), str(tmp_path / "out"), "--val-share", "0.5"]
    assert main(["convert", "voc", *arguments]) == 0
    found = [labels(tmp_path / "out/data.yaml", split) for split in ("train", "val")]
    assert {name[0]: rows[0][3] for split in found for name, rows in split.items()} == {"a": 0.25, "b": 0.5}


def test_links(coco_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["convert", "coco", str(coco_set), str(tmp_path / "hard"), "--link"])
    image = tmp_path / "hard/images/train/train1.jpg"
    assert image.samefile(coco_set / "train2017/train1.jpg")
    assert not image.is_symlink()

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    main(["convert", "coco", str(coco_set), str(tmp_path / "soft"), "--link"])
    image = tmp_path / "soft/images/train/train1.jpg"
    assert image.is_symlink()
    assert (
        load_dataset(tmp_path / "soft/data.yaml").digest == load_dataset(tmp_path / "hard/data.yaml").digest
    )


def test_nothing_is_overwritten(coco_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["convert", "coco", str(coco_set), str(out)])
    (out / "mine").write_text("precious")
    arguments = ["convert", "coco", str(coco_set), str(out)]
    with pytest.raises(DataError, match=r"exists.*--force"):
        main(arguments)
    assert (out / "mine").exists()
    main([*arguments, "--force"])
    assert not (out / "mine").exists()
    put(tmp_path / "photos", {"a.jpg": b"precious"})
    for place in (tmp_path / "photos", tmp_path / "photos/a.jpg"):
        with pytest.raises(DataError, match=r"no data\.yaml"):
            main(["convert", "coco", str(coco_set), str(place), "--force"])
    assert (tmp_path / "photos/a.jpg").read_bytes() == b"precious"


def test_what_breaks_off_leaves_nothing(
    coco_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["convert", "coco", str(coco_set), str(tmp_path / "out")])
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    for arguments in ([str(tmp_path / "out"), "--force"], [str(tmp_path / "new")]):
        with pytest.raises(DataError, match="No space left on device"):
            main(["convert", "coco", str(coco_set), *arguments])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("coco", {"a.txt": ""}, "COCO annotations"),
        ("coco", {"a.json": "{"}, "Cannot read a.json"),
        ("coco", {"instances_train.json": coco("train", images=[{"id": 1}])}, "KeyError: 'file_name'"),
        ("coco", {"instances_train.json": coco("train")}, "at least one image"),
        (
            "coco",
            {
                "instances_train.json": coco(
                    "train", images=[{"id": 1, "file_name": n} for n in ("a.jpg", "b.jpg")]
                )
            },
            "two images have the id 1, such as b.jpg",
        ),
        ("voc", {"a.txt": ""}, "Annotations"),
        ("voc", {"Annotations/a.xml": "<annotation>"}, "Cannot read Annotations/a.xml"),
        ("voc", {"Annotations/a.xml": voc_xml({"cat": (1, 1, 9, 9)})}, "at least one image"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, kind: str, files: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        main(["convert", kind, str(put(tmp_path / "set", files)), str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def packed(path: Path, files: dict[str, bytes | str]) -> Path:
    plain = {
        name: content.encode() if isinstance(content, str) else content for name, content in files.items()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in plain.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in plain.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg"])
def test_archives_that_lead_outside_are_refused(tmp_path: Path, suffix: str, name: str) -> None:
    place = packed(tmp_path / f"set{suffix}", {"fine.jpg": b"1", name: b"2"})
    with pytest.raises(DataError, match="Do not use it"), open_tree([place]):
        pass


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"images/{kind!r}.jpg")
            member.type, member.linkname = kind, str(tmp_path / "secret")
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        member = zipfile.ZipInfo("images/link.jpg")
        member.external_attr = 0o120777 << 16
        zipped.writestr(member, str(tmp_path / "secret"))
    for name in ("a.tar", "a.zip"):
        with open_tree([tmp_path / name]) as tree:
            assert tree.readers == {}


def test_archives_of_absurd_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "bomb.zip"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(3 << 20))
        archive.writestr("b.jpg", bytes(3 << 20))
    assert place.stat().st_size < 1 << 14
    for limit, size in (("_MAX_FILE", 2 << 20), ("_MAX_TOTAL", 5 << 20)):
        with monkeypatch.context() as patch:
            patch.setattr(f"sparse_exp.data.archives.{limit}", size)
            with pytest.raises(DataError, match="Do not use it"), open_tree([place]):
                pass
    with open_tree([place]) as tree:
        assert len(tree.read("a.jpg")) == 3 << 20


@pytest.mark.parametrize("name", ["set.zip", "set.tar"])
def test_damaged_archives_are_named(tmp_path: Path, name: str) -> None:
    place = packed(tmp_path / name, {"images/a.jpg": image_bytes(300, 300) * 20})
    place.write_bytes(place.read_bytes()[:3000])
    with pytest.raises(DataError, match=name), open_tree([place]) as tree:
        tree.read("images/a.jpg")


def public(name: str, places: list[str]) -> DatasetConfig:
    return DatasetConfig(name=name, generator=name, sources=[SourceConfig(uri=place) for place in places])


def test_coco128(tmp_path: Path, server) -> None:
    files = {f"coco128/images/train2017/{n:03}.jpg": image_bytes(shade=n) for n in range(3)}
    files |= {f"coco128/labels/train2017/{n:03}.txt": f"{n} 0.5 0.5 0.2 0.2\n" for n in range(2)}
    files["__MACOSX/coco128/images/train2017/._000.txt"] = "litter"
    server.files["/coco128.zip"] = packed(tmp_path / "coco128.zip", files).read_bytes()
    config = public("coco128", [f"{server.url}/coco128.zip"])
    dataset = prepare(config, tmp_path / "cache")
    assert (len(dataset.names), dataset.names[0], dataset.names[-1]) == (80, "person", "toothbrush")
    assert dataset.splits["train"] == dataset.splits["val"]
    assert [len(sample.labels_of(80)) for sample in dataset.splits["train"]] == [1, 1, 0]
    asked = len(server.requests)
    assert prepare(config, tmp_path / "cache") == dataset
    assert len(server.requests) == asked


def test_names_of_coco() -> None:
    assert len(set(COCO_NAMES)) == 80
    # ids that everyone who looks at detections knows
    assert [COCO_NAMES[i] for i in (15, 16, 41, 60, 67)] == [
        "cat",
        "dog",
        "cup",
        "dining table",
        "cell phone",
    ]


def voc_archives(tmp_path: Path) -> list[bytes]:
    sets = [("VOC2007", {"trainval": ["000005", "000007"]}), ("VOC2007", {"test": ["000001"]}),
            ("VOC2012", {"trainval": ["2007_000027"]})]  # fmt: skip
    return [packed(tmp_path / f"{n}.tar", voc_files(*one)).read_bytes() for n, one in enumerate(sets)]


def test_voc(tmp_path: Path, server) -> None:
    for number, content in enumerate(voc_archives(tmp_path)):
        server.files[f"/{number}.tar"] = content
    dataset = prepare(public("voc", [f"{server.url}/{n}.tar" for n in range(3)]), tmp_path / "cache")
    stems = {split: [sample.image.stem for sample in samples] for split, samples in dataset.splits.items()}
    assert stems == {"train": ["000005", "000007", "2007_000027"], "val": ["000001"]}
    assert dataset.names == ("cat", "dog")


def test_voc_wants_all_archives_and_leaves_nothing(tmp_path: Path, server) -> None:
    archives = voc_archives(tmp_path)
    server.files["/0.tar"], server.files["/1.tar"] = archives[:2]
    with pytest.raises(DataError, match="no image set trainval of VOC2012"):
        prepare(public("voc", [f"{server.url}/{n}.tar" for n in range(2)]), tmp_path / "cache")
    with pytest.raises(SourceUnavailable):
        prepare(public("voc", [f"{server.url}/missing"]), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache/datasets").iterdir() if not path.name.endswith(".lock")]


def test_commands_need_no_torch(coco_set: Path, tmp_path: Path) -> None:

    code = (
        "import sys; from sparse_exp.data.__main__ import main\n"
        f"main(['convert', 'coco', {str(coco_set)!r}, {str(tmp_path / 'out')!r}])\n"
        f"main(['check', {str(tmp_path / 'out/data.yaml')!r}])\n"
        "assert not {'torch', 'sparseml', 'mlflow'} & set(sys.modules), 'imported'"
    )
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_of_two_processes_at_once_one_writes(coco_set, tmp_path):
    words = ["-m", "sparse_exp.data", "convert", "coco", str(coco_set), str(tmp_path / "out")]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([sys.executable, *words], **how) for _ in range(2)]
    said = {process.communicate(timeout=60)[0]: process.returncode for process in both}
    assert sorted(said.values()) == [0, 1]
    refused = next(text for text, code in said.items() if code)
    assert refused.count("\n") == 1
    assert "is being written by process" in refused or "out exists." in refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "out"]
    assert load_dataset(tmp_path / "out/data.yaml").names == ("cat", "dog")


def test_two_at_once_do_not_write_one_data_set(coco_set, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exclusive(tmp_path / ".out.lock", "The data set is being written"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with pytest.raises(ConfigError, match="out is being written by process"):
        main(["convert", "coco", str(coco_set), str(tmp_path / "out")])
    leave.set()
    thread.join()
    assert main(["convert", "coco", str(coco_set), str(tmp_path / "out")]) == 0
    assert not (tmp_path / ".out.lock").exists()
