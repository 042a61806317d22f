"""What `Recipe.check` refuses before any training, each by the message that a user gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.layer_patterns import layers_matching
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.yolov5 import YOLOv5

RANGE = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 4.0\n"
IGNORE = "[SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]"


def modifier(kind: str, **arguments) -> str:
    return f"  - !{kind}\n" + "".join(f"    {name}: {value}\n" for name, value in arguments.items())


def gradual(**changes) -> str:
    arguments = {
        "start_epoch": 0.0,
        "end_epoch": 2.0,
        "update_frequency": 0.5,
        "init_sparsity": 0.05,
        "final_sparsity": 0.8,
        "params": "__ALL_PRUNABLE__",
    }
    return modifier("GMPruningModifier", **{**arguments, **changes})


@pytest.fixture(scope="module")
def model() -> YOLOv5:
    torch.manual_seed(0)
    return YOLOv5("n", 1)


REFUSED = {
    "gradual pruning that ends after the recipe": (
        gradual(end_epoch=5.0),
        r"end of GMPruningModifier of r\.md to be at most 4, but got 5.* before the final sparsity is",
    ),
    "gradual pruning that begins at the end": (
        gradual(start_epoch=4.0, end_epoch=5.0),
        r"start of GMPruningModifier of r\.md to be below 4, but got 4.* ends before it prunes",
    ),
    "a mask that is held from the end on": (
        modifier("ConstantPruningModifier", start_epoch=4.0, params="__ALL__"),
        r"start of ConstantPruningModifier of r\.md to be below 4.* ends before it prunes",
    ),
    "blocks that do not divide a layer": (
        gradual(mask_type="[1, 4]"),
        r"GMPruningModifier of r\.md prunes blocks of \[1, 4\], which do not divide model\.0\.conv .*block4",
    ),
    "two quantizations": (
        modifier("QuantizationModifier", start_epoch=1.0) + modifier("QuantizationModifier", start_epoch=2.0),
        r"r\.md quantizes 2 times.*Keep one QuantizationModifier",
    ),
    "quantization after the end": (
        modifier("QuantizationModifier", start_epoch=4.5),
        r"start of quantization to be below 4, but got 4\.5",
    ),
    "a layer in place of its weight": (
        modifier("ConstantPruningModifier", start_epoch=0.0, params="[model.2.cv1.conv]"),
        r"'model\.2\.cv1\.conv' in params, which matches no layer.*names are model\.2\.cv1\.conv\.weight",
    ),
    "a name in a mapping of sparsities": (
        gradual(final_sparsity="{0.5: [model.3.conv.weight], 0.7: [model.5.convv.weight]}", params="[]"),
        r"'model\.5\.convv\.weight' in final_sparsity.*nearest names are model\.5\.conv\.weight",
    ),
    "a pattern that is none": (
        modifier("ConstantPruningModifier", start_epoch=0.0, params="['re:model.(2']"),
        r"'re:model\.\(2' is no regular expression",
    ),
    "a submodule": (
        modifier("QuantizationModifier", start_epoch=1.0, submodules="['modell']"),
        r"QuantizationModifier of r\.md names 'modell' in submodules.*nearest names are model",
    ),
    "an excluded type": (
        modifier(
            "QuantizationModifier", start_epoch=1.0, submodules="['model']", exclude_module_types="[Silu]"
        ),
        r"names 'Silu' in exclude_module_types.*nearest names are SiLU",
    ),
    "an overridden scheme": (
        modifier("QuantizationModifier", start_epoch=1.0, scheme_overrides="{Conv3: default}"),
        r"names 'Conv3' in scheme_overrides.*nearest names are .*Conv",
    ),
    "a student's layer": (
        modifier("PerLayerDistillationModifier", start_epoch=0.0, student_layer_names="[model.71]"),
        r"names 'model\.71' in student_layer_names.*nearest names are .*model\.1",
    ),
    "quantization that torch cannot do": (
        modifier("QuantizationModifier", start_epoch=1.0),
        r"QuantizationModifier of r\.md cannot be applied to this model: .*ignore: \[.*Concat\]",
    ),
    "quantization without the layer that reads the images": (
        modifier("QuantizationModifier", start_epoch=1.0, ignore=f"{IGNORE[:-1]}, model.0]"),
        r"QuantizationModifier of r\.md leaves model\.0\.conv in floating point",
    ),
    "quantization of nothing": (
        modifier("QuantizationModifier", start_epoch=1.0, ignore="[model]"),
        r"QuantizationModifier of r\.md quantizes no convolution",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(text, message, model):
    names = list(model.state_dict())
    with pytest.raises(RecipeError, match=message) as error:
        Recipe(RANGE + text, name="r.md").check(model)
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == names  # it was tried on a copy


@pytest.mark.parametrize(
    "text",
    [
        gradual(end_epoch=4.0),
        gradual(mask_type="block4"),
        gradual(mask_type="[1, 4]", params="['re:model.3.*conv.weight']"),
        gradual(final_sparsity="{0.5: ['re:model.3.*weight'], 0.7: [model.5.conv.weight]}", params="[]"),
        gradual(params="['re:.*conv.weight']"),
        modifier("ConstantPruningModifier", start_epoch=0.0, params="__ALL__"),
        modifier("TrainableParamsModifier", params="[absent]", trainable=False, params_strict=False),
        modifier("PerLayerDistillationModifier", start_epoch=0.0, student_layer_names="[model.17]"),
    ],
)
def test_taken(text, model):
    Recipe(RANGE + text).check(model)


def test_a_published_exclusion_of_types_that_only_torch_has_is_taken(model):
    lists = {"exclude_module_types": "[SiLU, ReLU]", "custom_quantizable_module_types": "[SiLU, Linear]"}
    Recipe(RANGE + modifier("QuantizationModifier", start_epoch=1.0, submodules="['model']", **lists)).check(
        model
    )


@pytest.mark.parametrize("tag", ["NoSuchModifier", "GMPruneModifier"])
def test_a_modifier_that_is_not_known_is_refused_with_the_nearest_and_all_known(tag):
    with pytest.raises(
        RecipeError, match=rf"mine\.md has a modifier '{tag}'.*nearest names are .*Modifier.*SetParamModifier"
    ) as error:
        Recipe(RANGE + modifier(tag, start_epoch=0.0), name="mine.md")
    assert "\n" not in str(error.value)


def test_arguments_out_of_range_are_refused_in_one_line():
    rates = {"lr_func": "linear", "init_lr": 0.1, "final_lr": 0.01}
    backwards = modifier("LearningRateFunctionModifier", start_epoch=3.0, end_epoch=2.0, **rates)
    with pytest.raises(
        RecipeError, match=r"Expected end_epoch of .* of mine\.md to be above 3, but got 2"
    ) as error:
        Recipe(RANGE + backwards, name="mine.md")
    assert "\n" not in str(error.value)


def test_distillation_without_a_teacher_is_refused(model):
    recipe = Recipe(RANGE + modifier("DistillationModifier", start_epoch=0.0), name="r.md")
    assert recipe.distills
    with pytest.raises(RecipeError, match=r"r\.md distills but has no teacher\. Set recipe\.teacher=PATH"):
        recipe.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)


def test_lists_of_layers_of_two_lengths_are_refused(model):
    lists = {"student_layer_names": "[model.17, model.20]", "teacher_layer_names": "[model.17, model.20]"}
    recipe = Recipe(RANGE + modifier("PerLayerDistillationModifier", start_epoch=0.0, **lists))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe.attach(model, optimizer, 4, teacher=YOLOv5("n", 1)).finish()
    every = Recipe(RANGE + modifier("PerLayerDistillationModifier", start_epoch=0.0))
    with pytest.raises(RecipeError, match="pairs 60 layers of the student with 82 of the teacher"):
        every.attach(model, optimizer, 4, teacher=YOLOv5("m", 1))


def test_what_a_pattern_means_is_what_sparseml_takes_it_for(model):
    pytest.importorskip("sparseml")
    from sparseml.pytorch.utils import get_named_layers_and_params_by_regex

    for pattern in (
        "re:model.2.*conv.weight",
        "re:.*cv1",
        "model.3.conv.weight",
        r"re:model\.(1|24)\..*weight",
    ):
        theirs = [found.layer_name for found in get_named_layers_and_params_by_regex(model, [pattern])]
        assert layers_matching("params", pattern, model) == list(dict.fromkeys(theirs))
        assert theirs


def test_a_pattern_begins_where_the_name_begins(model):
    assert layers_matching("params", "re:conv.weight", model) == []
    assert layers_matching("params", "re:.*conv.weight", model)


def test_all_and_all_prunable_mean_what_sparseml_takes_them_for(model):
    pytest.importorskip("sparseml")
    from sparseml.pytorch.utils import get_prunable_layers

    assert layers_matching("params", "__ALL_PRUNABLE__", model) == [n for n, _ in get_prunable_layers(model)]
    every = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert layers_matching("params", "__ALL__", model) == every
    assert any(isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in every)
