from __future__ import annotations

import pytest

from sparse_exp.errors import ConfigError
from sparse_exp.zoo.query import parse_query

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
    "metrics": {"val/map50": 0.55, "size/onnx_gzip_mb": 2.5},
}
DENSE = {**MODEL, "tag": "base-none", "sparsity": 0.0, "quantized": False, "block4": False, "metrics": {}}


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
    ],
)
def test_what_a_query_finds(query, fits, fits_dense):
    test = parse_query(query)
    assert (test(MODEL), test(DENSE)) == (fits, fits_dense)


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
        ("size==s", "size==s", "KEY OP VALUE"),
        ("0.1<sparsity<0.5", "0.1<sparsity<0.5", "KEY OP VALUE"),
    ],
)
def test_a_term_that_cannot_be_is_named(query, term, fragment):
    with pytest.raises(ConfigError) as raised:
        parse_query(query)
    message = str(raised.value)
    assert f"but got '{term}'" in message
    assert fragment in message
    assert "\n" not in message
