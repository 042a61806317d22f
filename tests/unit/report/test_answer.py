"""The sentences that a run begins with, against numbers worked out by hand."""

import pytest

from sparse_exp.report.answer import answer, answer_table, deployed_engines

LOAD = {"key": "b1", "scenario": "sync", "batch": 1, "streams": 1, "cores": 2, "imgsz": 320, "cpu": "x"}
RESULT = {
    "size/dense_onnx_mb": 28.2,
    "size/dense_onnx_gzip_mb": 25.8,
    "baseline/map50": 0.6,
    "deployed/deepsparse/map50": 0.59,
    "deployed/openvino/map50": 0.588,
    "recovery/openvino/map50": 0.98,
    "recovery/deepsparse/map50": 0.983,
}


def row(engine, variant, each, **more):
    speed = sorted(each)[len(each) // 2]
    return {**LOAD, "engine": engine, "variant": variant, "each": each, "items_per_s": speed, **more}


def steady(speed, shift=0.0):
    """Speeds of eight turns that go up and down by a hundredth."""
    return [speed * (1 + 0.01 * (-1) ** turn + shift * (turn % 3)) for turn in range(8)]


SIZE = {"size_mb": 7.3, "gzip_mb": 2.4}
SQUARE = [
    row("onnxruntime", "dense", steady(20.0)),
    row("openvino", "dense", steady(18.0)),
    row("openvino", "dense_int8", steady(30.0)),
    row("openvino", "sparse", steady(40.0, 1e-3), model="model.qdq.onnx", map50=0.588, **SIZE),
    row("deepsparse", "sparse", steady(60.0, 1e-3), model="model.onnx", size_mb=7.4, map50=0.59),
    {**row("torch", "sparse", [1.0]), "impossible": "It has no integers."},
    row("openvino", "sparse", steady(90.0), key="b16", batch=16, model="model.qdq.onnx"),
]


def test_what_may_be_shipped_comes_first_with_its_speed_size_and_accuracy():
    file, speed, other, accuracy = answer(RESULT, SQUARE)
    assert file == (
        "Deployed: model.qdq.onnx in OpenVINO (Apache-2.0: may be shipped); 40.4 images a second on 2 cores "
        "(batch 1); 7.3 MB instead of 28.2, compressed 2.4 MB instead of 25.8."
    )
    assert speed.startswith("It is 2.00 times (2.00 to 2.00) as fast as the fastest dense network in fp32 ")
    assert "(ONNX Runtime's with 20.2), and 1.33 times (1.33 to 1.34) as fast as the fastest dense " in speed
    assert speed.endswith("network in 8 bits (OpenVINO's with 30.3).")
    assert (
        other
        == "DeepSparse, which may not be used in production, is 1.50 times (1.50 to 1.50) as fast as that."
    )
    assert accuracy == "It keeps 98.0 % of the dense mAP50: 0.588 of 0.600."


def test_what_cannot_be_told_apart_is_no_gain():
    noise = [30.0, 14.0, 22.0, 19.0, 35.0, 12.0, 24.0, 18.0]
    _, speed, *_ = answer(RESULT, [SQUARE[0], row("openvino", "sparse", noise)])
    assert speed.startswith("It is as fast, within noise (1.0")
    assert "), as the fastest dense network in fp32" in speed


def test_of_one_repeat_nothing_is_sure():
    _, speed, *_ = answer(RESULT, [row("onnxruntime", "dense", [20.0]), row("openvino", "sparse", [40.0])])
    assert speed.startswith("It is about 2.00 times (measured too shortly to be sure) as fast as")


def test_an_engine_that_may_not_be_shipped_is_said_to_be_for_evaluation():
    file, *_ = answer(RESULT, [row("deepsparse", "sparse", steady(60.0), model="model.onnx")])
    assert "in DeepSparse (Neural Magic community: for evaluation only, not for production)" in file


def test_the_interval_of_the_accuracy_stands_with_it():
    known = {**RESULT, "recovery/openvino/map50_low": 0.951, "recovery/openvino/map50_high": 1.022}
    assert answer(known, SQUARE)[-1] == "It keeps 98.0 % (95 to 102 %) of the dense mAP50: 0.588 of 0.600."


def test_without_a_benchmark_or_a_baseline_what_is_known_is_said():
    assert answer(RESULT, []) == ["It keeps 98.3 % of the dense mAP50: 0.590 of 0.600."]
    (only,) = answer({"deployed/openvino/map50": 0.5}, [])
    assert only == "Its mAP50 in OpenVINO is 0.500; no dense network was trained to compare it with."
    assert answer({}, []) == []


def test_the_table_has_every_file_under_the_first_load():
    titles, cells = answer_table(SQUARE)
    found = {(one[0], one[1]): dict(zip(titles, one, strict=True)) for one in cells}
    assert len(found) == 5
    assert found["OpenVINO", "deployed"] == {
        "engine": "OpenVINO", "network": "deployed", "mAP50": "0.588", "images/s": "40.4",
        "x best fp32": "2.00", "MB": "7.3", "may be shipped": "yes",
    }  # fmt: skip
    assert found["DeepSparse", "deployed"]["may be shipped"] == "no"
    assert answer_table([])[1] == []


@pytest.mark.parametrize(
    ("names", "engines"),
    [(["deployed/openvino/map50", "deployed/openvino/dense/map50", "val/map50"], ["openvino"]), ([], [])],
)
def test_the_engines_of_what_is_deployed(names, engines):
    assert deployed_engines(dict.fromkeys(names, 0.5)) == engines
