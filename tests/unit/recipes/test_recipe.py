from __future__ import annotations

import math

import pytest
import torch

from sparse_exp.config.schema import LossConfig
from sparse_exp.errors import RecipeError, SparsityError
from sparse_exp.recipes.recipe import (
    Phase,
    Recipe,
    freeze_quantizers,
    is_quantized,
)
from sparse_exp.sparsity.measure import SparsityContract
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.yolov5 import DetectionLoss, YOLOv5

SHORT = {"num_epochs": 2, "quantization_epochs": 1, "warmup_epochs": 0.5}
STEPS = 4


def yolov5n(sparsity: float = 0.75) -> YOLOv5:
    torch.manual_seed(0)
    model = YOLOv5("n", 1)
    prune_by_magnitude(model.prunable_convolutions(), sparsity)
    return model


def is_one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


def test_phases_of_the_default_recipe(recipe_text):
    recipe = Recipe(recipe_text)
    assert recipe.phases() == [
        Phase("pruned", 0.0, 10.0, quantized=False),
        Phase("pruned_quant", 10.0, 12.0, quantized=True),
    ]
    assert recipe.prunes
    assert recipe.holds_mask
    assert recipe.sets_learning_rate
    assert recipe.quantization_start == 10.0
    assert recipe.learning_rates(recipe.phases()[0]) == [(1e-5, 1e-3), (1e-3, 5e-5)]
    assert recipe.learning_rates(recipe.phases()[1]) == [(1e-4, 1e-6)]


@pytest.mark.parametrize(
    ("variables", "start", "epochs"),
    [
        ({"num_epochs": 6, "quantization_epochs": 2}, 4.0, 6.0),
        ({"num_epochs": 6, "quantization_epochs": 0.5, "warmup_epochs": None}, 5.5, 6.0),
        ({"num_epochs": 1.5, "quantization_epochs": 0.75, "warmup_epochs": 0.25}, 0.75, 1.5),
    ],
)
def test_variables_move_the_phases(recipe_text, variables, start, epochs):
    recipe = Recipe(recipe_text, variables)
    assert recipe.epochs == epochs
    assert [(p.name, p.start, p.end) for p in recipe.phases()] == [
        ("pruned", 0.0, start),
        ("pruned_quant", start, epochs),
    ]


