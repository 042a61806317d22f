"""How layers are quantized, by engines, CPU and configuration."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_exp.config.schema import HardwareConfig, RecipeConfig
from sparse_exp.errors import RecipeError
from sparse_exp.quantization import choice
from sparse_exp.quantization.choice import AS_THE_RECIPE_SAYS, QuantizationChoice, choose_quantization
from sparse_exp.quantization.quantizers import schemes_of
from sparse_exp.quantization.scheme import LayerScheme, TensorScheme, is_older, layer_schemes
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.yolov5 import YOLOv5

_DATA = Path(__file__).resolve().parents[2] / "data"
RECORD = json.loads(lzma.decompress((_DATA / "quantization-schemes.json.xz").read_bytes()))
ALL, OTHERS = ["openvino", "deepsparse"], ["openvino", "onnxruntime"]
SCHEMES = {
    "conv": LayerScheme(TensorScheme(), TensorScheme(symmetric=True)),
    "add": LayerScheme(TensorScheme()),
    "narrow": LayerScheme(None, TensorScheme(4, symmetric=True)),
}


@pytest.mark.parametrize(
    ("engines", "target", "host", "machine", "chosen"),
    [
        (ALL, [], ["avx2", "avx512", "vnni"], "x86_64", (False, 8)),
        (ALL, [], ["avx2"], "x86_64", (False, 7)),
        (OTHERS, ["vnni"], ["avx2"], "x86_64", (True, 8)),
        (OTHERS, ["avx2"], ["avx2", "vnni"], "arm64", (True, 7)),
        (OTHERS, [], [], "aarch64", (True, 8)),
    ],
)
def test_the_target_decides_where_the_configuration_does_not(
    engines, target, host, machine, chosen, monkeypatch
):
    monkeypatch.setattr(choice.platform, "machine", lambda: machine)
    hardware = HardwareConfig(name="here", engines=engines, isa=target)
    found = choose_quantization(RecipeConfig(), hardware, host)
    assert (found.per_channel, found.num_bits) == chosen
    explicit = choose_quantization(RecipeConfig(weight_scales="channel", weight_bits="7"), hardware, host)
    assert (explicit.per_channel, explicit.num_bits) == (True, 7)
    assert "recipe.weight_scales" in explicit.why
    assert "recipe.weight_bits" in explicit.why


def test_only_weights_change_and_never_to_more_bits():
    changed = QuantizationChoice(per_channel=True, num_bits=7).applied_to(SCHEMES, {}, nn.Module())
    assert changed["conv"] == LayerScheme(TensorScheme(), TensorScheme(7, symmetric=True, per_channel=True))
    assert changed["add"] == SCHEMES["add"]
    assert changed["narrow"].weights == TensorScheme(4, symmetric=True, per_channel=True)
    assert AS_THE_RECIPE_SAYS.applied_to(SCHEMES, {}, nn.Module()) == SCHEMES


def test_a_strategy_that_the_recipe_names_holds():
    arguments = {"scheme_overrides": {"model.3": {"weights": {"strategy": "tensor"}}}}
    changed = QuantizationChoice(per_channel=True, num_bits=7).applied_to(SCHEMES, arguments, nn.Module())
    assert changed["conv"].weights == TensorScheme(7, symmetric=True)


def test_a_recipe_quantizes_as_was_chosen(recipe_text):
    model = YOLOv5("n", 2)
    Recipe(recipe_text, quantization=QuantizationChoice(per_channel=True, num_bits=7)).apply_structure(model)
    quantizer = model.get_submodule("model.3.conv.weight_quantizer")
    assert quantizer.scale.shape == (64,) == (model.model[3].conv.out_channels,)
    assert quantizer.scheme.steps == (-64, 63)


def test_outputs_are_trained_where_that_is_asked():
    hardware = HardwareConfig(name="here", engines=["onnxruntime"])
    for asked in (False, True):
        chosen = choose_quantization(RecipeConfig(train_outputs=asked), hardware, ["avx2"])
        assert chosen.outputs == asked
        assert ("outputs, too" in chosen.why) == asked


def test_all_outputs_before_a_silu_are_trained(recipe_text):
    model = YOLOv5("n", 2)
    recipe = Recipe(recipe_text, quantization=QuantizationChoice(outputs=True))
    schemes = schemes_of(recipe.apply_structure(model))
    before_silu = {name for name, scheme in schemes.items() if scheme.outputs}
    assert before_silu == {
        name for name in model.quantizable_convolutions() if name.endswith(".conv") or ".cv" in name
    }
    assert len(before_silu) == len(model.quantizable_convolutions()) - 3  # those of the head
    model.train()(torch.randn(2, 3, 64, 64).abs() * 100)
    norm = model.get_submodule("model.3.bn")
    norm.output_quantizer.low.fill_(-40.0)
    norm.output_quantizer.observe(torch.tensor([-50.0, 3.0]))
    first, _ = norm.output_quantizer.scheme.steps
    lowest = (first - norm.output_quantizer.zero_point) * norm.output_quantizer.scale
    assert float(lowest) == pytest.approx(-8.0, abs=float(norm.output_quantizer.scale))


def test_outputs_that_the_recipe_rounds_stay_as_it_says():
    model = YOLOv5("n", 2)
    own = LayerScheme(TensorScheme(), TensorScheme(symmetric=True), TensorScheme(4))
    schemes = {"model.3.conv": own, "model.24.m.0": replace(own, outputs=None)}
    changed = QuantizationChoice(outputs=True).applied_to(schemes, {}, model)
    assert changed == schemes


ALIASES = [
    {},
    {"scheme": "deepsparse", "scheme_overrides": {"model.3": "default"}},
    {"scheme": {"weights": {"num_bits": 6}}, "scheme_overrides": {"model.3": "deepsparse"}},
    {"scheme_overrides": {"model.3": {"weights": None}, "model.4": {}, "model.5": None}},
]
ARGUMENTS = [
    *(r["arguments"] for r in RECORD["records"][::3]),
    *({"ignore": ["Concat"], **a} for a in ALIASES),
]


@pytest.mark.parametrize(("per_channel", "num_bits"), [(None, 7), (True, None), (True, 7), (False, 8)])
def test_a_choice_written_into_the_arguments_is_the_choice_applied(per_channel, num_bits):
    chosen, model = QuantizationChoice(per_channel, num_bits), YOLOv5("n", 2)
    assert {is_older(arguments) for arguments in ARGUMENTS} == {True, False}
    for arguments in ARGUMENTS:
        if per_channel and is_older(arguments):
            with pytest.raises(RecipeError, match=r"recipe\.weight_scales=tensor"):
                chosen.written_into(arguments)
            continue
        written = chosen.written_into(arguments)
        wanted = chosen.applied_to(layer_schemes(arguments, model), arguments, model)
        assert layer_schemes(written, model) == wanted, arguments
        assert chosen.written_into(written) == written


def test_the_text_that_sparseml_runs_says_what_was_chosen(recipe_text):
    chosen = QuantizationChoice(per_channel=True, num_bits=7)
    run = Recipe(recipe_text, engine="sparseml", quantization=chosen)
    again = Recipe(run.text, engine="sparseml")  # as a checkpoint's is read
    for recipe in (run, again):
        model = recipe.apply_structure(YOLOv5("n", 2))
        scheme = model.get_submodule("model.3.conv.weight_quantizer").scheme
        assert scheme == TensorScheme(7, symmetric=True, per_channel=True)
    assert Recipe(recipe_text, quantization=chosen).text == Recipe(recipe_text).text


@pytest.mark.parametrize("scheme", [{"weights": {"num_bits": "8"}}, {"weights": 8}, "tensorrt"])
def test_what_is_not_allowed_is_left_to_be_refused(scheme):
    written = QuantizationChoice(num_bits=7).written_into({"scheme": scheme})
    with pytest.raises(RecipeError):
        layer_schemes(written, YOLOv5("n", 2))


def test_outputs_are_not_trained_by_sparseml():
    with pytest.raises(RecipeError, match=r"recipe\.engine=native only"):
        QuantizationChoice(outputs=True).written_into({})
