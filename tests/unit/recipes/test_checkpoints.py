from __future__ import annotations

import pytest
import torch

from sparse_exp.errors import CheckpointError
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import freeze_quantizers
from sparse_exp.yolov5 import YOLOv5, read_checkpoint, save_checkpoint


def resave(source, path, **changes) -> None:
    kept = read_checkpoint(source)
    content = {
        "model_state": kept.state_dict,
        "size": kept.size,
        "num_classes": kept.num_classes,
        "names": kept.names,
        "imgsz": kept.imgsz,
        "recipe": kept.recipe,
        "phase": kept.phase,
        "epoch": kept.epoch,
        "metrics": kept.metrics,
    }
    save_checkpoint(path, **{**content, **changes})


@torch.no_grad()
def outputs(model: YOLOv5, images) -> torch.Tensor:
    # One memory layout for both: sums in another order fall on the other side of a rounding here and there.
    model.eval().to(memory_format=torch.contiguous_format)
    return model(torch.from_numpy(images).float() / 255)[0]


def test_a_quantized_model_comes_back_exactly(tiny_run, digit_images):
    model, checkpoint = restore(tiny_run.weights / "last.pt")
    assert checkpoint.phase == "pruned_quant"
    trained = freeze_quantizers(tiny_run.model)
    mine, his = model.state_dict(), trained.state_dict()
    assert mine.keys() == his.keys()
    enabled = ("fake_quant_enabled", "observer_enabled")
    assert all(torch.equal(mine[name], his[name]) for name in mine if not name.endswith(enabled))
    assert torch.equal(outputs(model, digit_images), outputs(trained, digit_images))


def test_quantization_is_active_and_frozen_in_what_comes_back(tiny_run, digit_images):
    model, _ = restore(tiny_run.weights / "best_pruned_quant.pt")
    assert not model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = outputs(model, digit_images)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.apply(torch.ao.quantization.disable_fake_quant)
    assert not torch.equal(outputs(model, digit_images), quantized)


def test_a_float_model_comes_back_exactly(tiny_run, digit_images):
    path = tiny_run.weights / "best_pruned.pt"
    model, checkpoint = restore(path)
    plain = YOLOv5("n", 10)
    plain.load_state_dict(checkpoint.state_dict)
    assert torch.equal(outputs(model, digit_images), outputs(plain, digit_images))
    assert model.num_classes == len(checkpoint.names) == 10


def test_quantized_weights_without_a_recipe_are_refused(tiny_run, tmp_path):
    resave(tiny_run.weights / "last.pt", tmp_path / "lost.pt", recipe="")
    with pytest.raises(CheckpointError, match="recipe") as error:
        restore(tmp_path / "lost.pt")
    assert "lost.pt" in str(error.value)
    assert "\n" not in str(error.value)


DENSE = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 2.0\n"


@pytest.mark.parametrize("quantizes", [False, True], ids=["float", "other quantizers"])
def test_a_recipe_of_another_structure_is_refused(tiny_run, tmp_path, quantizes):
    recipe = DENSE
    if quantizes:
        recipe += "quantization_modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n"
        recipe += "    ignore: [Conv, Detect, Add, MaxPool2d]\n"
    resave(tiny_run.weights / "last.pt", tmp_path / "other.pt", recipe=recipe)
    with pytest.raises(CheckpointError, match="fit") as error:
        restore(tmp_path / "other.pt")
    assert "other.pt" in str(error.value)
    assert "\n" not in str(error.value)
