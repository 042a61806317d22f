"""What a recipe may say of channels, and when they go."""

from __future__ import annotations

import pytest

from sparse_exp.errors import RecipeError
from sparse_exp.recipes.modifiers import SlimmingModifier
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.yolov5 import YOLOv5


def text(more: str = "", length: float = 10.0, **changes: object) -> str:
    values = {"start_epoch": 2.0, "end_epoch": 4.0, "share": 0.4, "steps": 3, **changes}
    lines = "".join(f"\n    {name}: {value}" for name, value in values.items() if value is not None)
    return (
        f"modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {length}\n"
        f"  - !SlimmingModifier{lines}\n{more}"
    )


def test_moments_and_shares():
    slimming = Recipe(text()).slimming
    assert slimming.moments == [
        (2.0, pytest.approx(0.8)),
        (3.0, pytest.approx(0.6)),
        (4.0, pytest.approx(0.4)),
    ]
    once = SlimmingModifier(start_epoch=1.0, end_epoch=1.0, share=0.3)
    assert once.moments == [(1.0, pytest.approx(0.3))]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [("dense", 0, 2), ("slimming", 2, 4), ("slim", 4, 10)]),
        ({"start_epoch": 0.0}, [("slimming", 0, 4), ("slim", 4, 10)]),
        ({"steps": 1, "end_epoch": 2.0}, [("dense", 0, 2), ("slim", 2, 10)]),
    ],
)
def test_phases(changes, wanted):
    recipe = Recipe(text(**changes))
    assert [(phase.name, phase.start, phase.end) for phase in recipe.phases()] == wanted
    again = Recipe(recipe.text)  # as a checkpoint stores it
    assert again.slimming == recipe.slimming
    longer = Recipe(text(**changes), num_epochs=20)
    assert [phase.end for phase in longer.phases()] == [2 * end for *_, end in wanted]


def test_it_composes_with_a_recipe_before():
    composed = Recipe(text()).after(Recipe(text(length=3.0, start_epoch=0.0, end_epoch=1.0)).text)
    assert composed.count("SlimmingModifier") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": 0.0}, "share of SlimmingModifier of r to be above 0 and at most 1"),
        ({"share": 1.5}, "share of SlimmingModifier of r to be above 0 and at most 1"),
        ({"steps": 1.5}, "steps of .* a whole number, 1 or more"),
        ({"steps": 0}, "steps of .* a whole number, 1 or more"),
        ({"multiple": 0}, "multiple of .* a whole number"),
        ({"end_epoch": 2.0}, "end_epoch of .* to be after 2"),
        ({"steps": 1}, "end_epoch of .* to be at 2"),
        ({"start_epoch": -1.0}, "start_epoch of .* 0 or more"),
        ({"importance": "luck"}, "importance of .* one of gradients, weights"),
        ({"share": None}, "needs the argument 'share'"),
        ({"shares": 0.5}, "has no argument 'shares'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(changes, said):
    with pytest.raises(RecipeError, match=said) as error:
        Recipe(text(**changes), name="r")
    assert "\n" not in str(error.value)


GRADUAL = """  - !GMPruningModifier
    start_epoch: 3.0
    end_epoch: 8.0
    update_frequency: 0.5
    init_sparsity: 0.05
    final_sparsity: 0.8
    params: __ALL_PRUNABLE__
"""
QUANTIZE = """  - !QuantizationModifier
    start_epoch: 3.5
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""
LAYERS = """  - !PerLayerDistillationModifier
    start_epoch: 0.0
    student_layer_names: [model.17]
"""


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (text(length=4.0), "the end of SlimmingModifier of r to be below 4"),
        (text(GRADUAL), "the start of GMPruningModifier of r to be at least 4"),
        (text(QUANTIZE), "the start of QuantizationModifier of r to be at least 4"),
        (text(LAYERS), "the start of PerLayerDistillationModifier of r to be at least 4"),
        (text(text().partition("10.0\n")[2]), "r has several SlimmingModifiers"),
    ],
)
def test_what_cannot_go_together_is_refused_in_one_line(recipe, said):
    with pytest.raises(RecipeError, match=said) as error:
        Recipe(recipe, name="r").check(YOLOv5("n", 1))
    assert "\n" not in str(error.value)
    Recipe(text(GRADUAL.replace("3.0", "4.0")), name="r").check(YOLOv5("n", 1))


def test_sparseml_does_not_know_it():
    with pytest.raises(RecipeError, match=r"SparseML does not know\. Set recipe\.engine=native"):
        Recipe(text(), name="r", engine="sparseml").check(YOLOv5("n", 1))
