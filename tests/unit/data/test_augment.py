from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from sparse_exp.config.imgsz import Sides
from sparse_exp.config.schema import AugmentConfig
from sparse_exp.data.augment import (
    Example,
    augment_example,
    crop_window,
    jitter_colours,
    mix,
    paste_objects,
    turn,
)
from sparse_exp.data.letterbox import PADDING

SIZE = 64
SQUARE = Sides(SIZE, SIZE)
OFF = {"mosaic": 0, "scale": 0, "translate": 0, "fliplr": 0, "flipud": 0, "transpose": 0, "jitter": 0}


def lit(x1: int, y1: int, x2: int, y2: int, class_id: int = 3) -> Example:
    """A black image with one white rectangle, which is its box."""
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    return Example(
        image, torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), torch.tensor([float(class_id)])
    )


def dark() -> Example:
    return Example(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0))


def bright_box(image: Tensor) -> list[int]:
    rows, columns = torch.nonzero(image[0] > 185, as_tuple=True)  # half way from grey padding to white
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("others", [0, 3])
def test_boxes_follow_pixels(others: int) -> None:
    config = AugmentConfig(
        scale=0.5, translate=0.3, fliplr=0.5, flipud=0.5, transpose=0.5, jitter=0.0
    )  # fmt: skip
    kept = 0
    for seed in range(200):
        example = lit(10, 20, 34, 60)
        result = augment_example([example] + [dark()] * others, config, np.random.default_rng(seed))
        assert result.image.shape == (3, SIZE, SIZE)
        assert len(result.boxes) == len(result.classes)
        if len(result.boxes):
            kept += 1
            assert result.classes.tolist() == [3]
            np.testing.assert_allclose(result.boxes[0], bright_box(result.image), atol=1.0)
            assert result.boxes.min() >= 0
            assert result.boxes.max() <= SIZE
    assert kept > 50


def test_nothing_switched_on_changes_nothing() -> None:
    example = lit(10, 20, 34, 60)
    result = augment_example([example], AugmentConfig(**OFF), np.random.default_rng(0))
    assert all(map(torch.equal, result[:3], example[:3]))


@pytest.mark.parametrize(
    ("switch", "box"),
    [("fliplr", [54, 20, 60, 30]), ("flipud", [4, 34, 10, 44]), ("transpose", [20, 4, 30, 10])],
)
def test_single_flips(switch: str, box: list[int]) -> None:
    config = AugmentConfig(**{**OFF, switch: 1.0})
    result = augment_example([lit(4, 20, 10, 30)], config, np.random.default_rng(0))
    assert result.boxes.tolist() == [box]
    assert bright_box(result.image) == box


