"""Recipes that make zeros: phases, what is promised and what happens; at once; staged; old ones."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from sparse_exp.config.schema import LossConfig
from sparse_exp.errors import RecipeError
from sparse_exp.quantization.quantizers import is_rounding, quantizers
from sparse_exp.recipes.language import modifiers_of, read_body
from sparse_exp.recipes.recipe import Phase, Recipe, is_quantized, quantized_layers
from sparse_exp.sparsity.prune import blocks, prune_by_magnitude
from sparse_exp.yolov5 import DetectionLoss, YOLOv5

STEPS = 4
IGNORE = "[SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]"
GRADUAL = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 3.0
  - !GMPruningModifier
    start_epoch: {start}
    end_epoch: 2.0
    update_frequency: {frequency}
    init_sparsity: {init}
    final_sparsity: {final}
    params: {params}
    inter_func: {curve}
    mask_type: {mask}
"""
USUAL = {
    "start": 0.5,
    "frequency": 0.5,
    "init": 0.1,
    "final": 0.8,
    "params": "__ALL_PRUNABLE__",
    "curve": "cubic",
    "mask": "unstructured",
}


def gradual(**changes) -> str:
    return GRADUAL.format(**{**USUAL, **changes})


class Tiny(nn.Module):
    """As much of a detector as pruning needs: layers that may be pruned, and one that may not."""

    def __init__(self, sparsity: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.a = nn.Conv2d(8, 16, 3, bias=False)
        self.b = nn.Conv2d(16, 20, 1, bias=False)
        self.c = nn.Conv2d(20, 12, 1, bias=False)
        prune_by_magnitude(self.prunable_convolutions(), sparsity)

    def prunable_convolutions(self) -> dict[str, nn.Conv2d]:
        return {"a": self.a, "b": self.b, "c": self.c}


def yolov5n(sparsity: float = 0.0) -> YOLOv5:
    torch.manual_seed(0)
    model = YOLOv5("n", 1)
    prune_by_magnitude(model.prunable_convolutions(), sparsity)
    return model


def shares(model: Tiny | YOLOv5) -> dict[str, float]:
    return {n: float((c.weight == 0).double().mean()) for n, c in model.prunable_convolutions().items()}


def train(model: Tiny, recipe: Recipe, epochs: int, look=lambda epoch: None, steps: int = STEPS) -> None:
    """Steps without a network: random gradients, which move every weight that may move."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsifier = recipe.attach(model, optimizer, steps)
    for step in range(epochs * steps):
        sparsifier.before_step(step / steps)
        optimizer.zero_grad()
        sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()
        sparsifier.step(step / steps)
        look((step + 1) / steps)
    sparsifier.finish()


def test_phases_of_gradual_pruning_with_quantization():
    quantize = f"  - !QuantizationModifier\n    start_epoch: 2.5\n    ignore: {IGNORE}\n"
    recipe = Recipe(gradual() + quantize)
    assert recipe.phases() == [
        Phase("dense", 0.0, 0.5, quantized=False),
        Phase("pruning", 0.5, 2.0, quantized=False),
        Phase("pruned", 2.0, 2.5, quantized=False),
        Phase("pruned_quant", 2.5, 3.0, quantized=True),
    ]
    assert recipe.prunes
    assert recipe.prunes_gradually
    assert recipe.pruning_end == 2.0
    assert not recipe.holds_mask


def test_pruning_that_goes_on_in_quantization_and_masks_held_from_late_on():
    quantize = f"  - !QuantizationModifier\n    start_epoch: 1.0\n    ignore: {IGNORE}\n"
    names = [(p.name, p.start, p.end) for p in Recipe(gradual(start=0.0) + quantize).phases()]
    assert names == [("pruning", 0.0, 1.0), ("pruning_quant", 1.0, 2.0), ("pruned_quant", 2.0, 3.0)]
    late = gradual(start=0.0) + "  - !ConstantPruningModifier\n    start_epoch: 2.0\n    params: __ALL__\n"
    assert [p.name for p in Recipe(late).phases()] == ["pruning", "pruned"]
    transfer = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 3.0\n"
    transfer += "  - !ConstantPruningModifier\n    start_epoch: -1.0\n    params: __ALL__\n"
    assert [(p.name, p.end) for p in Recipe(transfer).phases()] == [("pruned", 3.0)]
    assert Recipe(transfer).pruning_end is None


def cubic(epoch: float, init: float = 0.1, final: float = 0.8, start: float = 0.5, end: float = 2.0) -> float:
    return init + (final - init) * (1 - (1 - (epoch - start) / (end - start)) ** 3)


def test_promises_follow_the_interpolation_of_the_last_sure_update():
    model, recipe = Tiny(), Recipe(gradual())
    weights, start = model.a.weight.numel(), shares(model)

    def promised(epoch: float) -> float:
        return recipe.expected_sparsity(model, epoch, start)["a"]

    assert promised(0.0) == promised(0.5) == 0.0
    assert promised(0.75) == pytest.approx(0.1, abs=1 / weights)  # the update at the start
    assert promised(1.2) == pytest.approx(cubic(0.7), abs=1 / weights)
    assert promised(1.9) == pytest.approx(cubic(1.4), abs=1 / weights)
    assert promised(2.0) == promised(3.0) == pytest.approx(0.8, abs=1 / weights)
    assert cubic(1.4) < 0.8 - 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frequency": 0.3, "curve": "linear"},
        {"frequency": -1.0, "curve": "inverse_cubic"},
        {"frequency": 5.0},
        {"mask": "block4"},
        {"mask": "[1, 4]", "params": "['re:[abc].weight']"},
        {"init": "__FROM_PARAM__", "start": 0.0},
        {"final": "{0.4: [a.weight], 0.9: ['re:[ab].weight']}", "params": "[]"},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [4, 3])  # at 3 the pruning's start lies between two steps
def test_what_is_promised_is_there_after_every_step_and_exactly_that_at_the_end(changes, steps):
    model, recipe = Tiny(0.3 if "init" in changes else 0.0), Recipe(gradual(**changes))
    start, seen = shares(model), []

    def look(epoch: float) -> None:
        promised, there = recipe.expected_sparsity(model, epoch, start), shares(model)
        assert promised.keys() == there.keys()
        assert all(there[name] >= promised[name] - 1e-12 for name in there), f"at {epoch}"
        seen.append(there)
        if epoch >= 2.0:  # reached with the step that ends there, not with the next one
            assert there == pytest.approx(promised, abs=1e-12)

    train(model, recipe, 3, look, steps)
    finals = [0.4, 0.9, 0.0] if "final" in changes else [0.8, 0.8, 0.8]
    assert list(seen[-1].values()) == pytest.approx(finals, abs=0.01)
    assert all(earlier["a"] <= later["a"] for earlier, later in pairwise(seen))
    assert len({share["a"] for share in seen}) > 2


def test_an_end_between_two_steps_is_reached_with_the_step_after_it():
    text = gradual(curve="inverse_cubic").replace("end_epoch: 2.0", "end_epoch: 1.9")
    model = Tiny()
    train(model, Recipe(text), 3, lambda epoch: epoch < 2 or shares(model)["a"] > 0.79 or pytest.fail("late"))
    assert shares(model)["a"] == pytest.approx(0.8, abs=0.01)


def test_a_held_layer_keeps_its_share_and_an_unheld_one_is_promised_nothing():
    model = Tiny(0.6)
    text = gradual(params="[b.weight]", start=0.0)
    text += "  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: [a.weight]\n"
    promised = Recipe(text).expected_sparsity(model, 3.0, shares(model))
    assert promised["a"] == shares(model)["a"]
    assert promised["b"] == pytest.approx(0.8, abs=0.01)
    assert promised["c"] == 0.0


def test_global_pruning_promises_no_layer_anything():
    text = gradual().replace("GMPruningModifier", "GlobalMagnitudePruningModifier")
    assert set(Recipe(text).expected_sparsity(Tiny(), 3.0, {}).values()) == {0.0}


def test_zeros_without_a_modifier_that_stays_on_are_no_promise():
    text = gradual() + "    leave_enabled: False\n"
    model = Tiny()
    assert set(Recipe(text).expected_sparsity(model, 2.5, shares(model)).values()) == {0.0}
    text += "  - !ConstantPruningModifier\n    start_epoch: 2.0\n    params: __ALL_PRUNABLE__\n"
    recipe = Recipe(text)
    assert min(recipe.expected_sparsity(model, 2.5, shares(model)).values()) == pytest.approx(0.8, abs=0.01)
    train(model, recipe, 3)
    assert min(shares(model).values()) == pytest.approx(0.8, abs=0.01)


def test_four_block_pruning_leaves_only_whole_zero_blocks():
    model = Tiny()
    train(model, Recipe(gradual(mask="block4")), 3)
    for conv in model.prunable_convolutions().values():
        zeros = (conv.weight.flatten()[blocks(conv.weight, (1, 4))] == 0).sum(1)
        assert set(zeros.tolist()) == {0, 4}


def test_the_schedule_stretches_as_a_whole_and_its_text_says_so():
    recipe = Recipe(gradual(), num_epochs=6)
    assert recipe.epochs == 6.0
    assert [(p.name, p.end) for p in recipe.phases()] == [("dense", 1.0), ("pruning", 4.0), ("pruned", 6.0)]
    assert Recipe(recipe.text).phases() == recipe.phases()
    assert recipe.text.count("update_frequency: 1.0") == 1
    assert Recipe(gradual(), num_epochs=3).text == Recipe(gradual()).text


def test_the_default_recipe_squeezed_to_two_epochs(recipe_text):
    fixed = {"num_epochs": 12, "quantization_epochs": 2, "warmup_epochs": 1.0}
    recipe = Recipe(recipe_text, fixed, num_epochs=2)
    assert [(p.name, p.start, p.end) for p in recipe.phases()] == [
        ("pruned", 0.0, 1.0),
        ("pruned_quant", 1.0, 2.0),
    ]
    assert recipe.learning_rates(recipe.phases()[0]) == [(1e-5, 1e-3), (1e-3, 5e-5)]


def test_rates_within_a_phase_are_those_of_a_modifier_that_spans_several():
    text = gradual(start=0.0) + (
        "  - !LearningRateFunctionModifier\n    start_epoch: 0.0\n    end_epoch: 3.0\n"
        "    lr_func: cosine\n    init_lr: 0.1\n    final_lr: 0.0\n"
    )
    recipe = Recipe(text)
    middle = 0.05 * (1 + math.cos(math.pi * 2 / 3))
    (first,), (second,) = (recipe.learning_rates(phase) for phase in recipe.phases())
    assert first == pytest.approx((0.1, middle))
    assert second == pytest.approx((middle, 0.0))
    constant = (
        gradual(start=0.0) + "  - !SetLearningRateModifier\n    start_epoch: 0.0\n    learning_rate: 0.01\n"
    )
    assert [Recipe(constant).learning_rates(p) for p in recipe.phases()] == [[(0.01, 0.01)]] * 2


def test_matches_name_the_layers_of_each_modifier():
    text = gradual(params="['re:model.2.*conv.weight']")
    text += "  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: [model.3.conv.weight]\n"
    text += f"  - !QuantizationModifier\n    start_epoch: 2.5\n    ignore: {IGNORE[:-1]}, model.24]\n"
    second = gradual(params="[model.5.conv.weight]").split("end_epoch: 3.0\n")[1]
    model = yolov5n()
    found = Recipe(text + second).matches(model)
    assert found["ConstantPruningModifier"] == ["model.3.conv"]
    assert sorted([found["GMPruningModifier 1"], found["GMPruningModifier 2"]], key=len)[0] == [
        "model.5.conv"
    ]
    head = {f"model.24.m.{level}" for level in range(3)}
    assert set(found["QuantizationModifier"]) == model.quantizable_convolutions().keys() - head
    assert not is_quantized(list(model.state_dict()))


ONESHOT = gradual(start=0.0, params="['re:model\\.(2|4)\\..*conv.weight']") + (
    f"  - !QuantizationModifier\n    start_epoch: 2.5\n    ignore: {IGNORE}\n"
    "    disable_quantization_observer_epoch: 2.75\n"
)


def statistics(model: YOLOv5) -> dict[str, torch.Tensor]:
    """Running means and variances of the batch norms by the place of their block."""
    buffers = {n.replace(".conv.module", ""): b.clone() for n, b in model.named_buffers()}
    return {name: buffer for name, buffer in buffers.items() if ".running_" in name}


@pytest.fixture(scope="module")
def calibrated(digit_images):
    """A model before and after a recipe was applied at once, and the images."""
    images = torch.from_numpy(digit_images).float() / 255
    model = yolov5n().train()
    with torch.no_grad():
        for _ in range(10):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.5
            model(images)  # batch norms that know these images
    before = deepcopy(model)
    Recipe(ONESHOT).apply_at_once(model, [images[:3], images[3:]])
    return before, model, images


def test_at_once_the_smallest_weights_of_the_named_layers_go(calibrated):
    before, model, _ = calibrated
    now = model.prunable_convolutions()
    for name, conv in before.prunable_convolutions().items():
        order = conv.weight.detach().abs().flatten().argsort(stable=True)
        count = round(0.8 * conv.weight.numel()) if name.startswith(("model.2.", "model.4.")) else 0
        zeros = (now[name].weight.flatten() == 0).nonzero().flatten()
        assert torch.equal(zeros, order[:count].sort().values), name


def test_at_once_quantizers_are_calibrated_and_frozen_and_batch_norms_as_they_were(calibrated):
    before, model, images = calibrated
    assert not model.training
    old, new = statistics(before), statistics(model)
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert quantized_layers(model) == list(model.quantizable_convolutions())
    own = quantizers(model)
    assert not any(quantizer.observing for quantizer in own.values())
    assert all(bool((quantizer.low < quantizer.high).all()) for quantizer in own.values())
    stem = model.get_submodule(f"{model.stem}.input_quantizer")
    assert float(stem.scale) == pytest.approx(1 / 255)

    pruned = deepcopy(before).eval()
    for name, conv in pruned.prunable_convolutions().items():
        conv.weight.data[model.prunable_convolutions()[name].weight == 0] = 0
    with torch.no_grad():
        wanted, got, dense = pruned(images)[0], model(images)[0], before.eval()(images)[0]
    error = (got - wanted).abs().mean()
    assert float(error) < 0.2 * float((dense - wanted).abs().mean())  # 8 bits cost less than the pruning


def test_at_once_without_quantization_and_what_cannot_be_done_at_once():
    model = Tiny()
    Recipe(gradual(curve="inverse_cubic")).apply_at_once(model, [])
    assert min(shares(model).values()) == pytest.approx(0.8, abs=0.01)
    with pytest.raises(
        RecipeError, match=r"GMPruningModifier of r\.md cannot prune: blocks of \[1, 4\] do not"
    ):
        Recipe(gradual(mask="[1, 4]"), name="r.md").apply_at_once(Tiny(), [])


def test_each_use_of_a_recipe_is_its_own_and_quantization_begins_once():
    recipe = Recipe(gradual() + "  - !QuantizationModifier\n    start_epoch: 1.0\n")
    recipe.apply_structure(Tiny())
    model = Tiny()
    sparsifier = recipe.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), 2)
    for step in range(4):
        sparsifier.before_step(step / 2)
        assert is_quantized([*model.state_dict()]) is (step >= 2)
        assert is_rounding(model) is (step >= 2)
    sparsifier.finish()


HOLD = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: ['re:model\\.2\\..*weight']
"""
QUANTIZE = (
    f"  - !QuantizationModifier\n    start_epoch: 1.0\n    ignore: {IGNORE}\n    freeze_bn_stats_epoch: 1.5\n"
)


def test_a_recipe_is_staged_behind_that_of_its_start():
    composed = Recipe(HOLD).after(HOLD)
    recipe = Recipe(composed)
    assert recipe.epochs == 4.0
    held = [m for m in recipe.modifiers if m.prunes]
    assert [(m.start_epoch, m.end_epoch) for m in held] == [(0.0, 2.0), (2.0, -1.0)]
    again = Recipe(Recipe(HOLD).after(composed))
    assert again.epochs == 6.0
    assert again.text.count(r"re:model\.2\..*weight") == 3  # patterns come through unchanged
    assert Recipe(HOLD).after("") == Recipe(HOLD).text
    with pytest.raises(RecipeError, match="the recipe of the start checkpoint"):
        Recipe(HOLD).after("modifiers: 3")


def test_a_start_may_have_been_made_with_what_only_sparseml_runs():
    base = HOLD + "  - !MovementPruningModifier\n    start_epoch: 0.0\n    end_epoch: 2.0\n"
    composed = Recipe(HOLD).after(base)
    assert "!MovementPruningModifier" in composed
    with pytest.raises(RecipeError, match=r"recipe\.engine=sparseml"):
        Recipe(composed)
    assert Recipe(composed, engine="sparseml").epochs == 4.0


def test_staged_recipes_with_the_same_stage_names_are_staged_behind_each_other():
    staged = Recipe(HOLD).after(HOLD)
    both = Recipe(staged).after(staged)
    assert both.count("!EpochRangeModifier") == 4
    assert Recipe(both).epochs == 8.0


def test_of_two_quantizations_that_of_the_start_never_happened():
    composed = Recipe(HOLD + QUANTIZE).after(HOLD + QUANTIZE)
    assert composed.count("!QuantizationModifier") == 1
    assert Recipe(composed).quantization_start == 3.0
    only = "modifiers:\n" + QUANTIZE
    assert Recipe(HOLD + QUANTIZE).after(only) == Recipe(HOLD + QUANTIZE).text


OLD = """training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: 2.0
    lr_func: linear
    init_lr: 0.05
    final_lr: 0.01
    param_groups: [0]
  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: 0.002
    param_groups: [1, 2]
  - !SetWeightDecayModifier
    start_epoch: 1.0
    weight_decay: 0.0
  - !TrainableParamsModifier
    params: [model.0.bn.weight]
    trainable: False
    start_epoch: 0.0
    end_epoch: 1.0
pruning_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
quantization_modifiers:
  - !QuantizationModifier
    start_epoch: 1.0
    submodules: {submodules}
    custom_quantizable_module_types: ['SiLU']
    exclude_module_types: ['SiLU']
    quantize_conv_activations: False
    disable_quantization_observer_epoch: 1.5
    freeze_bn_stats_epoch: 1.25
"""
BACKBONE_AND_NECK = [f"model.{index}" for index in range(24)]


def test_an_older_recipe_leaves_the_head_in_floating_point():
    model = yolov5n()
    layers = Recipe(OLD.format(submodules=BACKBONE_AND_NECK)).matches(model)["QuantizationModifier"]
    assert len(layers) == 57
    assert set(layers) == {n for n in model.quantizable_convolutions() if not n.startswith("model.24.")}


def test_an_old_recipe_trains_unchanged(digit_images):
    recipe, model = Recipe(OLD.format(submodules=["model"])), yolov5n(0.5)
    recipe.check(model)
    zeros = {name: conv.weight.detach() == 0 for name, conv in model.prunable_convolutions().items()}
    of = list(model.named_parameters())
    groups = [
        [p for n, p in of if n.endswith("bias")],
        [p for n, p in of if p.ndim > 1],
        [p for n, p in of if p.ndim == 1 and not n.endswith("bias")],
    ]
    optimizer = torch.optim.SGD([{"params": ps, "weight_decay": 0.1} for ps in groups], lr=1.0)
    sparsifier = recipe.attach(model, optimizer, 2)
    loss_of = DetectionLoss(model.anchors, 1, LossConfig(), 64)
    images = torch.from_numpy(digit_images[:2]).float() / 255
    rates, stem = [], model.model[0].bn.weight.detach().clone()
    for step in range(4):
        sparsifier.before_step(step / 2)
        rates.append([group["lr"] for group in optimizer.param_groups])
        loss, _ = loss_of(model(images), torch.tensor([[0, 0, 0.5, 0.5, 0.3, 0.3]]))
        optimizer.zero_grad()
        loss.backward()
        sparsifier.step(step / 2)
        if step == 1:
            assert torch.equal(model.model[0].bn.weight, stem)
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1] * 3
    sparsifier.finish()
    assert rates == [pytest.approx([0.05 - 0.01 * step, 0.002, 0.002]) for step in range(4)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * 3
    assert len(quantized_layers(model)) == 60
    for name, conv in model.prunable_convolutions().items():
        assert not conv.weight.detach()[zeros[name]].any(), name
    restored = yolov5n()
    Recipe(recipe.text).apply_structure(restored)
    restored.load_state_dict(model.state_dict())


def test_the_text_of_an_old_recipe_is_the_same_in_every_process():
    text = Recipe(OLD.format(submodules=BACKBONE_AND_NECK)).text
    (listed,) = [m["submodules"] for m in modifiers_of(read_body(text, "r")) if "submodules" in m]
    assert listed == BACKBONE_AND_NECK
