"""Orientation tags, and annotations whose image is not where or how they say: boxes land where meant."""

from __future__ import annotations

import io
import json
import math
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_exp.data.__main__ import main
from sparse_exp.data.images import Frame, measure_image, read_frame, read_image, read_square
from sparse_exp.errors import DataError

FORMATS = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}
STORED, BOX = (60, 40), (6.0, 4.0, 30.0, 12.0)  # where the picture has a white patch


def picture() -> Image.Image:
    image = Image.new("RGB", STORED, "black")
    image.paste("white", tuple(map(int, BOX)))
    return image


def stored(kind: str, orientation: int) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpg" else {}
    picture().save(file, FORMATS[kind], exif=exif, **options)
    return file.getvalue()


def patch(pixels: np.ndarray) -> tuple[float, ...]:
    """x1, y1, x2, y2 of what is white."""
    ys, xs = np.nonzero(pixels[..., 0] > 127)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_once_in_every_format(tmp_path: Path, kind: str, orientation: int) -> None:
    content = stored(kind, orientation)
    (tmp_path / f"a.{kind}").write_bytes(content)
    pixels = read_image(tmp_path / f"a.{kind}")
    size = pixels.shape[1::-1]
    assert size == ((40, 60) if orientation >= 5 else (60, 40))
    assert measure_image(content, Path("a")) == size
    frame = read_frame(Path("a"), content)
    assert (frame.upright, frame.stored, frame.orientation) == (size, STORED, orientation)
    assert frame.turned(BOX) == pytest.approx(patch(pixels))
    square, mapping = read_square(tmp_path / f"a.{kind}", 60)
    assert mapping.size == size
    wanted = mapping.boxes(np.array([frame.turned(BOX)], np.float32))[0]
    np.testing.assert_allclose(patch(np.where(square == 114, 0, square)), wanted, atol=1)


def with_exif(*entries: tuple[int, int, bytes]) -> bytes:
    """A JPEG whose EXIF has these entries: tag, type, and four bytes, the value or where it is (38: 1/0)."""
    exif = b"II*\0" + struct.pack("<IH", 8, len(entries))
    exif += b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    exif = exif.ljust(38, b"\0") + struct.pack("<II", 1, 0)
    file = io.BytesIO()
    picture().save(file, "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ([(0x0112, 3, b"\x06\0\0\0"), (0x011A, 5, b"\x26\0\0\0")], (40, 60)),  # a resolution of 1/0
        ([(0x0112, 5, b"\x26\0\0\0")], (60, 40)),  # an orientation of 1/0
        ([(0x0112, 11, struct.pack("<f", math.nan))], (60, 40)),
        ([(0x0112, 11, struct.pack("<f", math.inf))], (60, 40)),
    ],
)
def test_numbers_in_metadata_that_are_none(tmp_path: Path, entries: list, size: tuple[int, int]) -> None:
    content = with_exif(*entries)
    (tmp_path / "a.jpg").write_bytes(content)
    assert measure_image(content, Path("a")) == size
    pixels = read_image(tmp_path / "a.jpg")
    assert pixels.shape[1::-1] == size
    frame = read_frame(tmp_path / "a.jpg")
    np.testing.assert_allclose(patch(pixels), frame.turned(BOX), atol=1)
    assert read_square(tmp_path / "a.jpg", 60)[1].size == size


@pytest.mark.parametrize("orientation", [0, 9, 70])
def test_orientations_that_do_not_exist_are_upright(orientation: int) -> None:
    assert read_frame(Path("a"), stored("jpg", orientation)) == Frame(STORED, 1)


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def coco(image: str, size: tuple[int, int], box: tuple[float, ...]) -> str:
    x1, y1, x2, y2 = box
    return json.dumps(
        {
            "images": [{"id": 1, "file_name": image, "width": size[0], "height": size[1]}],
            "categories": [{"id": 1, "name": "patch"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}],
        }
    )


def voc(size: tuple[int, int], box: tuple[float, ...], file_name: str = "") -> str:
    x1, y1, x2, y2 = box
    return (
        f"<annotation><filename>{file_name}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height></size><object><name>patch</name><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>"
    )


def converted(kind: str, source: Path) -> dict[str, list[list[float]]]:
    """The boxes of each image, x1, y1, x2, y2 as shares."""
    out = source.with_name("out")
    assert main(["convert", kind, str(source), str(out)]) == 0
    found = {}
    for label in out.glob("labels/train/*.txt"):
        rows = np.loadtxt(label, ndmin=2).reshape(-1, 5)[:, 1:]
        corners = np.concatenate([rows[:, :2] - rows[:, 2:] / 2, rows[:, :2] + rows[:, 2:] / 2], 1)
        found[label.stem] = corners.tolist()
    return found


