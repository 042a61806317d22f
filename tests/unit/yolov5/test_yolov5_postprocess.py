import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripts import load_script
from torchvision.ops import batched_nms, nms

from sparse_exp.yolov5.postprocess import non_max_suppression

script = load_script("suppression")


def boxes(*rows):
    """One image of predictions: x, y, w, h, objectness, class scores."""
    return np.array([rows], np.float32)


def test_overlapping_boxes_of_one_class_become_the_better_one():
    # 10x10 at x = 0 and x = 2: intersection 80, union 120, IoU 2/3
    p = boxes([5, 5, 10, 10, 0.8, 1.0], [7, 5, 10, 10, 0.9, 1.0], [50, 50, 10, 10, 0.5, 1.0])
    (kept,) = non_max_suppression(p, conf=0.1, iou=0.6, max_det=10)
    np.testing.assert_allclose(kept, [[2, 0, 12, 10, 0.9, 0], [45, 45, 55, 55, 0.5, 0]])
    (all_three,) = non_max_suppression(p, conf=0.1, iou=0.7, max_det=10)
    np.testing.assert_allclose(all_three[:, 4], [0.9, 0.8, 0.5])


def test_boxes_of_different_classes_do_not_suppress_each_other():
    p = boxes([5, 5, 10, 10, 1.0, 0.9, 0.0], [5, 5, 10, 10, 1.0, 0.0, 0.8])
    (kept,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10)
    np.testing.assert_allclose(kept[:, 4:], [[0.9, 0], [0.8, 1]])


def test_one_box_may_have_several_labels():
    p = boxes([5, 5, 10, 10, 0.5, 0.9, 0.1, 0.7])  # confidences 0.45, 0.05, 0.35
    (several,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10)
    np.testing.assert_allclose(several[:, 4:], [[0.45, 0], [0.35, 2]])
    (single,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10, multi_label=False)
    np.testing.assert_allclose(single[:, 4:], [[0.45, 0]])


def test_the_threshold_is_on_objectness_times_class():
    p = boxes([5, 5, 10, 10, 0.6, 0.4])  # 0.24
    assert len(non_max_suppression(p, conf=0.25, iou=0.5, max_det=10)[0]) == 0
    assert len(non_max_suppression(p, conf=0.23, iou=0.5, max_det=10)[0]) == 1


@pytest.mark.parametrize("multi_label", [True, False])
def test_no_candidates_and_images_on_their_own(multi_label):
    one = [5, 5, 10, 10, 0.9, 0.9, 0.1]
    p = np.array([[one], [[5, 5, 10, 10, 0.0, 0.9, 0.1]], [one]], np.float32)
    kept = non_max_suppression(p, conf=0.5, iou=0.5, max_det=10, multi_label=multi_label)
    assert [k.shape for k in kept] == [(1, 6), (0, 6), (1, 6)]
    assert all(k.dtype == np.float32 for k in kept)
    nothing = np.zeros((1, 0, 7), np.float32)
    empty = non_max_suppression(nothing, conf=0.5, iou=0.5, max_det=10, multi_label=multi_label)
    assert empty[0].shape == (0, 6)


def test_at_most_max_det_and_the_best_of_them():
    rows = [[100.0 * i, 5, 10, 10, 0.01 * i, 1.0] for i in range(1, 51)]
    (kept,) = non_max_suppression(boxes(*rows), conf=0.001, iou=0.5, max_det=7)
    np.testing.assert_allclose(kept[:, 4], np.arange(50, 43, -1) * 0.01)


def test_only_the_best_candidates_reach_the_suppression(monkeypatch):
    monkeypatch.setattr("sparse_exp.yolov5.postprocess._MAX_CANDIDATES", 2)
    rows = [[100.0 * i, 5, 10, 10, 0.1 * i, 1.0] for i in range(1, 6)]
    (kept,) = non_max_suppression(boxes(*rows), conf=0.001, iou=0.5, max_det=10)
    np.testing.assert_allclose(kept[:, 4], [0.5, 0.4])


