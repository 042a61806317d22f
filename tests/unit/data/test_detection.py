from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_exp.data.detection import (
    PADDING,
    check_dataset,
    letterbox,
    load_dataset,
    read_boxes,
    read_image,
)
from sparse_exp.errors import DataError


def make_dataset(root: Path, yaml: str = "train: images/train\nval: images/val\nnames: [cat, dog]\n") -> Path:
    for split, colour in (("train", "red"), ("val", "blue")):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (40, 20), colour).save(root / "images" / split / "a.png")
        (root / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(yaml, encoding="utf-8")
    return root / "data.yaml"


def label(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "label.txt"
    path.write_text(text)
    return path


def test_load_dataset_pairs_images_with_labels(tmp_path: Path) -> None:
    root = tmp_path / "Bäume im Wald" / "images"  # neither spaces, umlauts nor an outer images/ matter
    dataset = load_dataset(make_dataset(root))
    assert dataset.name == "data"
    assert dataset.names == ("cat", "dog")
    assert list(dataset.splits) == ["train", "val"]
    (sample,) = dataset.splits["val"]
    assert sample.image == root / "images/val/a.png"
    assert sample.label == root / "labels/val/a.txt"
    assert check_dataset(dataset) == {"train": 1, "val": 1}


def test_names_as_map_path_elsewhere_and_lists(tmp_path: Path) -> None:
    root = tmp_path / "set"
    make_dataset(root)
    (root / "train.txt").write_text("./images/train/a.png\n\nimages/val/a.png\n")
    yaml = tmp_path / "other.yaml"
    yaml.write_text(
        "path: set\ntrain: train.txt\nval: [images/val]\ntest: [images/train, images/val]\nnc: 2\n"
        "names: {0: cat, 1: dog}\n"
    )
    dataset = load_dataset(yaml, "mine")
    assert (dataset.name, dataset.names) == ("mine", ("cat", "dog"))
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 2, "val": 1, "test": 2,
    }  # fmt: skip


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    first, second = (load_dataset(make_dataset(tmp_path / place)) for place in ("one", "two"))
    assert first.digest == second.digest
    (tmp_path / "two/labels/val/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert load_dataset(tmp_path / "two/data.yaml").digest != first.digest
    yaml = tmp_path / "one/data.yaml"
    yaml.write_text(yaml.read_text().replace("dog", "cow"))
    assert load_dataset(yaml).digest != first.digest


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\nval: images/val\n", "names of .*data.yaml to be a list of class names"),
        ("train: images/train\nval: images/val\nnames: {1: a}\n", "names of"),
        ("train: images/train\nval: images/val\nnames: [a]\nnc: 2\n", r"number of names \(1\), but got 2"),
        ("train: nowhere\nval: images/val\nnames: [a]\n", "split 'train' of .*nowhere"),
        ("train: labels/train\nval: images/val\nnames: [a]\n", "'train' .*at least one image"),
        ("train: images/train\nnames: [a]\n", "'val' .*at least one image"),
        ("train: list.txt\nval: images/val\nnames: [a]\n", r"list.txt:2.*missing.png"),
        ("- 1\n", "a map of keys"),
        ("a: [1\nb: {", "Cannot read the data yaml"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    path = make_dataset(tmp_path, yaml)
    (tmp_path / "list.txt").write_text("./images/train/a.png\nmissing.png\n")
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)


def test_missing_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"existing file, but got .*no\.yaml"):
        load_dataset(tmp_path / "no.yaml")


def test_read_boxes(tmp_path: Path) -> None:
    text = "0 0.5 0.5 0.2 0.4\n\n1 0.1 0.2 0.5 0.2 0.3 0.6\n0 0.95 0.5 0.2 1.0005\n"
    wanted = [
        [0, 0.5, 0.5, 0.2, 0.4],
        [1, 0.3, 0.4, 0.4, 0.4],  # the triangle (0.1, 0.2) (0.5, 0.2) (0.3, 0.6)
        [0, 0.925, 0.5, 0.15, 1.0],  # 0.85 to 1.05, clipped to 1
    ]
    np.testing.assert_allclose(read_boxes(label(tmp_path, text), 2), wanted, atol=1e-6)
    assert read_boxes(label(tmp_path, "\n"), 2).shape == (0, 5)
    assert read_boxes(tmp_path / "missing.txt", 2).shape == (0, 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "class x y w h"),
        ("0 0.1 0.1 0.2 0.2 0.3", "class x y w h"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "class x y w h"),
        ("cat 0.5 0.5 0.2 0.2", "only numbers, but got 'cat"),
        ("2 0.5 0.5 0.2 0.2", "a class id of 0..1"),
        ("-1 0.5 0.5 0.2 0.2", "a class id of 0..1"),
        ("0.5 0.5 0.5 0.2 0.2", "a class id of 0..1"),
        ("0 1.5 0.5 0.2 0.2", "coordinates in 0..1"),
        ("0 0.5 -0.01 0.2 0.2", "coordinates in 0..1"),
        ("0 nan 0.5 0.2 0.2", "coordinates in 0..1"),
        ("0 0.5 0.5 0 0.2", "a box wider and higher than 0"),
        ("0 0.1 0.1 0.2 0.1 0.3 0.1", "a box wider and higher than 0"),
    ],
)
def test_wrong_label_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"label\.txt:3 to be {message}") as caught:
        read_boxes(label(tmp_path, f"0 0.5 0.5 0.5 0.5\n\n{line}\n"), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_image_is_named(tmp_path: Path, damage: str) -> None:
    dataset = load_dataset(make_dataset(tmp_path))
    path = tmp_path / "images/train/a.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:2000], "empty": b"", "text": b"no image"}[damage])
    with pytest.raises(DataError, match=r"Cannot read the image .*images/train/a\.png") as caught:
        check_dataset(dataset)
    assert "\n" not in str(caught.value)


def test_check_dataset_names_bad_label(tmp_path: Path) -> None:
    dataset = load_dataset(make_dataset(tmp_path))
    (tmp_path / "labels/val/a.txt").write_text("7 0.5 0.5 0.5 0.5")
    with pytest.raises(DataError, match=r"labels/val/a\.txt:1"):
        check_dataset(dataset)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert (image.dtype, image.shape) == (np.uint8, (3, 5, 3))
    assert (image == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = Image.new("RGB", (64, 32))
    stored.paste((255, 255, 255), (0, 0, 32, 32))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: left becomes top
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "photo.jpg")
    assert image.shape == (64, 32, 3)
    assert image[:28].min() > 200
    assert image[36:].max() < 50


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    imgsz=st.sampled_from([64, 96, 320]),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_letterbox_maps_boxes_there_and_back(
    width: int, height: int, imgsz: int, shares: tuple[float, float, float, float]
) -> None:
    square, mapping = letterbox(np.full((height, width, 3), 200, np.uint8), imgsz)
    whole = np.array([[0, 0, width, height]], np.float32)
    # The picture is exactly where the mapping says that its border is, and all else is grey.
    rows, columns = np.nonzero(square[..., 0] == 200)
    pixels = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(mapping.boxes(whole)[0], pixels, atol=1e-3)
    assert (square[..., 0] == PADDING).sum() == imgsz**2 - len(rows)
    left, top, right, bottom = pixels
    assert max(right - left, bottom - top) == imgsz
    assert abs(left - (imgsz - right)) <= 1
    assert abs(top - (imgsz - bottom)) <= 1
    x1, x2 = sorted(shares[:2])
    y1, y2 = sorted(shares[2:])
    boxes = np.array([[x1, y1, x2, y2]], np.float32) * np.array([width, height] * 2, np.float32)
    np.testing.assert_allclose(mapping.boxes_back(mapping.boxes(boxes)), boxes, atol=1e-2)


def test_letterbox_as_upstream() -> None:
    # 1280 x 720 at 640 px: halved to 640 x 360, (640 - 360) / 2 = 140 grey rows above.
    _, mapping = letterbox(np.zeros((720, 1280, 3), np.uint8), 640)
    assert (mapping.scale_x, mapping.scale_y, mapping.left, mapping.top) == (0.5, 0.5, 0, 140)
    outside = np.array([[-10, 0, 700, 640]], np.float32)
    assert mapping.boxes_back(outside).tolist() == [[0, 0, 1280, 720]]
