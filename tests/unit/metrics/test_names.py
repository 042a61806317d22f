import pytest

from sparse_exp.errors import ConfigError
from sparse_exp.metrics.names import Limit, full_name, parse_limits

CELLS = [
    f"benchmark/{engine}/{variant}/b{batch}/{value}"
    for engine in ("deepsparse", "openvino")
    for variant in ("dense", "sparse")
    for batch in (1, 32)
    for value in ("items_per_s", "latency_p50_ms", "latency_p99_ms", "spread")
]
METRICS = {
    *CELLS, "val/map50", "val/map50_95", "test/map50", "deployed/openvino/map50", "time/train_s",
    "size/checkpoint_mb", "size/onnx_mb", "size/onnx_gzip_mb", "size/macs",
    "sparsity/prunable", "sparsity/total",
    "deployed/openvino/dense/map50", "size/sparse_fp32/onnx_mb", "size/dense_int8/openvino/onnx_gzip_mb",
    "recovery/map50", "recovery/deepsparse/map50", "recovery/openvino/map50",
}  # fmt: skip


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("val/map50", "val/map50"),
        ("map50", "val/map50"),
        ("map50_95", "val/map50_95"),
        ("test/map50", "test/map50"),
        ("deployed", "deployed/openvino/map50"),
        ("train_s", "time/train_s"),
        ("size", "size/onnx_gzip_mb"),
        ("checkpoint", "size/checkpoint_mb"),
        ("onnx_mb", "size/onnx_mb"),
        ("int8", "size/dense_int8/openvino/onnx_gzip_mb"),
        ("openvino/dense/map50", "deployed/openvino/dense/map50"),
        ("sparsity", "sparsity/prunable"),
        ("items_per_s", "benchmark/deepsparse/sparse/b1/items_per_s"),
        ("openvino/items_per_s", "benchmark/openvino/sparse/b1/items_per_s"),
        ("openvino/dense/items_per_s", "benchmark/openvino/dense/b1/items_per_s"),
        ("b32/items_per_s", "benchmark/deepsparse/sparse/b32/items_per_s"),
        ("p99", "benchmark/deepsparse/sparse/b1/latency_p99_ms"),
        ("recovery", "recovery/map50"),
        ("recovery/openvino", "recovery/openvino/map50"),
    ],
)
def test_short_names(short, full):
    assert full_name(short, METRICS) == full


def test_a_size_is_that_of_a_file():
    assert full_name("size", {"size/checkpoint_mb", "size/macs", "size/dense_macs"}) == "size/checkpoint_mb"


def test_a_name_that_fits_several_lists_them():
    with pytest.raises(ConfigError, match=r"latency_p50_ms, benchmark/\S+/latency_p99_ms") as error:
        full_name("latency", METRICS)
    assert "\n" not in str(error.value)
    without = {metric for metric in METRICS if "/b1/" not in metric and "deepsparse" not in metric}
    assert full_name("items_per_s", without) == "benchmark/openvino/sparse/b32/items_per_s"
    with pytest.raises(ConfigError, match=r"b32/items_per_s, .*b64/items_per_s"):
        full_name("items_per_s", {*without, "benchmark/openvino/sparse/b64/items_per_s"})


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("val/map5", "val/map50"), ("itms_per_s", "items_per_s"), ("train-s", "train_s")]
)
def test_a_name_that_fits_none_names_the_nearest(wrong, nearest):
    with pytest.raises(ConfigError, match=f"got '{wrong}'.*Nearest: .*{nearest}") as error:
        full_name(wrong, METRICS)
    assert "\n" not in str(error.value)


def test_a_name_like_none_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"There are checkpoint_mb, .*items_per_s"):
        full_name("zzz", METRICS)


def test_limits():
    limits = parse_limits("map50>=0.6, size <= 4,train_s<1e3", METRICS)
    assert limits == [
        Limit("val/map50", ">=", 0.6),
        Limit("size/onnx_gzip_mb", "<=", 4.0),
        Limit("time/train_s", "<", 1000.0),
    ]
    assert [limits[0].keeps(value) for value in (0.6, 0.59, None, float("nan"))] == [
        True,
        False,
        False,
        False,
    ]
    assert [limits[2].keeps(value) for value in (999.0, 1000.0)] == [True, False]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("sparsity>=70%", [False, True, True]),
        ("sparsity = 0.7", [False, True, False]),
        ("sparsity == 0.7", [False, True, False]),
        ("sparsity!=0.7", [True, False, True]),
        ("sparsity<0.7 sparsity>1%", [True, False, False]),
        (" ", [True, True, True]),
    ],
)
def test_signs_percentages_and_spaces(text, kept):
    limits = parse_limits(text, METRICS)
    assert {limit.metric for limit in limits} <= {"sparsity/prunable"}
    assert [all(limit.keeps(value) for limit in limits) for value in (0.69, 0.7, 0.71)] == kept
    assert not any(limit.keeps(None) for limit in limits)


@pytest.mark.parametrize(
    "text",
    [
        "map50",
        "map50>=",
        "map50>=many",
        "map50=>0.6",
        ">=3",
        "map50>=70 %",
        "map50>=%",
        "map50>=nan",
        "1<map50<2",
    ],
)
def test_what_is_no_limit_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match="Expected --best to be limits") as error:
        parse_limits(text, METRICS)
    assert "\n" not in str(error.value)