def test_a_box_without_area_suppresses_nothing_and_warns_of_nothing(recwarn):
    p = boxes([5, 5, 0, 0, 1.0, 0.9], [5, 5, 0, 0, 1.0, 0.8])
    assert len(non_max_suppression(p, conf=0.1, iou=0.0, max_det=10)[0]) == 2
    assert not recwarn.list


def by_torchvision(p, conf, iou, max_det, multi_label, suppress=batched_nms):
    tensor = torch.from_numpy(p)
    found = script.by_torchvision(tensor, conf, iou, max_det, multi_label=multi_label, suppress=suppress)
    return found.numpy()


def class_by_class(corners, scores, labels, iou):
    """torchvision's `nms` of each class."""
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        kept[own[nms(corners[own], scores[own], iou)]] = True
    return kept.nonzero()[:, 0]


def thresholds():
    """Overlaps that pairs of boxes on a grid have exactly, 0.6 and 0.45 among them; and others."""
    return st.sampled_from([0.0, 0.2, 1 / 3, 0.45, 0.5, 0.6, 2 / 3, 0.9, 1.0]) | st.floats(0, 1)


def predictions(place, size, score):
    """Predictions (A, 5 + nc) of up to 40 boxes and 4 classes."""
    rows = st.integers(1, 4).flatmap(
        lambda classes: st.lists(
            st.tuples(place, place, size, size, *[score] * (1 + classes)), min_size=1, max_size=40
        )
    )
    return rows.map(lambda rows: np.array(rows, np.float32))


GRID = predictions(
    st.integers(20, 40).map(lambda x: x / 2), st.integers(0, 20), st.sampled_from([0, 0.25, 0.5, 0.75, 1])
)
ANYWHERE = predictions(st.floats(-50, 700, width=32), st.floats(0, 300, width=32), st.floats(0, 1, width=32))
OVERLAP_06 = np.array([[10, 10, 20, 10, 1, 1], [15, 10, 20, 10, 1, 0.5]], np.float32)  # 150 of 250


@settings(max_examples=400, deadline=None)
@given(GRID, st.sampled_from([0.0, 0.25, 0.3]), thresholds(), st.integers(1, 50), st.booleans())
@example(OVERLAP_06, 0.25, 0.6, 10, False)  # 0.6 as float32 is above 0.6
def test_ties_fall_as_in_torchvision(p, conf, iou, max_det, multi_label):
    """Equal boxes, equal scores, overlaps of exactly the threshold; coordinates that no shift rounds."""
    wanted = by_torchvision(p, conf, iou, max_det, multi_label)
    (found,) = non_max_suppression(p[None], conf, iou, max_det, multi_label=multi_label)
    np.testing.assert_array_equal(found, wanted)


@settings(max_examples=400, deadline=None)
@given(ANYWHERE, st.floats(0, 1), thresholds(), st.integers(1, 50), st.booleans())
def test_any_boxes_are_kept_as_by_torchvision(p, conf, iou, max_det, multi_label):
    """Against `nms` for each class. Of few boxes `batched_nms` shifts the classes apart, which rounds."""
    wanted = by_torchvision(p, conf, iou, max_det, multi_label, class_by_class)
    (found,) = non_max_suppression(p[None], conf, iou, max_det, multi_label=multi_label)
    np.testing.assert_array_equal(found, wanted)


def test_thousands_of_boxes_are_kept_as_by_torchvision():
    random = np.random.default_rng(0)
    p = random.uniform(0, 1, (3000, 7)).astype(np.float32)
    p[:, :4] *= [640, 640, 80, 80]
    for iou in (0.45, 0.6):
        wanted = by_torchvision(p, 0.1, iou, 300, True)
        (found,) = non_max_suppression(p[None], 0.1, iou, 300)
        np.testing.assert_array_equal(found, wanted)
