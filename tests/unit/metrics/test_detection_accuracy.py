"""COCO's average precision against faster-coco-eval, and the rest against what a hand counts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from sparse_exp.metrics.detection import Matcher, _Ranked, ratio_interval


def random_image(draw: np.random.Generator, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections, boxes and labels: some objects are found well, some badly, some twice, some as others."""
    objects = int(draw.integers(0, 9))
    corner, size = draw.uniform(0, 200, (objects, 2)), draw.uniform(2, 120, (objects, 2))
    boxes, labels = np.concatenate([corner, corner + size], 1), draw.integers(0, classes, objects)
    found = []
    for box, label in zip(boxes, labels, strict=True):
        for _ in range(draw.integers(0, 4)):
            moved = box + draw.normal(0, draw.choice([0, 1, 4, 12]), 4)
            x1, x2, y1, y2 = *sorted(moved[::2]), *sorted(moved[1::2])
            as_class = label if draw.random() < 0.8 else draw.integers(0, classes)
            found.append([x1, y1, x2, y2, draw.choice([draw.random(), 0.5]), as_class])  # equal scores, too
    for _ in range(draw.integers(0, 6)):
        x, y = draw.uniform(0, 200, 2)
        found.append([x, y, x + 40, y + 30, draw.random(), draw.integers(0, classes)])
    order = draw.permutation(len(found))
    return np.array(found, np.float32).reshape(-1, 6)[order], boxes.astype(np.float32), labels


