from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp.errors import ConfigError
from sparse_exp.sources.local import Published
from sparse_exp.zoo.search import find_models

MODEL = {
    "size": "s",
    "dataset": "trees",
    "tag": "pruned75_quant-none-vnni",
    "recipe": "transfer_quant",
    "stub": "zoo:cv/detection/yolov5-s/pytorch/sparse_exp/trees/pruned75_quant-none-vnni",
    "sparsity": 0.7504,
    "quantized": True,
    "block4": True,
    "imgsz": 320,
    "classes": ["Tree crown", "dead"],
    "published": "2026-11-22T10:00:00Z",
    "metrics": {
        "val/map50": 0.55,
        "val/map50_95": 0.3,
        "test/map50": 0.7,
        "recovery/map50": 0.98,
        "recovery/deepsparse/map50": 0.98,
        "recovery/openvino/map50": 0.9,
        "size/onnx_gzip_mb": 2.5,
        "size/onnx_mb": 7.5,
        "benchmark/deepsparse/sparse/b1/items_per_s": 100.0,
        "benchmark/openvino/sparse/b1/items_per_s": 50.0,
        "benchmark/openvino/sparse/b1/latency_p50_ms": 20.0,
        "benchmark/openvino/sparse/b1/latency_p99_ms": 25.0,
        "weights/origin": "scratch",
    },
}
DENSE = {**MODEL, "tag": "base-none", "sparsity": 0.0, "quantized": False, "block4": False, "metrics": {}}
MODELS = [Published(str(model["tag"]), Path(), model) for model in (MODEL, DENSE)]


@pytest.mark.parametrize(
    ("query", "fits", "fits_dense"),
    [
        ("", True, True),
        ("size=s sparsity>=0.7 quantized", True, False),
        ("size = s   sparsity >= 70% quantized", True, False),
        ("SIZE=S", True, True),
        ("size!=s", False, False),
        ("size=n", False, False),
        ("sparsity>0.7504", False, False),
        ("sparsity<0.7504", False, True),
        ("sparsity<=75.04%", True, True),
        ("sparsity=0", False, True),
        ("map50>0.5", True, False),  # what was not measured fits no comparison
        ("map50<0.5", False, False),
        ("onnx_gzip_mb<3 imgsz=320 classes=2", True, False),
        ("quantized=no", False, True),
        ("quantized!=true", False, True),
        ("dense", False, True),
        ("pruned vnni", True, False),
        ("trees", True, True),
        ("elms", False, False),
        ("dead", True, True),
        ("tree*", True, True),
        ("pruned75", True, False),
        ("transfer_quant", True, True),
        ("dataset=t*s tag!=base*", True, False),
        ("stub=*/trees/*", True, True),
        ("published>=2026-11", True, True),
        ("published<2026-11", False, False),
        ("published<2026", False, False),
        ("published>=2026", True, True),
        # as compare --best has it
        ("map50>=0.5, size<=4", True, False),
        ("map50>=0.5,size<=2", False, False),
        ("size==s", True, True),
        ("sparsity==0 quantized==no", False, True),
        ("val/map50>=55%", True, False),
        ("test/map50>=0.7", True, False),
        ("test/map50!=0.7", False, False),
        ("MAP50>0.5", True, False),
        ("recovery>=0.95", True, False),
        ("recovery/openvino>=0.95", False, False),
        ("items_per_s>99", True, False),
        ("openvino/items_per_s>99", False, False),
        ("p99<30", True, False),
        ("size=2.5", True, False),
        ("onnx_mb>7, trees, quantized", True, False),
    ],
)
def test_what_a_search_finds(query, fits, fits_dense):
    wanted = [model for model, is_found in zip(MODELS, (fits, fits_dense), strict=True) if is_found]
    assert find_models(query, MODELS) == wanted


@pytest.mark.parametrize("key", ["map50", "map50_95", "recovery", "onnx_mb", "onnx_gzip_mb", "size"])
def test_metrics_that_all_know_may_be_named_where_no_model_has_them(key):
    assert find_models(f"{key}>0", MODELS[1:]) == []
    assert find_models(f"{key}>0", []) == []


@pytest.mark.parametrize(
    ("query", "term", "fragment"),
    [
        ("size=s sparseness>=0.7", "sparseness>=0.7", "a key of size, dataset, "),
        ("sparsity>=much", "sparsity>=much", "sparsity compared with a number"),
        ("size>s", "size>s", "size=VALUE or size!=VALUE"),
        ("quantized=maybe", "quantized=maybe", "quantized=true or quantized=false"),
        ("quantized>no", "quantized>no", "quantized=true or quantized=false"),
        ("size=", "size=", "KEY OP VALUE"),
        ("=s", "=s", "KEY OP VALUE"),
        ("size=>s", "size=>s", "KEY OP VALUE, OP one of = == != <= >= < >"),
        ("map50>=many", "map50>=many", "map50 compared with a number"),
        ("size<=", "size<=", "KEY OP VALUE"),
        ("size>=nan", "size>=nan", "size=VALUE or size!=VALUE"),
        ("weights/origin=scratch", "weights/origin=scratch", "a key of size, dataset, "),
        ("0.1<sparsity<0.5", "0.1<sparsity<0.5", "KEY OP VALUE"),
    ],
)
def test_a_term_that_cannot_be_is_named(query, term, fragment):
    with pytest.raises(ConfigError) as raised:
        find_models(query, MODELS)
    message = str(raised.value)
    assert f"but got '{term}'" in message
    assert fragment in message
    assert "\n" not in message


def test_a_metric_that_fits_several_lists_them():
    with pytest.raises(ConfigError, match=r"got 'latency'.*latency_p50_ms, \S+latency_p99_ms. Name more"):
        find_models("latency<20", MODELS)


@pytest.mark.parametrize(
    ("imgsz", "fits"), [([384, 640], True), (640, True), (384, False), (None, False), ("?", False)]
)
def test_the_longer_side_of_images_counts(imgsz, fits):
    model = Published("tag", Path(), {**MODEL, "imgsz": imgsz})
    assert find_models("imgsz=640", [model]) == [model] * fits
