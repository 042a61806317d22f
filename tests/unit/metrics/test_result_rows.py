import pytest

from sparse_exp.metrics.result_rows import accuracies, number, recovery, sizes, throughputs, verifications

RESULT = {
    "val/map50": 0.548,
    "val/map50_95": 0.2,
    "deployed/openvino/map50": 0.546,
    "deployed/deepsparse/map50": 0.55,
    "deployed/deepsparse/map50_95": 0.21,
    "weights/origin": "index:x",
    "benchmark/openvino/sparse/b1/items_per_s": 19.9,
    "benchmark/openvino/dense/b1/items_per_s": 20.0,
    "benchmark/deepsparse/sparse/b1/items_per_s": 40.0,
    "benchmark/deepsparse/sparse/b1/latency_p50_ms": 25.0,
    "benchmark/deepsparse/sparse/b1/spread": 0.03,
    "benchmark/deepsparse/dense/b1/items_per_s": 13.0,
    "benchmark/deepsparse/sparse/b16/items_per_s": 60.0,
    "benchmark/deepsparse/sparse_fp32/b16/items_per_s": 50.0,
    "benchmark/deepsparse/sparse/b16_throughput/items_per_s": 66.0,
    "benchmark/openvino/dense/b16_throughput/items_per_s": 33.0,
    "deployed/deepsparse/dense/map50": 0.6,
}


def test_speedup_is_against_the_best_dense_engine_under_the_same_load():
    rows = {(row.load, row.engine, row.variant): row for row in throughputs(RESULT)}
    assert list(rows) == [
        ("b1", "deepsparse", "dense"),
        ("b1", "deepsparse", "sparse"),
        ("b1", "openvino", "dense"),
        ("b1", "openvino", "sparse"),
        ("b16", "deepsparse", "sparse_fp32"),
        ("b16", "deepsparse", "sparse"),
        ("b16_throughput", "deepsparse", "sparse"),
        ("b16_throughput", "openvino", "dense"),
    ]
    sparse = rows["b1", "deepsparse", "sparse"]
    assert sparse.speedup == pytest.approx(40 / 20)
    assert (sparse.items_per_s, sparse.p50, sparse.p90, sparse.spread) == (40.0, 25.0, None, 0.03)
    assert rows["b1", "openvino", "dense"].speedup == 1.0
    assert rows["b16", "deepsparse", "sparse"].speedup is None
    assert rows["b16_throughput", "deepsparse", "sparse"].speedup == pytest.approx(2)
    assert rows["b16_throughput", "deepsparse", "sparse"].batch == 16


def test_accuracies():
    assert accuracies(RESULT) == [
        ("torch", 0.548, 0.2, ""),
        ("deepsparse", 0.55, 0.21, "+0.0020"),
        ("openvino", 0.546, None, "-0.0020"),
        ("deepsparse dense", 0.6, None, "-"),
    ]
    assert accuracies({"deployed/openvino/map50": 0.5}) == [("openvino", 0.5, None, "-")]


def test_the_held_out_split_stands_beside_the_validation_split():
    result = {"val/map50": 0.5, "test/map50": 0.4, "test/map50_95": 0.1, "deployed/openvino/map50": 0.5}
    assert accuracies(result) == [
        ("torch", 0.5, None, ""),
        ("torch, test split", 0.4, 0.1, "-"),
        ("openvino", 0.5, None, "+0.0000"),
    ]


def test_sizes_of_each_network_the_dense_first():
    result = {
        "size/checkpoint_mb": 29.0,
        "size/onnx_mb": 7.0,
        "size/onnx_gzip_mb": 2.0,
        "size/nonzero_mb": 1.5,
        "size/qdq/onnx_mb": 28.5,
        "size/onnxruntime/onnx_mb": 28.6,
        "size/sparse_fp32/nonzero_mb": 6.0,
        "size/dense_onnx_mb": 28.0,
        "size/dense_nonzero_mb": 27.9,
        "size/dense_int8/openvino/onnx_mb": 8.0,
        "size/dense_int8/deepsparse/onnx_mb": 7.5,
        "val/map50": 0.5,
    }
    assert sizes(result) == [
        ("dense fp32", [None, 28.0, None, 27.9]),
        ("dense int8, deepsparse", [None, 7.5, None, None]),
        ("dense int8, openvino", [None, 8.0, None, None]),
        ("sparse fp32", [None, None, None, 6.0]),
        ("deployed", [29.0, 7.0, 2.0, 1.5]),
        ("deployed, as QDQ graph", [None, 28.5, None, None]),
        ("deployed, for ONNX Runtime", [None, 28.6, None, None]),
    ]
    assert sizes({"val/map50": 0.5}) == []


def test_a_text_is_no_number():
    assert number(RESULT, "weights/origin") is None
    assert number(RESULT, "nothing") is None


def test_verifications():
    result = {
        "verify/openvino/score_mean": 0.004,
        "verify/deepsparse/score_mean": 0.002,
        "verify/deepsparse/map50_difference": -0.001,
        "verify/deepsparse/matched_of_torch": 0.97,
    }
    first, second = verifications(result)
    assert (first.engine, first.score_mean, first.matched_of_torch) == ("deepsparse", 0.002, 0.97)
    assert (first.map50_difference, first.box_max_px) == (-0.001, None)
    assert second.engine == "openvino"
    assert verifications({"deployed/openvino/map50": 0.5}) == []


def test_recovery():
    assert (
        recovery({"recovery/map50": 0.981, "baseline/map50": 0.612})
        == "Keeps 98.1% of the dense mAP50 0.612."
    )
    each = {"recovery/openvino/map50": 0.97, "recovery/deepsparse/map50": 0.981}
    said = recovery({**each, "recovery/map50": 0.981, "baseline/map50": 0.612})
    assert said == "Keeps 98.1% of the dense mAP50 0.612, in deepsparse."
    assert recovery({"baseline/map50": 0.0}) == "The dense baseline has mAP50 0.000."
    assert recovery({"val/map50": 0.6}) == ""
