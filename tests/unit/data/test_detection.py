from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_exp.data.detection import Sample, check_dataset, evenly_spread, load_dataset
from sparse_exp.data.images import read_image
from sparse_exp.data.labels import read_boxes
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


def test_digest_follows_what_numbers_behind_a_box_mean(tmp_path: Path) -> None:
    yaml = make_dataset(tmp_path)
    for label in (tmp_path / "labels").rglob("*.txt"):
        label.write_text("0 .5 .5 .2 .2 .45 .5 .55 .5\n")
    yaml.write_text(f"{yaml.read_text()}\nkpt_shape: null\n")
    before = load_dataset(yaml)
    yaml.write_text(yaml.read_text().replace("kpt_shape: null", "kpt_shape: [2, 2]"))
    assert load_dataset(yaml).digest != before.digest


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
    yaml, path = make_dataset(tmp_path), tmp_path / "images/train/a.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:2000], "empty": b"", "text": b"no image"}[damage])
    with pytest.raises(DataError, match=r"Cannot read the image .*images/train/a\.png") as caught:
        load_dataset(yaml)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"P6 1 1 255 abc"]
)
def test_formats_that_pillow_starts_programs_for_are_no_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(DataError, match="its content is no image"):
        read_image(tmp_path / "photo.jpg")


def test_bad_label_is_named(tmp_path: Path) -> None:
    yaml = make_dataset(tmp_path)
    (tmp_path / "labels/val/a.txt").write_text("7 0.5 0.5 0.5 0.5")
    with pytest.raises(DataError, match=r"labels/val/a\.txt:1"):
        load_dataset(yaml)


