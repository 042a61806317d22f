from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_exp.config.schema import DatasetConfig, SourceConfig
from sparse_exp.data import digits, is_prepared, prepare, trees
from sparse_exp.data.detection import DetectionDataset, check_dataset, load_dataset
from sparse_exp.data.images import read_image
from sparse_exp.data.labels import read_boxes
from sparse_exp.errors import DataError

WIDTH, HEIGHT = 1500, 700
TREES = [(10, 20, 60, 80), (600, 300, 660, 360), (830, 10, 850, 30), (1300, 400, 1350, 460)]
TREES_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"


def coordinate_photo(width: int, height: int) -> Image.Image:
    """Each pixel's colour tells where it is."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], -1).astype(np.uint8))


def place_of(pixel: np.ndarray) -> tuple[int, int]:
    red, green, blue = (int(value) for value in pixel)
    return red + blue // 16 * 256, green + blue % 16 * 256


def voc(boxes: list[tuple[int, int, int, int]]) -> str:
    items = (
        f"<object><name>Dead</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for a, b, c, d in boxes
    )
    return f"<annotation>{''.join(items)}</annotation>"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "deepforest.whl"
    stems = [photo.stem for photo in trees.PHOTOS]
    with zipfile.ZipFile(path, "w") as wheel:
        for stem in [*stems, *trees.TEST_PHOTOS]:
            size = (WIDTH, HEIGHT) if stem in stems else (400, 400)
            png = io.BytesIO()
            coordinate_photo(*size).save(png, "png")
            wheel.writestr(f"deepforest/data/{stem}.png", png.getvalue())
            wheel.writestr(f"deepforest/data/{stem}.xml", voc(TREES if stem in stems else TREES[:1]))
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def columns_and_boxes(dataset: DetectionDataset, split: str) -> tuple[set[tuple[str, int]], list]:
    columns, boxes = set(), []
    for image_path, label_path, *_ in dataset.splits[split]:
        image = read_image(image_path)
        x, y = place_of(image[0, 0])
        assert place_of(image[-1, -1]) == (x + image.shape[1] - 1, y + image.shape[0] - 1)
        photo = image_path.stem[:16]
        columns |= {(photo, column) for column in range(x, x + image.shape[1])}
        for _, cx, cy, w, h in read_boxes(label_path, 1) * 320.0:
            boxes.append((x + cx - w / 2, y + cy - h / 2, x + cx + w / 2, y + cy + h / 2))
    return columns, boxes


def test_trees_split_shares_no_pixel(archive: Path, tmp_path: Path) -> None:
    dataset = load_dataset(trees.materialize(archive, tmp_path / "trees"))
    train, train_boxes = columns_and_boxes(dataset, "train")
    val, val_boxes = columns_and_boxes(dataset, "val")
    for photo in {photo for photo, _ in train | val}:
        last = max(column for name, column in train if name == photo)
        first = min(column for name, column in val if name == photo)
        assert first - last - 1 >= trees.GAP
        assert max(column for name, column in val if name == photo) == WIDTH - 1
    assert {photo for photo, _ in train} == {photo for photo, _ in val}
    # A label put back on the photo is one of its trees, or the part of one that the tile shows.
    for x1, y1, x2, y2 in train_boxes + val_boxes:
        assert any(
            a - 0.01 <= x1 and b - 0.01 <= y1 and x2 <= c + 0.01 and y2 <= d + 0.01 for a, b, c, d in TREES
        )
        assert min(x2 - x1, y2 - y1) >= 4
    found = {tuple(round(value) for value in box) for box in train_boxes + val_boxes}
    assert {TREES[0], TREES[1], TREES[3]} <= found
    assert check_dataset(dataset)["test"] == 2


def test_trees_are_the_same_bytes_and_built_once(archive: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        trees.materialize(archive, tmp_path / place)
    content = files(tmp_path / "one")
    assert content == files(tmp_path / "two")
    assert {"ATTRIBUTION.txt", "LICENSE-deepforest", "data.yaml"} <= set(content)
    archive.unlink()  # intact: not needed again
    assert trees.materialize(archive, tmp_path / "one") == tmp_path / "one/data.yaml"
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_a_damaged_set_is_built_again(archive: Path, tmp_path: Path) -> None:
    place = tmp_path / "trees"
    trees.materialize(archive, place)
    content = files(place)
    next(iter(place.rglob("*.png"))).write_bytes(b"")
    trees.materialize(archive, place)
    assert files(place) == content


def test_wrong_archive_leaves_nothing(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.whl"
    with zipfile.ZipFile(wrong, "w") as bundle:
        bundle.writestr("a", "b")
    for content in (wrong.read_bytes(), b"no zip"):
        wrong.write_bytes(content)
        with pytest.raises(DataError, match=r"wrong\.whl.*deepforest wheel"):
            trees.materialize(wrong, tmp_path / "sets/trees")
    assert [path for path in (tmp_path / "sets").iterdir() if not path.name.endswith(".lock")] == []


def test_clip_boxes_keeps_what_shows_enough() -> None:
    # A box of 20 x 20 whose left part hangs out of the tile at 100, 100 by 8, 11, 12, 13 px.
    boxes = [(100.0 - out, 150.0, 120.0 - out, 170.0) for out in (8, 11, 12, 13)]
    assert trees.clip_boxes(boxes, 100, 100) == [(0, 50, 12, 70), (0, 50, 9, 70), (0, 50, 8, 70)]
    assert trees.clip_boxes([(110.0, 110.0, 113.0, 150.0)], 100, 100) == []  # 3 px wide
    assert trees.clip_boxes([(500.0, 110.0, 550.0, 150.0)], 100, 100) == []


def test_digits_are_deterministic_and_do_not_overlap(tmp_path: Path) -> None:
    one = digits.materialize(tmp_path / "one")
    digits.materialize(tmp_path / "two")
    other = digits.materialize(tmp_path / "other", seed=1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    dataset = load_dataset(one)
    assert load_dataset(other).digest != dataset.digest
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 24, "val": 8, "test": 8,
    }  # fmt: skip
    assert dataset.names == tuple("0123456789")
    for image_path, label_path, *_ in dataset.splits["train"]:
        image, count = read_image(image_path), np.zeros((96, 96), int)
        boxes = read_boxes(label_path, 10)
        assert 2 <= len(boxes) <= 5
        for _, cx, cy, w, h in boxes * 96:
            x1, y1, x2, y2 = (round(edge) for edge in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
            count[y1:y2, x1:x2] += 1
            ink = image[y1:y2, x1:x2].max(-1) > 70  # noise stays below
            assert ink.any(0)[[0, -1]].all()
            assert ink.any(1)[[0, -1]].all()  # the box is tight
        assert count.max() == 1
        assert (image[count == 0] <= 70).all()


def test_prepare_digits(tmp_path: Path) -> None:
    config = DatasetConfig(name="digits", generator="digits")
    assert not is_prepared(config, tmp_path)
    dataset = prepare(config, tmp_path)
    assert dataset.name == "digits"
    assert is_prepared(config, tmp_path)
    assert prepare(config, tmp_path) == dataset


def test_prepare_trees_needs_its_source_once(archive: Path, tmp_path: Path) -> None:
    config = DatasetConfig(name="trees", generator="trees", sources=[SourceConfig(uri=str(archive))])
    cache = tmp_path / "cache"
    dataset = prepare(config, cache)
    archive.unlink()
    assert is_prepared(config, cache)
    assert prepare(config, cache) == dataset


def test_prepare_path(tmp_path: Path) -> None:
    config = DatasetConfig(
        name="mine", path=str(digits.materialize(tmp_path / "set", train=1, val=1, test=0))
    )
    assert is_prepared(config, tmp_path / "cache")
    assert list(prepare(config, tmp_path / "cache").splits) == ["train", "val"]
    assert not list((tmp_path / "set").glob("**/*cache*"))  # what is remembered lies elsewhere
    assert list((tmp_path / "cache").rglob("*.json"))
    config.path = str(tmp_path / "no.yaml")
    assert not is_prepared(config, tmp_path)


def test_prepare_does_as_on_corrupt_says(tmp_path: Path) -> None:
    yaml = digits.materialize(tmp_path / "set", train=3, val=1, test=0)
    (yaml.parent / "images/train/001.png").write_bytes(b"no image")
    config = DatasetConfig(name="mine", path=str(yaml))
    with pytest.raises(DataError, match=r"001\.png: its content is no image.*on_corrupt=skip"):
        prepare(config, tmp_path / "cache")
    config.on_corrupt = "skip"
    dataset = prepare(config, tmp_path / "cache")
    assert [sample.image.stem for sample in dataset.splits["train"]] == ["000", "002"]


def test_prepare_without_path_or_generator(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a path nor a known generator.*dataset\.path"):
        prepare(DatasetConfig(name="mine"), tmp_path)


@pytest.mark.slow
def test_real_trees(tmp_path: Path) -> None:
    from sparse_exp.sources.cache import cache_directory, fetch

    source = SourceConfig(uri="index:deepforest==2.1.0", sha256=TREES_SHA256)
    wheel = fetch(source, cache_directory())
    dataset = load_dataset(trees.materialize(wheel.path, tmp_path / "one"))
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 108, "val": 24, "test": 2,
    }  # fmt: skip
    assert check_dataset(dataset) == {"train": 1332, "val": 403, "test": 98}
    assert dataset.digest == load_dataset(trees.materialize(wheel.path, tmp_path / "two")).digest
