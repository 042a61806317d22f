"""How sure a ratio is, against networks whose true speeds are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_exp.benchmark.ratios import Ratio, mean_ratio, ratio_of, ratio_of_rows

TURNS, TRIES = 8, 20


def speeds(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def measured(draw, true, drift, noise=0.01):
    return speeds(true * drift * draw.normal(1, noise, len(drift)))


def tries(faster: float, noise: float = 0.01) -> list[Ratio]:
    """Ratios of two cells whose speeds differ by a factor, on a machine that drifts by a third."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(TRIES):
        drift = draw.uniform(0.7, 1.0, TURNS)
        found.append(ratio_of(measured(draw, 10 * faster, drift, noise), measured(draw, 10, drift, noise)))
    return found


def test_of_two_equal_cells_none_wins():
    assert sum(not one.is_noise for one in tries(1.0)) == 0
    assert sum(not one.is_noise for one in tries(1.0, noise=0.05)) == 0


def test_what_is_five_percent_faster_wins():
    found = tries(1.05)
    assert sum(one.low > 1 for one in found) >= 18
    assert [one.value for one in found] == pytest.approx([1.05] * TRIES, rel=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(3)
    misses = 0
    for _ in range(400):
        drift = draw.uniform(0.7, 1.0, TURNS)
        found = ratio_of(measured(draw, 12, drift, 0.03), measured(draw, 10, drift, 0.03))
        misses += not found.low <= 1.2 <= found.high
    assert misses <= 4  # of 0.4 that are due


def test_only_turns_that_both_have_count():
    one, other = {0: 30.0, 2: 20.0, 3: 2.0}, {2: 10.0, 3: 1.0, 9: 77.0}
    assert ratio_of(one, other).value == pytest.approx(2.0)


def test_cells_without_a_common_turn_are_compared_by_their_medians_and_not_told_apart():
    found = ratio_of({0: 30.0, 1: 10.0, 2: 20.0}, {7: 10.0})
    assert found.value == pytest.approx(2.0)
    assert found.is_noise
    assert found.as_dict() == {"value": pytest.approx(2.0), "low": None, "high": None}


def test_a_mean_of_ratios_is_taken_turn_by_turn():
    dense, int8 = speeds([10, 20, 10, 20]), speeds([15, 30, 15, 30])
    pruned, both = speeds([20, 40, 20, 40]), speeds([60, 120, 60, 120])
    found = mean_ratio([(pruned, dense), (both, int8)])
    assert found.value == pytest.approx(math.sqrt(2 * 4))
    assert (found.low, found.high) == pytest.approx((found.value, found.value))


def test_rows_of_old_versions_have_repeats_without_turns():
    row, other = {"items_per_s": 20.0, "each": [20.0] * 5}, {"items_per_s": 10.0, "each": [10.0] * 5}
    assert ratio_of_rows(row, other) == Ratio(pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert ratio_of_rows({"items_per_s": 20.0}, {"items_per_s": 10.0}).value == pytest.approx(2)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(Ratio(1.5, 1.4, 1.6), "1.50"), (Ratio(1.02, 0.98, 1.06), "~1.02"), (Ratio(2.0), "~2.00")],
)
def test_a_ratio_in_words(ratio, text):
    assert str(ratio) == text
