"""Which layers are quantized, and how: against a record of SparseML 1.8.0, and refusals."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from sparse_exp.errors import RecipeError
from sparse_exp.quantization.quantizers import begin, prepare
from sparse_exp.quantization.scheme import (
    LayerScheme,
    as_data,
    from_data,
    layer_schemes,
)
from sparse_exp.yolov5 import YOLOv5

_DATA = Path(__file__).resolve().parents[2] / "data"
RECORD = json.loads(lzma.decompress((_DATA / "quantization-schemes.json.xz").read_bytes()))
LEAVE_OUT = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]


@pytest.fixture(scope="module")
def model():
    return YOLOv5(RECORD["size"], RECORD["classes"])


def in_words(scheme: LayerScheme) -> str:
    return ", ".join(
        f"{part.num_bits} {'symmetric' if part.symmetric else 'affine'} "
        f"{'channel' if part.per_channel else 'tensor'} {part.averaging:g}"
        if part
        else "-"
        for part in (scheme.inputs, scheme.weights, scheme.outputs)
    )


@pytest.mark.parametrize("record", RECORD["records"], ids=lambda record: json.dumps(record["arguments"])[:60])
def test_layers_and_schemes_are_those_that_sparseml_chooses(record, model):
    expected = {
        name: scheme for scheme, group in record["schemes"].items() for name in RECORD["groups"][group]
    }
    found = layer_schemes(record["arguments"], model)
    assert {name: in_words(scheme) for name, scheme in found.items()} == expected
    assert list(found) == [name for name, _ in model.named_modules() if name in found]


def test_the_record_holds_both_dialects_and_every_kind_of_scheme():
    schemes = {scheme for record in RECORD["records"] for scheme in record["schemes"]}
    assert len(RECORD["records"]) >= 60
    assert sum("submodules" in record["arguments"] for record in RECORD["records"]) >= 5
    assert all(any(word in scheme for scheme in schemes) for word in ("channel", "2 ", ", -", "0.05", "-, "))


def test_a_model_with_quantizers_gives_the_same_schemes(model):
    arguments = {"ignore": ["Concat"]}
    schemes = layer_schemes(arguments, model)
    quantized = begin(prepare(YOLOv5(RECORD["size"], RECORD["classes"]), schemes))
    assert layer_schemes(arguments, quantized) == schemes


def test_schemes_survive_as_plain_data(model):
    schemes = layer_schemes({"scheme": {"output_activations": {"num_bits": 7}}, "ignore": LEAVE_OUT}, model)
    assert from_data(json.loads(json.dumps(as_data(schemes)))) == schemes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"model\.12 \(Concat\).*Let it leave out"),
        ({"ignore": ["Concat"], "scheme": "tensorrt"}, "quantization scheme.*tensorrt"),
        ({"ignore": ["Linear", *LEAVE_OUT]}, "each of ignore.*'Linear'.*strict: False"),
        ({"ignore": LEAVE_OUT, "scheme_overrides": {"model.25": None}}, "scheme_overrides.*'model.25'"),
        ({"ignore": LEAVE_OUT, "scheme_overrides": {"C3": None}}, "one without parts.*'C3'"),
        ({"ignore": LEAVE_OUT, "scheme": {"weights": {"num_bits": 16}}}, "from 2 to 8.*16"),
        ({"ignore": LEAVE_OUT, "scheme": {"weight": {}}}, "each key of a quantization scheme.*'weight'"),
        ({"ignore": LEAVE_OUT, "scheme": {"weights": {"bits": 8}}}, "weights.*num_bits"),
        ({"ignore": LEAVE_OUT, "scheme": {"input_activations": {"strategy": "channel"}}}, "only weights"),
        ({"ignore": LEAVE_OUT, "scheme": {"weights": {"kwargs": {"observer": "x"}}}}, "observer option"),
        ({"ignore": LEAVE_OUT, "model_fuse_fn_name": "no_fuse"}, "always folded"),
        ({"ignore": LEAVE_OUT, "submodules": ["model"]}, "one dialect"),
        ({"submodules": ["model.25"]}, "submodules.*'model.25'"),
        ({"submodules": ["model"], "custom_quantizable_module_types": ["C3"]}, r"model\.2 \(C3\)"),
        ({"submodules": ["model"], "tensorrt": True}, "tensorrt"),
        ({"submodules": "model"}, "list of names"),
        ({"bits": 8}, "each argument.*'bits'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(arguments, words, model):
    with pytest.raises(RecipeError, match=f"(?i){words}") as caught:
        layer_schemes(arguments, model)
    assert "\n" not in str(caught.value)
