import pytest
import torch

from sparse_exp.yolov5.postprocess import non_max_suppression


def boxes(*rows):
    """One image of predictions: x, y, w, h, objectness, class scores."""
    return torch.tensor([rows], dtype=torch.float32)


def test_overlapping_boxes_of_one_class_become_the_better_one():
    # 10x10 at x = 0 and x = 2: intersection 80, union 120, IoU 2/3
    p = boxes([5, 5, 10, 10, 0.8, 1.0], [7, 5, 10, 10, 0.9, 1.0], [50, 50, 10, 10, 0.5, 1.0])
    (kept,) = non_max_suppression(p, conf=0.1, iou=0.6, max_det=10)
    expected = torch.tensor([[2, 0, 12, 10, 0.9, 0], [45, 45, 55, 55, 0.5, 0]])
    torch.testing.assert_close(kept, expected)
    (all_three,) = non_max_suppression(p, conf=0.1, iou=0.7, max_det=10)
    torch.testing.assert_close(all_three[:, 4], torch.tensor([0.9, 0.8, 0.5]))


def test_boxes_of_different_classes_do_not_suppress_each_other():
    p = boxes([5, 5, 10, 10, 1.0, 0.9, 0.0], [5, 5, 10, 10, 1.0, 0.0, 0.8])
    (kept,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10)
    torch.testing.assert_close(kept[:, 4:], torch.tensor([[0.9, 0], [0.8, 1]]))


def test_one_box_may_have_several_labels():
    p = boxes([5, 5, 10, 10, 0.5, 0.9, 0.1, 0.7])  # confidences 0.45, 0.05, 0.35
    (several,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10)
    torch.testing.assert_close(several[:, 4:], torch.tensor([[0.45, 0], [0.35, 2]]))
    (single,) = non_max_suppression(p, conf=0.1, iou=0.5, max_det=10, multi_label=False)
    torch.testing.assert_close(single[:, 4:], torch.tensor([[0.45, 0]]))


def test_the_threshold_is_on_objectness_times_class():
    p = boxes([5, 5, 10, 10, 0.6, 0.4])  # 0.24
    assert len(non_max_suppression(p, conf=0.25, iou=0.5, max_det=10)[0]) == 0
    assert len(non_max_suppression(p, conf=0.23, iou=0.5, max_det=10)[0]) == 1


@pytest.mark.parametrize("multi_label", [True, False])
def test_no_candidates_and_images_on_their_own(multi_label):
    one = [5, 5, 10, 10, 0.9, 0.9, 0.1]
    p = torch.tensor([[one], [[5, 5, 10, 10, 0.0, 0.9, 0.1]], [one]])
    kept = non_max_suppression(p, conf=0.5, iou=0.5, max_det=10, multi_label=multi_label)
    assert [tuple(k.shape) for k in kept] == [(1, 6), (0, 6), (1, 6)]
    assert all(k.dtype == torch.float32 for k in kept)
    empty = non_max_suppression(torch.zeros(1, 0, 7), conf=0.5, iou=0.5, max_det=10, multi_label=multi_label)
    assert empty[0].shape == (0, 6)


def test_at_most_max_det_and_the_best_of_them():
    rows = [[100.0 * i, 5, 10, 10, 0.01 * i, 1.0] for i in range(1, 51)]
    (kept,) = non_max_suppression(torch.tensor([rows]), conf=0.001, iou=0.5, max_det=7)
    torch.testing.assert_close(kept[:, 4], torch.arange(50, 43, -1) * 0.01)


def test_only_the_best_candidates_reach_the_suppression(monkeypatch):
    monkeypatch.setattr("sparse_exp.yolov5.postprocess._MAX_CANDIDATES", 2)
    rows = [[100.0 * i, 5, 10, 10, 0.1 * i, 1.0] for i in range(1, 6)]
    (kept,) = non_max_suppression(torch.tensor([rows]), conf=0.001, iou=0.5, max_det=10)
    torch.testing.assert_close(kept[:, 4], torch.tensor([0.5, 0.4]))