ONLY_EPOCHS = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 2.0\n"
QUANTIZE = """quantization_modifiers:
  - !QuantizationModifier
    start_epoch: {}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""
PRUNE = "pruning_modifiers:\n  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: {}\n"


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        (ONLY_EPOCHS, [Phase("dense", 0.0, 2.0, quantized=False)]),
        (ONLY_EPOCHS + PRUNE.format("__ALL__"), [Phase("pruned", 0.0, 2.0, quantized=False)]),
        (ONLY_EPOCHS + QUANTIZE.format("0.0"), [Phase("dense_quant", 0.0, 2.0, quantized=True)]),
        (ONLY_EPOCHS + QUANTIZE.format("-1.0"), [Phase("dense_quant", 0.0, 2.0, quantized=True)]),
    ],
    ids=["dense", "pruned", "quantized", "quantized at once"],
)
def test_phases_follow_from_the_modifiers(text, phases):
    assert Recipe(text).phases() == phases
    assert not Recipe(text).sets_learning_rate


def test_unknown_variable_is_refused_with_the_known_ones(recipe_text):
    with pytest.raises(RecipeError, match="'epochs'") as error:
        Recipe(recipe_text, {"epochs": 3}, name="transfer_quant.md")
    assert "num_epochs" in str(error.value)
    assert "transfer_quant.md" in str(error.value)
    assert "training_modifiers" not in str(error.value)
    assert is_one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "some words",
        "- a list",
        "a: [unclosed",
        "{}",
        "num_epochs: 3",
        "---\nnum_epochs: 3\n---\n# Words",
        "modifiers:\n  - !NoSuchModifier\n    start_epoch: 0\n",
        "modifiers:\n  - !EpochRangeModifier\n    start: 0\n",
    ],
)
def test_what_is_no_recipe_is_refused_by_name_in_one_line(text):
    with pytest.raises(RecipeError, match="mine") as error:
        Recipe(text, name="mine.md")
    assert is_one_line(error)
    assert "file extension" not in str(error.value)


def test_front_matter_and_plain_yaml_are_the_same_recipe(recipe_text):
    body = recipe_text.split("---\n")[1]
    assert Recipe(body).text == Recipe(recipe_text).text == Recipe("\n" + recipe_text).text


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.md"):
        Recipe.from_file(tmp_path / "nothing.md")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.md"):
        Recipe.from_file(tmp_path / "binary.md")


def test_text_is_a_recipe_again(recipe_text):
    recipe = Recipe(recipe_text, SHORT)
    again = Recipe(recipe.text)
    assert again.phases() == recipe.phases()
    assert again.text == recipe.text
    for phase in recipe.phases():
        assert again.learning_rates(phase) == recipe.learning_rates(phase)


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ("__ALL_PRUNABLE__", "[model.2.cv1.conv.weigth]", "model.2.cv1.conv.weight"),
        ("__ALL_PRUNABLE__", "['re:mdel.2.*']", "model."),
        ("ignore: [SiLU,", "ignore: [SILU,", "SiLU"),
    ],
)
def test_a_target_that_names_no_layer_is_refused_with_the_nearest(recipe_text, old, new, nearest):
    assert old in recipe_text
    with pytest.raises(RecipeError, match="no layer") as error:
        Recipe(recipe_text.replace(old, new)).check(yolov5n())
    assert nearest in str(error.value)
    assert is_one_line(error)


@pytest.mark.parametrize("target", ["model.2.cv1.conv.weight", "re:model.2.*weight", "__ALL__"])
def test_a_target_that_names_a_layer_is_taken(target):
    Recipe(ONLY_EPOCHS + PRUNE.format(f"['{target}']")).check(yolov5n())


def test_the_default_recipe_fits_the_model(recipe_text):
    Recipe(recipe_text).check(yolov5n())


@pytest.mark.parametrize("start", [2.0, 2.5])  # a later start makes the schedule longer
def test_quantization_that_never_begins_is_refused(start):
    recipe = Recipe(ONLY_EPOCHS + QUANTIZE.format(start))
    with pytest.raises(RecipeError, match="start of quantization") as error:
        recipe.check(yolov5n())
    assert is_one_line(error)


def test_empty_schedule_is_refused():
    with pytest.raises(RecipeError, match="more than 0 epochs"):
        Recipe(ONLY_EPOCHS.replace("2.0", "0.0")).check(yolov5n())


def expected_rate(epoch: float, variables: dict) -> float:
    """Linear warm-up from 1e-5 to 1e-3, cosine to 5e-5, then a cosine of its own from 1e-4 to 1e-6."""
    warmup, end = variables["warmup_epochs"], variables["num_epochs"]
    quantized = end - variables["quantization_epochs"]
    if epoch < warmup:
        return 1e-5 + (1e-3 - 1e-5) * epoch / warmup
    low, high, first, last = (
        (5e-5, 1e-3, warmup, quantized) if epoch < quantized else (1e-6, 1e-4, quantized, end)
    )
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (epoch - first) / (last - first)))


def test_learning_rates_step_by_step_are_warmup_and_cosines(recipe_text):
    variables = {"num_epochs": 5, "quantization_epochs": 1.5, "warmup_epochs": 1.0}
    model = yolov5n()
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    sparsifier = Recipe(recipe_text, variables).attach(model, optimizer, STEPS)
    rates = []
    for step in range(5 * STEPS):
        sparsifier.before_step(step / STEPS)
        rates.append(optimizer.param_groups[0]["lr"])
        sparsifier.step(step / STEPS)
    sparsifier.finish()
    wanted = [expected_rate(step / STEPS, variables) for step in range(5 * STEPS)]
    assert rates == pytest.approx(wanted, rel=1e-6)


def real_steps(model: YOLOv5, recipe: Recipe, digit_images, after_step) -> None:
    """Train for two epochs of four steps on real images; ``after_step`` is called with the epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    sparsifier = recipe.attach(model, optimizer, STEPS)
    loss_of = DetectionLoss(model.anchors, 1, LossConfig(), 64)
    images = torch.from_numpy(digit_images[:4]).float() / 255
    targets = torch.tensor([[i, 0, 0.5, 0.5, 0.3, 0.3] for i in range(4)], dtype=torch.float32)
    model.train()
    for step in range(2 * STEPS):
        sparsifier.before_step(step / STEPS)
        loss, _ = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        sparsifier.step(step / STEPS)
        after_step(step / STEPS)
    sparsifier.finish()


