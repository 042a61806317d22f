"""How weights are rounded, by engines, CPU and configuration."""

from __future__ import annotations

import pytest

from sparse_exp.config.schema import HardwareConfig, RecipeConfig
from sparse_exp.quantization import weights
from sparse_exp.quantization.scheme import LayerScheme, TensorScheme
from sparse_exp.quantization.weights import AS_THE_RECIPE_SAYS, WeightChoice, choose_weights
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.yolov5 import YOLOv5

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
    monkeypatch.setattr(weights.platform, "machine", lambda: machine)
    hardware = HardwareConfig(name="here", engines=engines, isa=target)
    found = choose_weights(RecipeConfig(), hardware, host)
    assert (found.per_channel, found.num_bits) == chosen
    explicit = choose_weights(RecipeConfig(weight_scales="channel", weight_bits="7"), hardware, host)
    assert (explicit.per_channel, explicit.num_bits) == (True, 7)
    assert "recipe.weight_scales" in explicit.why
    assert "recipe.weight_bits" in explicit.why


def test_only_weights_change_and_never_to_more_bits():
    changed = WeightChoice(per_channel=True, num_bits=7).applied_to(SCHEMES, {})
    assert changed["conv"] == LayerScheme(TensorScheme(), TensorScheme(7, symmetric=True, per_channel=True))
    assert changed["add"] == SCHEMES["add"]
    assert changed["narrow"].weights == TensorScheme(4, symmetric=True, per_channel=True)
    assert AS_THE_RECIPE_SAYS.applied_to(SCHEMES, {}) == SCHEMES


def test_a_strategy_that_the_recipe_names_holds():
    arguments = {"scheme_overrides": {"model.3": {"weights": {"strategy": "tensor"}}}}
    changed = WeightChoice(per_channel=True, num_bits=7).applied_to(SCHEMES, arguments)
    assert changed["conv"].weights == TensorScheme(7, symmetric=True)


def test_a_recipe_quantizes_as_was_chosen(recipe_text):
    model = YOLOv5("n", 2)
    Recipe(recipe_text, weights=WeightChoice(per_channel=True, num_bits=7)).apply_structure(model)
    quantizer = model.get_submodule("model.3.conv.weight_quantizer")
    assert quantizer.scale.shape == (64,) == (model.model[3].conv.out_channels,)
    assert quantizer.scheme.steps == (-64, 63)
