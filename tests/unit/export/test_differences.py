import math

import pytest
import torch

from sparse_exp.export.differences import Differences, matched_shares


def predictions(*rows):
    """One image: rows of x, y, w, h, objectness, class score."""
    return torch.tensor([rows], dtype=torch.float32)


def test_differences_are_those_of_confident_predictions_over_all_batches():
    differences = Differences()
    differences.update(
        predictions((10, 10, 4, 4, 0.5, 0.9), (50, 50, 9, 9, 0.01, 0.2)),
        predictions((11, 10, 4, 6, 0.3, 0.8), (90, 90, 1, 1, 0.02, 0.7)),
    )
    differences.update(predictions((20, 20, 4, 4, 0.05, 0.5)), predictions((20, 25, 4, 4, 0.1, 0.5)))
    differences.update(predictions((5, 5, 4, 4, 0.2, 0.5)), predictions((5, 5, 4, 4, 0.05, 0.5)))
    found = differences.result()
    # Three are confident on one side at least: 1, 0, 0, 2 then 0, 5, 0, 0 then 0s; 0.2, 0.1 then 0.05, 0 ...
    assert found["box_mean_px"] == pytest.approx(8 / 12)
    assert found["box_max_px"] == 5
    assert found["score_mean"] == pytest.approx((0.2 + 0.1 + 0.05 + 0.15) / 6)
    assert found["score_max"] == pytest.approx(0.2)


def test_without_a_confident_prediction_scores_are_compared_and_boxes_are_not():
    differences = Differences()
    differences.update(predictions((10, 10, 4, 4, 0.02, 0.4)), predictions((90, 10, 4, 4, 0.04, 0.4)))
    found = differences.result()
    assert found == {
        "score_mean": pytest.approx(0.01),
        "score_max": pytest.approx(0.02),
        "box_mean_px": 0.0,
        "box_max_px": 0.0,
    }


def test_a_prediction_that_is_no_number_does_not_vanish():
    differences = Differences()
    differences.update(predictions((math.nan, 0, 1, 1, 0.9, math.nan)), predictions((0, 0, 1, 1, 0.9, 1)))
    differences.update(predictions((0, 0, 1, 1, 0.9, 1)), predictions((0, 0, 1, 1, 0.9, 1)))
    assert all(math.isnan(value) for value in differences.result().values())


def test_an_objectness_that_is_no_number_does_not_hide_its_prediction():
    differences = Differences()
    differences.update(predictions((0, 0, 1, 1, math.nan, 1)), predictions((0, 0, 1, 1, 0.9, 1)))
    assert math.isnan(differences.result()["score_mean"])


def detections(*rows):
    """One image: rows of x1, y1, x2, y2, confidence, class."""
    return [torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)]


BOX = (0, 0, 100, 100)


@pytest.mark.parametrize(
    ("other", "share"),
    [
        ((*BOX, 0.85, 0), 1.0),
        ((0, 0, 100, 91, 0.9, 0), 1.0),  # IoU 0.91
        ((0, 0, 100, 89, 0.9, 0), 0.0),  # IoU 0.89
        ((*BOX, 0.79, 0), 0.0),  # confidence 0.11 lower
        ((*BOX, 0.9, 1), 0.0),  # another class
    ],
)
def test_what_counts_as_the_same_detection(other, share):
    shares = matched_shares(detections(other), detections((*BOX, 0.9, 0)))
    assert shares == {"matched_of_torch": share, "matched_of_engine": share}


def test_both_directions_are_counted_and_none_twice():
    torchs = detections((*BOX, 0.9, 0), (0, 0, 100, 95, 0.88, 0), (300, 0, 400, 100, 0.2, 0))
    engines = detections((*BOX, 0.9, 0))
    # The engine's only one is the first's; the second has none left; the third is not confident enough.
    assert matched_shares(engines, torchs) == {"matched_of_torch": 0.5, "matched_of_engine": 1.0}
    assert matched_shares(torchs, engines) == {"matched_of_torch": 1.0, "matched_of_engine": 0.5}


def test_a_detection_just_below_the_threshold_on_one_side_is_found_there():
    found = matched_shares(detections((*BOX, 0.24, 0)), detections((*BOX, 0.26, 0)))
    assert found == {"matched_of_torch": 1.0, "matched_of_engine": 1.0}


def test_images_are_not_mixed_and_empty_ones_count_for_nothing():
    here, nothing = detections((*BOX, 0.9, 0)), detections()
    assert matched_shares(here + nothing, nothing + here)["matched_of_torch"] == 0.0
    assert matched_shares(nothing, nothing) == {"matched_of_torch": 1.0, "matched_of_engine": 1.0}
