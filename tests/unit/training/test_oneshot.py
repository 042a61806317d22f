from __future__ import annotations

import pytest
import torch

from sparse_exp.errors import SparsityError
from sparse_exp.recipes.checkpoints import CheckpointWriter, restore
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.training.evaluation import Validation
from sparse_exp.training.loop import TrainingData
from sparse_exp.training.oneshot import apply_at_once, calibration_loader
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5, read_checkpoint

PRUNE_AND_QUANTIZE = """training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
pruning_modifiers:
  - !MagnitudePruningModifier
    init_sparsity: 0.0
    final_sparsity: 0.5
    start_epoch: 0.0
    end_epoch: 1.0
    update_frequency: 1.0
    params: ['re:model[.][1-9].*conv[.]weight']
quantization_modifiers:
  - !QuantizationModifier
    start_epoch: 1.0
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


def test_calibration_images_are_drawn_by_the_seed_and_not_augmented(digits):
    def images(count: int, seed: int) -> torch.Tensor:
        loader = calibration_loader(digits, count, imgsz=64, batch_size=4, seed=seed)
        return torch.cat([batch.images for batch in loader])

    all_of_them = {image.numpy().tobytes() for image in images(100, seed=0)}
    assert len(all_of_them) == len(digits.splits["train"]) == 16
    six = images(6, seed=0)
    assert len(six) == 6
    assert torch.equal(six, images(6, seed=0))
    assert not torch.equal(six, images(6, seed=1))
    assert {image.numpy().tobytes() for image in six} < all_of_them


@pytest.fixture(scope="module")
def data(digits) -> TrainingData:
    train, val = [calibration_loader(digits, count, imgsz=64, batch_size=4, seed=0) for count in (8, 2)]
    return TrainingData(train, Validation(val, 10), digits.names, 64)


def at_once(data: TrainingData, folder, recipe: Recipe, start: float = 0.0):
    torch.manual_seed(0)
    model = YOLOv5("n", 10)
    prune_by_magnitude(model.prunable_convolutions(), start)
    precision = Precision(autocast=False, channels_last=True)
    result = apply_at_once(model, recipe, data, precision, weights=folder, composed="a: 1")
    return model, result


def test_a_recipe_is_applied_without_training(data, tmp_path):
    torch.manual_seed(0)
    before = YOLOv5("n", 10).state_dict()
    model, result = at_once(data, tmp_path, Recipe(PRUNE_AND_QUANTIZE))
    [record] = result.history
    assert (record["phase"], record["epoch"]) == ("pruned_quant", 0.0)
    assert result.best == {"pruned_quant": tmp_path / "best_pruned_quant.pt"}
    checkpoint = read_checkpoint(result.best["pruned_quant"])
    assert (checkpoint.phase, checkpoint.epoch, checkpoint.recipe) == ("pruned_quant", 0.0, "a: 1")
    for name, weight in before.items():
        if name.endswith("conv.weight"):
            now = checkpoint.state_dict[name]
            kept = now != 0
            assert torch.equal(now[kept], weight[kept]), name
    promised = result.phases["pruned_quant"].promised
    layers = model.prunable_convolutions()
    zeros = {name: int((conv.weight == 0).sum()) for name, conv in layers.items()}
    assert all(abs(zeros[name] - 0.5 * conv.weight.numel()) <= 1 for name, conv in layers.items())
    assert promised == pytest.approx({name: zeros[name] / layers[name].weight.numel() for name in layers})


def test_what_is_applied_at_once_comes_back(data, tmp_path):
    recipe = Recipe(PRUNE_AND_QUANTIZE)
    model, result = at_once(data, tmp_path, recipe)
    writer = CheckpointWriter(tmp_path, data.names, 64, recipe.text)
    path = writer.save("again.pt", model, "pruned_quant", result.history[0], {})
    images = next(iter(data.val.loader)).images.float() / 255
    with torch.no_grad():
        same_layout = model.to(memory_format=torch.contiguous_format)
        assert torch.equal(restore(path)[0](images)[0], same_layout(images)[0])


def test_zeros_of_the_start_must_survive(data, tmp_path, monkeypatch):
    hold = PRUNE_AND_QUANTIZE.partition("quantization_modifiers")[0]
    recipe = Recipe(hold)

    def careless(model, batches) -> None:
        with torch.no_grad():
            model.model[3].conv.weight.add_(1.0)

    monkeypatch.setattr(recipe, "apply_at_once", careless)
    with pytest.raises(
        SparsityError, match=r"after the recipe was applied, but got others in model\.3\.conv\."
    ):
        at_once(data, tmp_path, recipe, start=0.3)
