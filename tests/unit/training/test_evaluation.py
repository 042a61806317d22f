from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_exp.data.loader import Batch
from sparse_exp.training.evaluation import Evaluation, Validation
from sparse_exp.yolov5 import YOLOv5

SIZE = 320
Box = tuple[float, float, float, float]
LEFT, RIGHT, FAR = (20, 20, 80, 80), (200, 20, 260, 80), (20, 200, 80, 260)


def run(
    truth: list[list[tuple[int, Box]]],
    found: list[list[tuple[int, float, Box]]],
    classes: int = 1,
    *,
    keep_detections: bool = False,
    **options,
) -> Evaluation:
    """Evaluate given detections (class, confidence, corners) against given boxes (class, corners)."""

    def centred(box: Box) -> list[float]:
        x1, y1, x2, y2 = box
        return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]

    targets = [
        [position, c, *(v / SIZE for v in centred(box))]
        for position, image in enumerate(truth)
        for c, box in image
    ]
    rows = max(1, max(map(len, found)))
    predictions = torch.zeros(len(found), rows, 5 + classes)
    for position, image in enumerate(found):
        for row, (c, confidence, box) in enumerate(image):
            predictions[position, row, :5] = torch.tensor([*centred(box), confidence])
            predictions[position, row, 5 + c] = 1.0
    images = torch.zeros(len(truth), 3, SIZE, SIZE, dtype=torch.uint8)
    batch = Batch(images, torch.tensor(targets, dtype=torch.float32).reshape(-1, 6))

    def predict(given: Tensor) -> Tensor:
        assert given.dtype == torch.uint8
        return predictions

    return Validation([batch], classes, **options).evaluate(predict, keep_detections=keep_detections)


def test_perfect() -> None:
    result = run([[(0, LEFT), (0, RIGHT)], [(0, FAR)]], [[(0, 0.9, LEFT), (0, 0.3, RIGHT)], [(0, 0.5, FAR)]])
    assert (result.map50, result.map50_95, result.images) == (pytest.approx(1), pytest.approx(1), 2)
    assert result.recall.tolist() == pytest.approx([i / 100 for i in range(101)])
    assert result.precision.tolist() == pytest.approx([1] * 101)
    assert result.detections == []


def test_one_of_two_found() -> None:
    # Precision 1 at the recalls 0, 0.01, ... 0.50, that is 51 of the 101 points.
    result = run([[(0, LEFT), (0, RIGHT)]], [[(0, 0.9, LEFT)]])
    assert result.map50 == pytest.approx(51 / 101)
    assert result.precision.tolist() == pytest.approx([1] * 51 + [0] * 50)


def test_false_positive_of_higher_score() -> None:
    # Ranked: false, true. Precision 1/2 when the only box is found, at every recall.
    assert run([[(0, LEFT)]], [[(0, 0.9, FAR), (0, 0.8, LEFT)]]).map50 == pytest.approx(0.5)
    # The same false positive ranked last costs nothing.
    assert run([[(0, LEFT)]], [[(0, 0.7, FAR), (0, 0.8, LEFT)]]).map50 == pytest.approx(1.0)


def test_false_positive_between_two() -> None:
    # true, false, true: precision 1 up to recall 0.5 (51 points), then 2/3 (50 points).
    result = run([[(0, LEFT), (0, RIGHT)]], [[(0, 0.9, LEFT), (0, 0.8, FAR), (0, 0.7, RIGHT)]])
    assert result.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result.precision.mean() == pytest.approx(result.map50)


def test_false_positive_on_a_background_image() -> None:
    result = run([[(0, LEFT)], []], [[(0, 0.8, LEFT)], [(0, 0.9, LEFT)]])
    assert result.map50 == pytest.approx(0.5)


def test_iou_thresholds() -> None:
    # IoU 0.72: found at 0.5, 0.55, 0.6, 0.65, 0.7, missed at the other five.
    result = run([[(0, (0, 0, 100, 100))]], [[(0, 0.9, (0, 0, 72, 100))]])
    assert (result.map50, result.map50_95) == (pytest.approx(1), pytest.approx(0.5))
    # IoU 0.52 counts at 0.5 only, which the precision-recall curve is for.
    result = run([[(0, (0, 0, 100, 100))]], [[(0, 0.9, (0, 0, 52, 100))]])
    assert (result.map50, result.map50_95) == (pytest.approx(1), pytest.approx(0.1))
    assert result.precision.tolist() == pytest.approx([1] * 101)


def test_mean_over_the_classes_that_occur() -> None:
    truth, found = [[(0, LEFT), (1, RIGHT)]], [[(0, 0.9, LEFT), (2, 0.9, FAR)]]
    result = run(truth, found, classes=4)
    assert result.map50 == pytest.approx(0.5)
    assert result.precision.tolist() == pytest.approx([0.5] * 101)
    assert run([[(0, LEFT)]], [[(1, 0.9, LEFT)]], classes=2).map50 == 0


def test_more_than_a_hundred_boxes_count() -> None:
    boxes = [(x, y, x + 10.0, y + 10.0) for x in range(0, 300, 20) for y in range(0, 200, 20)]
    truth, found = [[(0, box) for box in boxes]], [[(0, 0.9 - i / 1000, box) for i, box in enumerate(boxes)]]
    assert len(boxes) == 150
    assert run(truth, found).map50 == pytest.approx(1)
    # 75 of 150 kept: recall 0.5.
    assert run(truth, found, max_det=75).map50 == pytest.approx(51 / 101)


def test_confidence_and_detections() -> None:
    found = [[(0, 0.9, LEFT), (0, 0.2, RIGHT)], []]
    result = run([[(0, LEFT), (0, RIGHT)], []], found, conf=0.25, keep_detections=True)
    assert result.map50 == pytest.approx(51 / 101)
    assert [tuple(image.shape) for image in result.detections] == [(1, 6), (0, 6)]
    np.testing.assert_allclose(result.detections[0][0], [*LEFT, 0.9, 0], atol=1e-4)


@pytest.mark.parametrize("found", [[[]], [[(0, 0.9, LEFT)]]])
def test_no_boxes_at_all(found: list) -> None:
    result = run([[]], found)
    assert (result.map50, result.map50_95) == (0, 0)
    assert result.precision.shape == (101,)


def test_nothing_found() -> None:
    assert run([[(0, LEFT)]], [[]]).map50 == 0


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run([[(0, LEFT)]], [[(0, 0.9, LEFT)]])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_wrong_shape_is_refused() -> None:
    batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"\(1, 'A', 7\), but got \(1, 4, 6\)"):
        Validation([batch], 2).evaluate(lambda images: torch.zeros(1, 4, 6))


def test_ranges_of_torchs_quantizers_which_sparseml_trains_with_do_not_move() -> None:
    model, quantizer = YOLOv5("n", 1), torch.ao.quantization.FakeQuantize()
    model.model[0].register_forward_pre_hook(lambda _, images: quantizer(*images))
    model.quantizer = quantizer
    frozen = torch.ao.quantization.FakeQuantize()
    frozen.disable_observer()
    model.frozen = frozen
    model(torch.full((1, 3, 64, 64), 0.25))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    batch = Batch(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(0, 6))
    Validation([batch], 1).evaluate_model(model)
    after = quantizer.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (quantizer.observer_enabled[0], frozen.observer_enabled[0]) == (1, 0)
    model(torch.ones(1, 3, 64, 64))
    assert float(quantizer.activation_post_process.max_val) == pytest.approx(0.25 + 0.01 * 0.75)