def make_many(root: Path, count: int = 30) -> Path:
    """Ten-pixel images, three of which cannot be used: one damaged, one with a class too high, one gone."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for index in range(count):
        Image.new("RGB", (10, 10), (index, 0, 0)).save(root / f"images/{index:02}.png")
        (root / f"labels/{index:02}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (root / "images/03.png").write_bytes((root / "images/03.png").read_bytes()[:40])
    (root / "labels/07.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n")
    (root / "images/09.png").unlink()
    listed = "".join(f"./images/{index:02}.png\n" for index in range(count - 5))
    (root / "train.txt").write_text(listed)
    (root / "val.txt").write_text("".join(f"./images/{index:02}.png\n" for index in range(count - 5, count)))
    (root / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [a]\n")
    return root / "data.yaml"


def test_corrupt_files_are_refused_in_one_line(tmp_path: Path) -> None:
    yaml = make_many(tmp_path / "mein Satz")
    with pytest.raises(DataError) as caught:
        load_dataset(yaml)
    message = str(caught.value)
    assert "\n" not in message
    assert "train.txt:10" in message  # the one that is not there
    assert "3 of 30 images cannot be used" in message
    assert "dataset.on_corrupt=skip" in message
    assert f"python -m sparse_exp.data check '{yaml}'" in message


def test_corrupt_files_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = load_dataset(make_many(tmp_path / "set"), cache=tmp_path / "cache", on_corrupt="skip")
    stems = [sample.image.stem for sample in dataset.splits["train"]]
    assert stems == [f"{index:02}" for index in range(25) if index not in (3, 7, 9)]
    assert (dataset.skipped, check_dataset(dataset)) == (3, {"train": 22, "val": 5})
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "3 of 30" in record.message
    assert all(name in record.message for name in ("03.png", "07.png", "09.png"))
    # A pure function of the files: from the cache, without it, and of what is left alone.
    again = load_dataset(tmp_path / "set/data.yaml", cache=tmp_path / "cache", on_corrupt="skip")
    assert again == dataset == load_dataset(tmp_path / "set/data.yaml", on_corrupt="skip")
    for stem in ("03", "07", "09"):
        listing = tmp_path / "set/train.txt"
        listing.write_text(listing.read_text().replace(f"./images/{stem}.png\n", ""))
    assert load_dataset(tmp_path / "set/data.yaml").digest == dataset.digest


def test_a_split_that_is_corrupt_throughout_is_refused(tmp_path: Path) -> None:
    yaml = make_dataset(tmp_path)
    (tmp_path / "images/val/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'val' .*at least one image"):
        load_dataset(yaml, on_corrupt="skip")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert (image.dtype, image.shape) == (np.uint8, (3, 5, 3))
    assert (image == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "bmp", "webp", "tif", "tiff"])
def test_every_format_is_listed_and_read(tmp_path: Path, suffix: str) -> None:
    yaml, path = make_dataset(tmp_path), tmp_path / f"images/train/deep/er/b.c.{suffix}"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (16, 8), (200, 30, 90)).save(path)
    label = tmp_path / "labels/train/deep/er/b.c.txt"
    label.parent.mkdir(parents=True)
    label.write_text("0 0.5 0.5 0.5 0.5")
    samples = load_dataset(yaml).splits["train"]
    assert [sample[:2] for sample in samples][1] == (path, label)
    np.testing.assert_allclose(read_image(path).reshape(-1, 3).mean(0), (200, 30, 90), atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, suffix: str) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    wanted = np.repeat((deep // 256).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(read_image(tmp_path / f"deep.{suffix}"), wanted)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"ink.{suffix}")  # magenta and yellow: red
    red, green, blue = read_image(tmp_path / f"ink.{suffix}").reshape(-1, 3).mean(0)
    assert red > 230
    assert max(green, blue) < 25


def test_images_of_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif.*8 or 16 bits"):
        read_image(tmp_path / "float.tif")


def test_labels_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "label.txt"
    path.write_bytes(b"\xef\xbb\xbf0 0.5 0.5 0.2 0.4\r\n\r\n1 0.5 0.5 0.25 0.5\r\n")
    np.testing.assert_allclose(read_boxes(path, 2), [[0, 0.5, 0.5, 0.2, 0.4], [1, 0.5, 0.5, 0.25, 0.5]])


def test_yaml_and_lists_of_windows(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    yaml = "names: {'1': dog, '0': cat}\r\ntrain: liste.txt\r\nval: images/val\r\n"
    (tmp_path / "data.yaml").write_bytes(b"\xef\xbb\xbf" + yaml.encode())
    (tmp_path / "liste.txt").write_bytes(b"\xef\xbb\xbfimages\\train\\a.png\r\n")
    dataset = load_dataset(tmp_path / "data.yaml")
    assert dataset.names == ("cat", "dog")
    assert dataset.splits["train"][0].image == tmp_path / "images/train/a.png"


def test_nothing_in_a_yaml_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    code = f"train: images/train\nval: images/val\nnames: [a, b]\ndownload: |\n  open({str(trace)!r}, 'w')\n"
    load_dataset(make_dataset(tmp_path / "one", code))
    hostile = f"names: !!python/object/apply:os.mkdir [{str(trace)!r}]\n"
    with pytest.raises(DataError, match="Cannot read the data yaml"):
        load_dataset(make_dataset(tmp_path / "two", hostile))
    assert not trace.exists()


def test_path_from_the_yaml_or_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "work/sets/mine")
    (tmp_path / "configs").mkdir()
    yaml = tmp_path / "configs/data.yaml"
    yaml.write_text("path: sets/mine\ntrain: images/train\nval: images/val\nnames: [a, b]\n")
    with pytest.raises(DataError, match=r"'sets/mine' is neither in the yaml's folder nor in "):
        load_dataset(yaml)
    monkeypatch.chdir(tmp_path / "work")
    assert load_dataset(yaml).root == tmp_path / "work/sets/mine"
    make_dataset(tmp_path / "configs/sets/mine")
    assert load_dataset(yaml).root == tmp_path / "configs/sets/mine"  # the yaml's own folder first


def test_splits_as_labelling_services_export_them(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    yaml = make_dataset(tmp_path / "set", "train: ../images/train\nval: ../images/val\nnames: [a, b]\n")
    assert load_dataset(yaml).splits["val"][0].image == tmp_path / "set/images/val/a.png"


def test_only_the_last_images_becomes_labels(tmp_path: Path) -> None:
    dataset = load_dataset(make_dataset(tmp_path / "images/images/x"))
    assert dataset.splits["val"][0].label == tmp_path / "images/images/x/labels/val/a.txt"


def test_litter_and_linked_folders(tmp_path: Path) -> None:
    yaml = make_dataset(tmp_path / "set")
    (tmp_path / "set/images/train/._a.png").write_bytes(b"of another system")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/images/train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "set/images/train")  # must not go on for ever
    names = [sample.image.name for sample in load_dataset(yaml).splits["train"]]
    assert names == ["a.png", "b.png"]


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


@pytest.mark.parametrize(
    ("there", "count", "taken"),
    [(6, 3, [0, 2, 5]), (9, 5, [0, 2, 4, 6, 8]), (2, 3, [0, 1]), (5, 1, [0]), (1, 1, [0]), (0, 3, [])],
)
def test_samples_spread_evenly_over_a_split(there, count, taken):
    samples = [Sample(Path(f"{number}.png"), Path(f"{number}.txt")) for number in range(there)]
    assert [samples.index(sample) for sample in evenly_spread(samples, count)] == taken
