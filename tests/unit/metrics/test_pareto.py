import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_exp.metrics.pareto import less_is_better, pareto_front, staircase

VALUES = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan), st.none())


@given(st.lists(st.tuples(VALUES, VALUES), max_size=12), st.booleans(), st.booleans())
def test_the_front_is_what_nothing_dominates(points, x_less, y_less):
    def known(point):
        return not any(value is None or math.isnan(value) for value in point)

    def dominates(a, b):
        gains = [(a[0] - b[0]) * (-1 if x_less else 1), (a[1] - b[1]) * (-1 if y_less else 1)]
        return min(gains) >= 0 and max(gains) > 0

    expected = [
        known(p) and not any(known(q) and dominates(q, p) for q in points) for p in points
    ]  # by the definition, pair by pair
    x, y = [p[0] for p in points], [p[1] for p in points]
    assert pareto_front(x, y, x_less=x_less, y_less=y_less) == expected


def test_equal_points_are_on_the_front_together():
    assert pareto_front([1, 1, 1, 2], [5, 5, 4, 3], x_less=False, y_less=False) == [True, True, False, True]


def test_an_infinite_value_counts():
    assert pareto_front([1.0, math.inf], [1.0, 0.0], x_less=False, y_less=False) == [True, True]


@pytest.mark.parametrize(
    ("metric", "less"),
    [
        ("val/map50", False),
        ("recovery/deepsparse/map50", False),
        ("sparsity/prunable", False),
        ("quantized/convolutions", False),
        ("benchmark/openvino/sparse/b1/items_per_s", False),
        ("images_per_s", False),
        ("verify/openvino/matched_of_torch", False),
        ("verify/openvino/map50_difference", False),
        ("verify/openvino/map50_difference_error", True),
        ("verify/openvino/score_mean", True),
        ("verify/openvino/box_max_px", True),
        ("benchmark/openvino/sparse/b1/latency_p50_ms", True),
        ("benchmark/openvino/sparse/b1/spread", True),
        ("size/onnx_gzip_mb", True),
        ("time/train_s", True),
        ("loss/obj", True),
    ],
)
def test_orientation_of_the_names_of_result_json(metric, less):
    assert less_is_better(metric) is less


@pytest.mark.parametrize(("x_less", "y_less"), itertools.product([False, True], repeat=2))
def test_the_staircase_touches_each_point_and_crosses_nothing_better(x_less, y_less):
    front = [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)] if x_less == y_less else [(1.0, 1.0), (2.0, 2.0), (4.0, 3.0)]
    corners = staircase(front, x_less=x_less)
    assert set(front) <= set(corners)
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(corners))
    # Each corner is beaten by a point of the front, or is one: it lies on the edge of what they beat.
    for x, y in corners:
        assert any((x >= a if x_less else x <= a) and (y >= b if y_less else y <= b) for a, b in front)
