import json

import numpy as np

from sparse_exp.metrics.classes import as_plain, class_metrics
from sparse_exp.metrics.detection import Matcher


def found(hits: int):
    """Of two objects of class 0 so many are found, of class 1 there is none, of class 2 one is not found."""
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [90, 90, 99, 99]], np.float32)
    detections = np.array([[*box, 0.9, 0] for box in boxes[:hits]], np.float32).reshape(-1, 6)
    matcher = Matcher(3)
    matcher.add(detections, boxes, np.array([0, 0, 2]))
    return matcher.accuracies().by_class


def test_each_class_with_objects_has_its_numbers_beside_those_of_the_dense_network():
    metrics = class_metrics(["car", "cat", "$$ <b>/car"], found(2), found(1))
    assert {name.rsplit("/", 1)[0] for name in metrics} == {"class/car", "class/__ _b__car"}
    assert metrics["class/car/map50"] == 1.0
    assert metrics["class/car/dense_map50"] == np.mean([r <= 0.5 for r in np.linspace(0, 1, 101)])
    assert (metrics["class/car/precision"], metrics["class/car/recall"]) == (1.0, 1.0)
    assert metrics["class/__ _b__car/f1"] == 0.0
    assert "class/car/dense_map50" not in class_metrics(["a", "b", "c"], found(2), None)


def test_equal_names_are_told_apart():
    names = {name.split("/")[1] for name in class_metrics(["a/b", "x", "A_B"], found(2), None)}
    assert names == {"a_b", "A_B 2"}


def test_plain_data_is_json_without_what_is_no_number():
    plain = json.loads(json.dumps(as_plain(found(2)), allow_nan=False))
    assert plain["objects"] == [2, 0, 1]
    assert plain["ap50"] == [1.0, None, 0.0]
    assert plain["confusion"] == [[2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