@pytest.mark.parametrize("kind", ["coco", "voc"])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize(
    ("orientation", "drawn"),
    [
        *(
            (orientation, drawn)
            for orientation in (1, 3, 6, 7, 8)
            for drawn in ("upright", "unsaid", "scaled")
        ),
        *((orientation, drawn) for orientation in (6, 7, 8) for drawn in ("stored", "stored, scaled")),
        (1, "swapped"),
    ],
)
def test_boxes_of_turned_photos_land_on_what_they_show(
    tmp_path: Path, kind: str, suffix: str, orientation: int, drawn: str
) -> None:
    frame = Frame(STORED, orientation)
    upright, box = frame.upright, frame.turned(BOX)
    size = {"unsaid": (0, 0), "stored": STORED, "swapped": upright[::-1]}.get(drawn.split(",")[0], upright)
    on_it = BOX if drawn.startswith("stored") else box
    if drawn.endswith("scaled"):
        size, on_it = (2 * size[0], 2 * size[1]), tuple(2 * edge for edge in on_it)
    note = {"coco": coco(f"a.{suffix}", size, on_it), "voc": voc(size, on_it)}[kind]
    files = {
        f"train/a.{suffix}": stored(suffix, orientation),
        f"train/a.{'json' if kind == 'coco' else 'xml'}": note,
    }
    (found,) = converted(kind, put(tmp_path / "in", files))["a"]
    (image,) = (tmp_path / "out/images/train").iterdir()
    width, height = upright
    wanted = np.array(patch(read_image(image))) / [width, height, width, height]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_annotations_belong_to_the_image_of_their_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them name one image, as a tool wrote that copied a template."""
    image = stored("png", 1)
    left, right = (6, 4, 30, 12), (40, 4, 50, 12)
    files = {
        "a.png": image, "a.xml": voc(STORED, left, "a.png"),
        "b.png": image, "b.xml": voc(STORED, right, "a.png"),
        "c.xml": voc(STORED, right, "b.png"),  # its image is missing, and b has its own annotations
        "d.xml": voc(STORED, left, "e.png"), "e.png": image,  # nothing else is said of e
        "f.xml": voc(STORED, left, "h.png"), "g.xml": voc(STORED, right, "h.png"), "h.png": image,  # which?
    }  # fmt: skip
    found = converted("voc", put(tmp_path / "in", files))
    pixels = {name: np.round(np.multiply(rows, [60, 40, 60, 40])).tolist() for name, rows in found.items()}
    assert pixels == {"a": [list(left)], "b": [list(right)], "e": [list(left)]}
    assert "2 annotations that name an image as others do" in capsys.readouterr().out


def test_accents_may_be_stored_apart_from_their_letters(tmp_path: Path) -> None:
    name = "Bäume.png"
    note = coco(unicodedata.normalize("NFC", name), STORED, BOX)
    files = {f"images/{unicodedata.normalize('NFD', name)}": stored("png", 1), "instances_train.json": note}
    assert [len(rows) for rows in converted("coco", put(tmp_path / "in", files)).values()] == [1]


@pytest.mark.parametrize("dest", [".", "inside/it", "..", "link"])
@pytest.mark.parametrize("force", [True, False])
def test_a_destination_at_its_source_is_refused(tmp_path: Path, dest: str, force: bool) -> None:
    files = {
        "a.png": stored("png", 1),
        "a.xml": voc(STORED, BOX),
        "data.yaml": "names: [a]",
        "notes.txt": "mine",
    }
    source = put(tmp_path / "around/set", files)
    (source.parent / "data.yaml").write_text("names: [a]")
    (tmp_path / "link").symlink_to(source)
    place = tmp_path / "link" if dest == "link" else source / dest
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"DEST to be apart from .*neither inside nor around it"):
        main(["convert", "voc", str(source), str(place), *(["--force"] if force else [])])
    assert sorted(tmp_path.rglob("*")) == before
    zipped = tmp_path / "around/set.zip"
    zipped.write_bytes(b"")
    with pytest.raises(DataError, match="neither inside nor around"):  # the archive lies in it
        main(["convert", "voc", str(zipped), str(tmp_path / "around"), "--force"])