def test_every_zero_stays_zero_and_the_others_move_through_quantization(recipe_text, digit_images):
    model = yolov5n(0.75)
    convs = model.prunable_convolutions()
    masks = {name: conv.weight.detach() == 0 for name, conv in convs.items()}
    last = {name: conv.weight.detach().clone() for name, conv in convs.items()}
    quantized: list[bool] = []

    def look(epoch: float) -> None:
        quantized.append(is_quantized(list(model.state_dict())))
        now = model.prunable_convolutions()
        assert now.keys() == masks.keys()
        for name, conv in now.items():
            weight = conv.weight.detach()
            assert not weight[masks[name]].any(), f"{name} at {epoch}"
            assert bool((weight[~masks[name]] != last[name][~masks[name]]).any()), f"{name} at {epoch}"
            last[name] = weight.clone()

    real_steps(model, Recipe(recipe_text, SHORT), digit_images, look)
    assert quantized == [False] * STEPS + [True] * STEPS
    assert all(mask.float().mean() >= 0.75 for mask in masks.values())


def test_without_the_pruning_modifier_the_contract_breaks(recipe_text, digit_images):
    dense = recipe_text.replace("pruning_modifiers:", "").replace("  - !ConstantPruningModifier\n", "")
    dense = dense.replace("    start_epoch: 0.0\n    params: __ALL_PRUNABLE__\n", "")
    recipe = Recipe(dense, SHORT)
    assert not recipe.prunes
    model = yolov5n(0.75)
    contract = SparsityContract.of(model.prunable_convolutions())
    with pytest.raises(SparsityError, match=r"after epoch 0\.25"):
        real_steps(
            model,
            recipe,
            digit_images,
            lambda epoch: epoch and contract.check(model.prunable_convolutions(), f"after epoch {epoch:g}"),
        )


@pytest.fixture(scope="module")
def quantized() -> YOLOv5:
    return Recipe(ONLY_EPOCHS + QUANTIZE.format("0.0")).apply_structure(yolov5n())


@pytest.mark.parametrize("training", [True, False])
def test_structure_is_applied_in_either_mode_and_leaves_it(training):
    model = yolov5n().train(training)
    names = model.quantizable_convolutions().keys()
    recipe = Recipe(ONLY_EPOCHS + QUANTIZE.format("0.0"))
    assert recipe.apply_structure(model) is model
    assert model.training is training
    assert is_quantized(list(model.state_dict()))
    assert model.quantizable_convolutions().keys() == names


def test_is_quantized_tells_states_apart(quantized):
    assert is_quantized(list(quantized.state_dict()))
    assert not is_quantized(list(yolov5n().state_dict()))


def test_pinned_input_quantizer_passes_all_pixel_values_unchanged(quantized):
    quantizer = quantized.get_submodule(f"{quantized.stem}.input_quantizer")
    pixels = torch.arange(256)
    passed = quantizer(pixels.float() / 255)
    torch.testing.assert_close(passed, pixels.float() / 255, rtol=1e-6, atol=0)
    assert torch.equal((passed * 255).round().long(), pixels)


def test_pinned_input_quantizer_stays_while_the_others_learn():
    model = Recipe(ONLY_EPOCHS + QUANTIZE.format("0.0")).apply_structure(yolov5n()).train()
    stem, other = (model.get_submodule(f"{name}.input_quantizer") for name in (model.stem, "model.1.conv"))
    with torch.no_grad():
        model(torch.full((2, 3, 64, 64), 0.25))
    scale = other.scale.clone()
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 64))
    assert stem.scale.item() == pytest.approx(1 / 255, rel=1e-7)
    assert not torch.equal(other.scale, scale)


def test_frozen_quantizers_do_not_move(quantized):
    quantized.train()
    freeze_quantizers(quantized)
    ranges = ("scale", "zero_point")
    before = {name: value.clone() for name, value in quantized.state_dict().items() if name.endswith(ranges)}
    with torch.no_grad():
        quantized(100 * torch.rand(2, 3, 64, 64))
    after = quantized.state_dict()
    assert len(before) > 100
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_nothing_is_written_to_the_current_directory(recipe_text, tmp_path, monkeypatch, digit_images):
    monkeypatch.chdir(tmp_path)
    real_steps(yolov5n(), Recipe(recipe_text, SHORT), digit_images, lambda _: None)
    Recipe(recipe_text).apply_structure(yolov5n())
    assert list(tmp_path.iterdir()) == []