def reference(images: list, classes: int, max_det: int) -> COCOeval_faster:
    truth, found = [], []
    for number, (detections, boxes, labels) in enumerate(images, 1):
        for box, label in zip(boxes.astype(float), labels, strict=True):
            x1, y1, x2, y2 = box.tolist()
            truth.append({"id": len(truth) + 1, "image_id": number, "category_id": int(label), "iscrowd": 0,
                          "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})  # fmt: skip
        for x1, y1, x2, y2, score, label in detections.astype(float).tolist():
            found.append({"image_id": number, "category_id": int(label), "score": score,
                          "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    coco = COCO({"images": [{"id": n} for n in range(1, len(images) + 1)], "annotations": truth,
                 "categories": [{"id": n} for n in range(classes)]})  # fmt: skip
    run = COCOeval_faster(coco, coco.loadRes(found), "bbox", print_function=lambda *_: None)
    run.params.maxDets = [1, min(10, max_det), max_det]
    run.evaluate()
    run.accumulate()
    return run


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_faster_coco_eval(seed: int) -> None:
    draw = np.random.default_rng(seed)
    classes, max_det = int(draw.integers(1, 6)), int(draw.choice([3, 300]))
    images = [random_image(draw, classes) for _ in range(int(draw.integers(1, 30)))]
    matcher = Matcher(classes + 1, max_det)  # one class never occurs
    for image in images:
        matcher.add(*image)
    got = matcher.accuracies()
    table = reference(images, classes, max_det).eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    present = (table > -1).all((0, 1))
    assert got.map50_95 == pytest.approx(table[:, :, present].mean(), abs=1e-6)
    assert got.map50 == pytest.approx(table[0][:, present].mean(), abs=1e-6)
    np.testing.assert_allclose(got.precision, table[0][:, present].mean(1), atol=1e-6)
    ours = got.by_class.ap50_95[:classes]
    np.testing.assert_allclose(ours[present], table.mean((0, 1))[present], atol=1e-6)
    assert np.isnan(ours[~present]).all()
    assert np.isnan(got.by_class.ap50[-1])


A, B, C, FAR = [0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10], [300, 300, 310, 310]


def found_by(images: list[tuple[list, list]], classes: int):
    matcher = Matcher(classes)
    for found, truth in images:
        boxes = np.array([box for box, _ in truth], np.float32).reshape(-1, 4)
        rows = np.array([[*box, conf, label] for box, conf, label in found], np.float32).reshape(-1, 6)
        matcher.add(rows, boxes, np.array([label for _, label in truth], np.int64))
    return matcher.accuracies().by_class


def test_precision_recall_and_confusion_at_the_best_confidence() -> None:
    """Below 0.4 there are only wrong detections, so that 0.4 is the best confidence."""
    found = [(A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 1), (C, 0.4, 1), (FAR, 0.6, 0), (FAR, 0.3, 0), (FAR, 0.2, 1)]
    got = found_by([(found, [(A, 0), (B, 0), (C, 1)]), ([], [(A, 1)])], 3)
    assert got.objects.tolist() == [2, 2, 0]
    assert got.conf == pytest.approx(0.4, abs=2e-3)
    # class 0: A right, A again and FAR wrong; class 1: C right, and B, which is of class 0
    np.testing.assert_allclose(got.precision, [1 / 3, 1 / 2, np.nan])
    np.testing.assert_allclose(got.recall, [1 / 2, 1 / 2, np.nan])
    np.testing.assert_allclose(got.f1, [2 / 5, 1 / 2, np.nan])
    assert got.confusion.tolist() == [
        [1, 1, 0, 0],  # A found, B taken for class 1
        [0, 1, 0, 1],  # C found, that of the second image missed
        [0, 0, 0, 0],
        [2, 0, 0, 0],  # A once more, and FAR
    ]


def test_every_object_is_in_its_row_and_every_detection_in_its_column() -> None:
    draw = np.random.default_rng(7)
    matcher = Matcher(4)
    images = [random_image(draw, 4) for _ in range(20)]
    for image in images:
        matcher.add(*image)
    got = matcher.accuracies().by_class
    labels = np.concatenate([labels for _, _, labels in images])
    assert got.confusion[:4].sum(1).tolist() == np.bincount(labels, minlength=4).tolist()
    rows = np.concatenate([rows for rows, _, _ in images])
    kept = rows[rows[:, 4] >= got.conf]
    assert got.confusion[:, :4].sum(0).tolist() == np.bincount(kept[:, 5].astype(int), minlength=4).tolist()
    assert got.confusion[4, 4] == 0


@pytest.mark.parametrize("images", [[], [([], [])], [([(A, 0.9, 0)], [])], [([], [(A, 0)])]])
def test_without_objects_or_detections(images: list) -> None:
    got = found_by(images, 2)
    has_object = any(truth for _, truth in images)
    assert got.confusion.sum() == has_object  # without objects the best is to detect nothing
    np.testing.assert_array_equal(got.recall, [0.0 if has_object else np.nan, np.nan])


def test_a_detection_takes_a_few_bytes() -> None:
    draw, matcher = np.random.default_rng(0), Matcher(80)
    corners = draw.uniform(0, 600, (300, 2))
    rows = np.column_stack([corners, corners + 30, draw.random(300), draw.integers(0, 80, 300)])
    image = (rows.astype(np.float32), rows[:20, :4].astype(np.float32), rows[:20, 5].astype(np.int64))
    tracemalloc.start()
    for _ in range(100):
        matcher.add(*image)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20 * 100 * 300


def matched(images: list, classes: int) -> Matcher:
    matcher = Matcher(classes)
    for image in images:
        matcher.add(*image)
    return matcher


@pytest.mark.parametrize("seed", range(6))
def test_an_image_that_was_drawn_twice_counts_as_two(seed: int) -> None:
    draw = np.random.default_rng(seed)
    images = [random_image(draw, 3) for _ in range(9)]
    for found, _, _ in images:  # of equal scores either may stand first
        found[:, 4] = draw.permutation(len(found)) / len(found) if len(found) else 0
        found[:, 4] = (found[:, 4] + draw.random()) / 2
    weights = np.bincount(draw.integers(9, size=9), minlength=9)
    repeated = [image for image, weight in zip(images, weights, strict=True) for _ in range(weight)]
    wanted = matched(repeated, 3).accuracies().map50
    assert _Ranked(matched(images, 3)).map50(weights) == pytest.approx(wanted, abs=0.02)
    assert _Ranked(matched(images, 3)).map50(np.ones(9, int)) == pytest.approx(
        matched(images, 3).accuracies().map50
    )


def test_between_what_a_ratio_lies() -> None:
    draw = np.random.default_rng(0)
    images = [random_image(draw, 2) for _ in range(80)]
    some = [(found[draw.random(len(found)) < 0.3], boxes, labels) for found, boxes, labels in images]
    all_found, half = matched(images, 2), matched(some, 2)
    assert ratio_interval(all_found, all_found) == (1.0, 1.0)
    low, high = ratio_interval(half, all_found) or (0.0, 0.0)
    ratio = half.accuracies().map50 / all_found.accuracies().map50
    assert 0 < low < ratio < high < 1
    narrow = ratio_interval(matched(some * 4, 2), matched(images * 4, 2)) or (0.0, 0.0)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 2, rel=0.3)  # four times the images


def test_of_one_image_or_of_nothing_found_no_interval_is_known() -> None:
    image = random_image(np.random.default_rng(0), 2)
    nothing = np.zeros((0, 6), np.float32), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    assert ratio_interval(matched([image], 2), matched([image], 2)) is None
    assert ratio_interval(matched([nothing] * 3, 2), matched([nothing] * 3, 2)) is None