def test_mosaic_holds_four_pictures() -> None:
    pictures = [
        Example(torch.full((3, SIZE, SIZE), value, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0))
        for value in (10, 20, 30, 40)
    ]
    result = augment_example(pictures, AugmentConfig(**OFF), np.random.default_rng(3)).image[0]
    corners = [int(result[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]
    assert corners == [10, 20, 30, 40]


def test_window_outside_is_grey_and_drops_what_hardly_shows() -> None:
    # The window starts at 20, 0. Of 40 px wide boxes 4 px (10 %) and 8 px (20 %) are left.
    first, second = lit(0, 0, 24, 40), lit(0, 0, 28, 40, class_id=5)
    first.boxes[0, 0], second.boxes[0, 0] = -16, -12
    assert len(crop_window([(first, (0, 0))], 20, 0, SQUARE, SQUARE).boxes) == 0
    result = crop_window([(second, (0, 0))], 20, 0, SQUARE, SQUARE)
    assert result.boxes.tolist() == [[0, 0, 8, 40]]
    assert (result.image[:, :, SIZE - 20 :] == PADDING).all()
    assert (result.image[:, :, : SIZE - 20] != PADDING).all()


def test_classes_stay_with_their_boxes() -> None:
    gone, stays = lit(0, 0, 10, 10, class_id=1), lit(30, 30, 50, 50, class_id=2)
    both = Example(stays.image, torch.cat([gone.boxes, stays.boxes]), torch.tensor([1.0, 2.0]))
    result = crop_window([(both, (0, 0))], 20, 20, SQUARE, SQUARE)
    assert (result.boxes.tolist(), result.classes.tolist()) == ([[10, 10, 30, 30]], [2])


def test_tiny_boxes_are_dropped() -> None:
    example = lit(10, 10, 13, 40)
    assert len(crop_window([(example, (0, 0))], 0, 0, SQUARE, SQUARE).boxes) == 1
    assert (
        len(crop_window([(example, (0, 0))], 0, 0, Sides(2 * SIZE, 2 * SIZE), SQUARE).boxes) == 0
    )  # 1.5 px wide


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_jitter_agrees_with_torchvision(kind: str, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(90, 170, (3, 16, 24), generator=generator, dtype=torch.uint8)  # nothing clips
    wanted = getattr(v2, f"adjust_{kind}")(image, factor)
    got = jitter_colours(image, **{kind: factor})
    assert (got.int() - wanted.int()).abs().max() <= 1


def test_jitter_in_torchvisions_order() -> None:
    image = torch.randint(90, 140, (3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shares = image / 255  # torchvision cuts uint8 off after every step, but not floats
    wanted = v2.adjust_saturation(v2.adjust_contrast(v2.adjust_brightness(shares, 1.2), 0.7), 1.2)
    got = jitter_colours(image, brightness=1.2, contrast=0.7, saturation=1.2)
    assert (got - wanted * 255).abs().max() <= 0.51


def test_hue_turns_around_grey() -> None:
    image = torch.tensor([[200, 50, 90], [50, 200, 90], [50, 50, 90]], dtype=torch.uint8).view(3, 1, 3)
    third = jitter_colours(image, hue=1 / 3).view(3, 3)
    assert third.T.tolist() == [[50, 200, 50], [50, 50, 200], [90, 90, 90]]
    # A small turn of pure red by a: (1 + 2 cos a) / 3 of red stays.
    a = 2 * math.pi * 0.02
    small = jitter_colours(image, hue=0.02).view(3, 3)[:, 0]
    assert int(small[0]) == round(50 + 150 * (1 + 2 * math.cos(a)) / 3)
    assert small[1] > small[2]  # towards yellow


def test_jitter_clips_instead_of_wrapping() -> None:
    image = torch.full((3, 4, 4), 250, dtype=torch.uint8)
    assert (jitter_colours(image, brightness=1.3) == 255).all()
    assert (jitter_colours(image, brightness=0.0) == 0).all()


def letterboxed(width: int, height: int, shade: int) -> Example:
    """A picture of one shade, centred on grey, all of which is an object."""
    image = torch.full((3, SIZE, SIZE), PADDING, dtype=torch.uint8)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    image[:, top : top + height, left : left + width] = shade
    edges = (left, top, left + width, top + height)
    return Example(image, torch.tensor([edges], dtype=torch.float32), torch.tensor([float(shade)]), edges)


@pytest.mark.parametrize(("width", "height"), [(SIZE, SIZE * 9 // 16), (SIZE * 3 // 4, SIZE)])
def test_a_mosaic_is_made_of_pictures_and_not_of_their_grey(width: int, height: int) -> None:
    config = AugmentConfig(scale=0, translate=0, fliplr=0, jitter=0)
    shades, greys = (10, 50, 170, 230), []
    for seed in range(40):
        pieces = [letterboxed(width, height, shade) for shade in shades]
        mosaic = augment_example(pieces, config, np.random.default_rng(seed))
        grey = mosaic.image[0] == PADDING
        greys.append(float(grey.float().mean()))
        for shade in shades:  # each object is where its picture is, and nowhere else
            own = mosaic.image[0] == shade
            if mosaic.classes.tolist().count(shade) == 0:
                assert own.float().mean() < 0.15
                continue
            (x1, y1, x2, y2) = mosaic.boxes[mosaic.classes == shade][0].round().int().tolist()
            assert own[y1:y2, x1:x2].all()
            assert int(own.sum()) == (x2 - x1) * (y2 - y1)
        rows, columns = (~grey).nonzero(as_tuple=True)  # without a gap between the pictures
        inner = ~grey[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert inner.all()
    assert np.mean(greys) < 0.25  # 0.43 of 16:9 with the bars


def test_a_mosaic_of_square_pictures_is_what_it_was() -> None:
    """Whether a square is said to be all picture or not."""
    config = AugmentConfig()
    plain = [letterboxed(SIZE, SIZE, shade)._replace(picture=None) for shade in (10, 50, 170, 230)]
    said = [letterboxed(SIZE, SIZE, shade) for shade in (10, 50, 170, 230)]
    one, other = (augment_example(each, config, np.random.default_rng(3)) for each in (plain, said))
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes, other.boxes)


WIDE = Sides(48, 96)


@pytest.mark.parametrize("others", [0, 3])
def test_boxes_follow_pixels_of_rectangles(others: int) -> None:
    config = AugmentConfig(scale=0.5, translate=0.3, fliplr=0.5, flipud=0.5, transpose=0.0, jitter=0.0)
    image = torch.zeros(3, *WIDE, dtype=torch.uint8)
    image[:, 12:36, 20:70] = 255
    example = Example(image, torch.tensor([[20.0, 12, 70, 36]]), torch.tensor([3.0]))
    black = Example(torch.zeros_like(image), torch.zeros(0, 4), torch.zeros(0))
    seen = 0
    for seed in range(40):
        result = augment_example([example, *[black] * others], config, np.random.default_rng(seed))
        assert result.image.shape == (3, *WIDE)
        if len(result.boxes):
            seen += 1
            assert np.abs(np.array(bright_box(result.image)) - result.boxes[0].numpy()).max() <= 1.5
    assert seen > 10


def test_a_window_of_a_rectangle_by_hand() -> None:
    # Of 96 x 48 px the right lower quarter, 48 x 24 px, twice as large.
    example = Example(
        torch.zeros(3, *WIDE, dtype=torch.uint8), torch.tensor([[50.0, 26, 60, 36]]), torch.ones(1)
    )
    result = crop_window([(example, (0, 0))], 48, 24, Sides(24, 48), WIDE)
    assert (result.boxes.tolist(), result.image.shape) == ([[4, 4, 24, 24]], (3, *WIDE))
    # Of twice the size a box 3 px high is 1.5 px high, and goes, as does one 3 px wide.
    thin = torch.tensor([[10.0, 10, 13, 40], [10.0, 10, 40, 13], [10.0, 10, 14, 14]])
    many = Example(example.image, thin, torch.arange(3.0))
    assert crop_window([(many, (0, 0))], 0, 0, Sides(96, 192), WIDE).classes.tolist() == [2]


angles = st.floats(-180, 180)
leans = st.floats(-30, 30)


@given(degrees=angles, lean=leans, tilt=leans, corner=st.tuples(st.integers(12, 28), st.integers(12, 28)))
def test_a_turned_box_encloses_its_turned_pixels(degrees, lean, tilt, corner):
    x, y = corner
    example = lit(x, y, x + 20, y + 14)
    result = turn(example, degrees, lean, tilt)
    assert result.image.shape == example.image.shape
    white = torch.nonzero(result.image[0] > 185)  # half way from grey to white
    if len(result.boxes) and len(white):
        found = torch.tensor(bright_box(result.image), dtype=torch.float32)
        x1, y1, x2, y2 = result.boxes[0]
        assert (found[:2] >= result.boxes[0, :2] - 1).all()
        assert (found[2:] <= result.boxes[0, 2:] + 1).all()
        assert 0 <= x1 < x2 <= SIZE
        assert 0 <= y1 < y2 <= SIZE
        assert result.classes.tolist() == [3]


@given(
    degrees=angles,
    points=st.lists(st.tuples(st.integers(24, 38), st.integers(24, 38)), min_size=1, max_size=4),
)
def test_turning_and_turning_back_leads_home(degrees, points):
    boxes = torch.tensor([[x, y, x + 0.0, y + 0.0] for x, y in points]) + torch.tensor([0, 0, 3.0, 3.0])
    example = Example(dark().image, boxes, torch.arange(len(points)).float())
    centres = [(box[:2] + box[2:]) / 2 for box in boxes]
    turned = turn(example, degrees)
    assert turned.classes.tolist() == example.classes.tolist()  # near the centre nothing is lost
    a = math.radians(degrees)
    for box, (x, y) in zip(turned.boxes, (centre - SIZE / 2 for centre in centres), strict=True):
        wanted = [x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)]
        np.testing.assert_allclose((box[:2] + box[2:]) / 2 - SIZE / 2, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("degrees", "box"),
    [
        (90, [SIZE - 30, 4, SIZE - 20, 10]),
        (180, [SIZE - 10, SIZE - 30, SIZE - 4, SIZE - 20]),
        (0, [4, 20, 10, 30]),
    ],
)
def test_quarter_turns_are_exact(degrees, box):
    result = turn(lit(4, 20, 10, 30), degrees)
    np.testing.assert_allclose(result.boxes, [box], atol=1e-4)
    assert bright_box(result.image) == box


def test_rotation_keeps_a_rectangles_proportions():
    """Pixels of an image that is no square are turned as they lie, not as shares of its sides."""
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, 15:25, 30:70] = 255
    example = Example(image, torch.tensor([[30.0, 15.0, 70.0, 25.0]]), torch.zeros(1))
    result = turn(example, 90)
    np.testing.assert_allclose(result.boxes, [[45, 0, 55, 40]], atol=1e-4)
    assert bright_box(result.image) == [45, 0, 55, 40]


def test_what_a_turn_uncovers_is_grey():
    assert turn(dark(), 45).image[:, 0, 0].tolist() == [PADDING] * 3


@given(seed=st.integers(0, 1000))
def test_mixup_keeps_all_boxes_and_adds_both_images(seed):
    first, second = lit(4, 20, 10, 30, 1), lit(40, 40, 60, 60, 2)
    mixed = mix(first, second, np.random.default_rng(seed))
    assert mixed.boxes.tolist() == [*first.boxes.tolist(), *second.boxes.tolist()]
    assert mixed.classes.tolist() == [1, 2]
    here, there = int(mixed.image[0, 25, 5]), int(mixed.image[0, 50, 50])
    assert abs(here + there - 255) <= 1
    assert 0.15 < here / 255 < 0.85  # Beta(32, 32) is near a half
    assert int(mixed.image[0, 0, 0]) == 0


@given(
    seed=st.integers(0, 100),
    places=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_pasted_objects_bring_their_pixels_and_cover_little(seed, places):
    example, image = lit(20, 20, 44, 44, 0), torch.full((3, SIZE, SIZE), 100, dtype=torch.uint8)
    boxes = torch.tensor([[x, y, x + 20.0, y + 16.0] for x, y in places])
    other = Example(image, boxes, torch.full((len(places),), 7.0))
    before = example.image.clone()
    result = paste_objects(example, other, 1.0, np.random.default_rng(seed))
    assert torch.equal(example.image, before)
    assert result.classes.tolist() == [0, *[7] * (len(result.boxes) - 1)]
    changed = result.image[0] == 100
    covered = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for x1, y1, x2, y2 in result.boxes[1:].int().tolist():
        covered[y1:y2, x1:x2] = True
    assert torch.equal(changed, covered)
    assert covered[20:44, 20:44].float().mean() < 0.3 * max(1, len(result.boxes) - 1)
    for box in other.boxes:
        taken = (box == result.boxes).all(1).any()
        overlap = (
            (box[2:].minimum(example.boxes[0, 2:]) - box[:2].maximum(example.boxes[0, :2])).clamp(0).prod()
        )
        assert not (taken and overlap >= 0.3 * 24 * 24)


def test_nothing_is_pasted_onto_the_grey_or_where_no_share_is():
    example, other = lit(30, 30, 34, 34), lit(2, 2, 12, 12)
    framed = example._replace(picture=(0, 10, SIZE, SIZE - 10))
    assert len(paste_objects(framed, other, 1.0, np.random.default_rng(0)).boxes) == 1
    assert len(paste_objects(example, other, 1.0, np.random.default_rng(0)).boxes) == 2
    assert len(paste_objects(example, other, 0.0, np.random.default_rng(0)).boxes) == 1
    assert paste_objects(framed, dark(), 1.0, np.random.default_rng(0)).picture == framed.picture
