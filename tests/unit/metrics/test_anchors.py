from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_exp.metrics.anchors import PUBLISHED, best_possible_recall, fit_anchors
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.loss import match

ANCHORS = np.array(PUBLISHED, float)
ODD = np.array([[10, 300], [300, 8], [600, 30], [640, 20], [3, 3]], float)  # px at 640


def matched(sides: np.ndarray, anchors: np.ndarray) -> list[bool]:
    """Whether the loss matches a box of these sides in the middle of an image with anything."""
    found = []
    for width, height in sides.tolist():
        target = torch.tensor([[0, 0, 0.5, 0.5, width / 640, height / 640]], dtype=torch.float64)
        levels = zip(anchors, (8, 16, 32), strict=True)
        found.append(
            any(
                len(match(target, torch.tensor(own) / stride, (640 // stride,) * 2, 4.0).classes)
                for own, stride in levels
            )
        )
    return found


def test_a_box_without_an_anchor_is_one_that_the_loss_matches_with_nothing() -> None:
    draw = np.random.default_rng(0)
    sides = np.concatenate([ODD, np.exp(draw.uniform(np.log(2), np.log(640), (200, 2)))])
    wanted = matched(sides, ANCHORS)
    assert wanted[:5] == [False] * 5
    for box, has in zip(sides, wanted, strict=True):
        assert best_possible_recall(box[None], ANCHORS, 4.0) == has
    assert best_possible_recall(sides, ANCHORS, 4.0) == pytest.approx(np.mean(wanted))
    assert best_possible_recall(sides[:0], ANCHORS, 4.0) == 1.0


def test_the_published_anchors_are_the_models() -> None:
    strides = np.array([8, 16, 32]).reshape(3, 1, 1)
    np.testing.assert_allclose(YOLOv5("n", 1).anchors.numpy() * strides, ANCHORS)


@pytest.mark.parametrize("count", [1, 5, 9, 500])
def test_fitted_anchors_answer_for_all_boxes(count: int) -> None:
    draw = np.random.default_rng(1)
    long = np.exp(draw.normal(np.log([400, 12]), 0.3, (count, 2)))
    sides = np.where(draw.random((count, 1)) < 0.5, long, long[:, ::-1])
    assert best_possible_recall(sides, ANCHORS, 4.0) < 0.5
    anchors = fit_anchors(sides, 4.0, seed=0)
    assert anchors.shape == (3, 3, 2)
    assert best_possible_recall(sides, anchors, 4.0) == 1.0
    assert (np.diff(anchors.reshape(-1, 2).prod(1)) >= 0).all()
    assert (anchors == fit_anchors(sides, 4.0, seed=0)).all()


@pytest.mark.slow
def test_many_boxes_take_no_longer() -> None:
    sides = np.tile(ODD, (20_000, 1))
    assert best_possible_recall(sides, fit_anchors(sides, 4.0, seed=0), 4.0) == 1.0
