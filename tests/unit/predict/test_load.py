"""``from sparse_exp import load``: the detector for those who call it from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from standin import SIDE, write_cells_detector, write_detector

import sparse_exp
from sparse_exp import Detection, Detections, Detector, load
from sparse_exp.errors import ConfigError, DataError, EngineError, SparseExpError

CAR = (20, 10, 12)  # RGB: a car with the centre (20, 10), 12 wide and 16 high


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_detector(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def detector(file):
    with load(file, engine="onnxruntime", cores=1, batch_size=2) as running:
        yield running


def image(colour=CAR, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def same(found: Detections, wanted: Detections) -> bool:
    return found.size == wanted.size and list(found) == list(wanted)


def test_boxes_scores_and_classes_in_pixels_of_the_image(detector):
    found = detector(image(width=64, height=64))  # scaled by a half
    assert (len(found), found.size) == (2, (64, 64))
    np.testing.assert_allclose(found.boxes, [[28, 4, 52, 36], [24, 24, 40, 40]], atol=1e-3)
    np.testing.assert_allclose(found.scores, [0.9, 0.5])
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    assert (found.class_ids.tolist(), found.class_names) == ([1, 0], ("car", "tree"))
    first = next(iter(found))
    assert isinstance(first, Detection)
    assert (first.box, first.class_id, first.class_name) == (tuple(found.boxes[0]), 1, "car")
    assert first.score == pytest.approx(0.9)


def test_a_path_a_picture_and_an_array_alike(detector, tmp_path):
    pixels = image(width=64, height=48)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    wanted = detector(pixels)
    assert len(wanted) == 2
    for other in (
        tmp_path / "a.png", str(tmp_path / "a.png"), picture, picture.convert("RGBA"),
        Image.open(tmp_path / "a.png"), np.ascontiguousarray(pixels[..., ::-1])[..., ::-1],
    ):  # fmt: skip
        assert same(detector(other), wanted)


def test_a_list_gives_a_list_in_order_whatever_the_batch(detector, file):
    colours = [(20, 10, 12), (12, 20, 6), (8, 8, 4), (16, 24, 10), (20, 20, 20)]
    images = [image(colour, width=32 + 8 * number) for number, colour in enumerate(colours)]
    found = detector(images)
    assert [one.size for one in found] == [(32 + 8 * number, 32) for number in range(5)]
    assert all(same(one, detector(alone)) for one, alone in zip(found, images, strict=True))
    assert not same(found[0], found[1])
    assert detector([]) == []
    assert [len(one) for one in detector((images[0], Image.fromarray(images[1])))] == [2, 2]
    with load(file, engine="onnxruntime", cores=1) as single:
        assert all(same(*both) for both in zip(found, single(images), strict=True))


def test_a_photo_lies_upright(detector, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter when shown
    Image.fromarray(image(width=64, height=32)).save(tmp_path / "a.jpg", exif=exif)
    from_file, from_picture = detector([tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")])
    assert from_file.size == from_picture.size == (32, 64)


def test_thresholds(file, detector):
    def scores(**thresholds) -> list[float]:
        with load(file, engine="onnxruntime", cores=1, **thresholds) as one:
            return one(image()).scores.tolist()

    assert scores(conf=0.6) == pytest.approx([0.9])
    assert scores(max_det=1) == pytest.approx([0.9])
    assert scores(conf=1.0) == []
    assert len(detector(image())) == 2


def test_several_threads_may_call_it(file):
    images = [image((x, 12, 10)) for x in range(8, 24)]
    with load(file, engine="onnxruntime", cores=2, streams=2) as one, ThreadPoolExecutor(4) as pool:
        alone = [one(pixels) for pixels in images]
        assert all(same(*both) for both in zip(pool.map(one, images), alone, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Path("nowhere.jpg"), "nowhere.jpg"),
        (np.zeros((32, 32), np.uint8), r"uint8 \(H, W, 3\)"),
        (np.zeros((32, 32, 3), np.float32), r"float32 \(32, 32, 3\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), "give several images as a list"),
        (np.zeros((0, 32, 3), np.uint8), r"\(0, 32, 3\)"),
        (Image.new("F", (8, 8)), "unknown range"),
        (None, "but got 'NoneType'"),
    ],
)
def test_what_is_no_image_is_one_line(detector, wrong, said):
    with pytest.raises(DataError, match=said) as caught:
        detector(wrong)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_one_line(detector, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    for damaged in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
        with pytest.raises(DataError, match=r"Cannot read the image .*a\.jpg"):
            detector(damaged)


@pytest.mark.parametrize(
    ("name", "options", "kind", "said"),
    [
        ("model.onnx", {"conf": 1.5}, ConfigError, r"conf to be in 0\.\.1, but got 1\.5"),
        ("model.onnx", {"iou": -1}, ConfigError, "iou to be"),
        ("model.onnx", {"max_det": 0}, ConfigError, "max_det to be at least 1"),
        ("model.onnx", {"batch_size": 0}, ConfigError, "batch_size"),
        ("model.onnx", {"engine": "tvm"}, EngineError, "one of deepsparse"),
        ("model.onnx", {"engine": "torch"}, EngineError, "torch runs checkpoints"),
        ("nowhere.onnx", {}, ConfigError, "Expected MODEL to be"),
        ("zoo:yolov5-s-nothing-pruned75", {"zoo": "."}, SparseExpError, "not in the local zoo"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(file, monkeypatch, name, options, kind, said):
    monkeypatch.chdir(file.parent)
    with pytest.raises(kind, match=said) as caught:
        load(name, **{"engine": "onnxruntime", **options})
    assert "\n" not in str(caught.value)


def test_a_closed_detector_says_so(file):
    detector = load(file, engine="onnxruntime", cores=1)
    detector.close()
    detector.close()
    with pytest.raises(EngineError, match="closed"):
        detector(image())


def test_the_package_offers_it_and_is_light():
    assert sparse_exp.load is load
    assert sparse_exp.Detector is Detector
    assert Path(sparse_exp.__file__).with_name("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        sparse_exp.lod
    code = "import sys, sparse_exp; print([m for m in ('numpy', 'PIL', 'torch') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"


def test_a_wide_picture_in_a_square_and_in_a_rectangle(file, tmp_path):
    """Boxes are in pixels of the picture, by hand: the detector says them in those of what it is given."""
    wide = write_detector(tmp_path / "wide.onnx", size=(64, 128))
    with load(wide, engine="onnxruntime", cores=1) as running:
        assert running.model.imgsz == (64, 128)
        # 256 x 72 px fit 128 x 64 px by a half: 128 x 36, 14 rows of grey above. A car at (20, 30), 12 wide.
        found = running(image((20, 30, 12), width=256, height=72))
        np.testing.assert_allclose(found.boxes[0], [28, 16, 52, 48], atol=1e-3)
        assert found.size == (256, 72)
        # 64 x 128 px by a half: 32 x 64, 48 columns of grey on the left; a car at (60, 30).
        np.testing.assert_allclose(
            running(image((60, 30, 12), 64, 128)).boxes[0], [12, 44, 36, 76], atol=1e-3
        )
    with load(
        file, engine="onnxruntime", cores=1
    ) as square:  # 256 x 72 px by an eighth: 32 x 9, 11 rows of grey
        car = square(image((20, 15, 12), width=256, height=72)).boxes[0]
        np.testing.assert_allclose(car, [112, 0, 208, 72], atol=1e-3)


def test_a_rectangle_finds_what_a_square_finds(tmp_path):
    picture = np.zeros((144, 256, 3), np.uint8)  # 16:9; by a half 128 x 72 px
    for row, column, colour in ((0, 0, (250, 20, 12)), (50, 100, (240, 8, 30)), (112, 224, (230, 10, 10))):
        picture[row : row + 32, column : column + 32] = colour
    found = []
    for number, size in enumerate([(128, 128), (96, 128)]):
        file = write_cells_detector(tmp_path / f"{number}.onnx", size)
        with load(file, engine="onnxruntime", cores=1, conf=0.6) as running:
            found.append(running(picture))
    square, rectangle = found
    assert len(square) >= 3
    np.testing.assert_allclose(rectangle.boxes, square.boxes, atol=1e-4)
    np.testing.assert_allclose(rectangle.scores, square.scores, atol=1e-6)
