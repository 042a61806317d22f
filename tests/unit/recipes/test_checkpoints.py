from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from sparse_exp.errors import CheckpointError
from sparse_exp.quantization.quantizers import freeze_quantizers, quantizers
from sparse_exp.recipes.checkpoints import restore
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
        "quantization": kept.quantization,
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
    assert all(torch.equal(mine[name], his[name]) for name in mine)
    assert torch.equal(outputs(model, digit_images), outputs(trained, digit_images))


def test_quantization_is_active_and_frozen_in_what_comes_back(tiny_run, digit_images):
    model, _ = restore(tiny_run.weights / "best_pruned_quant.pt")
    assert not model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = outputs(model, digit_images)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    assert not torch.equal(outputs(model, digit_images), quantized)


def test_a_float_model_comes_back_exactly(tiny_run, digit_images):
    path = tiny_run.weights / "best_pruned.pt"
    model, checkpoint = restore(path)
    plain = YOLOv5("n", 10)
    plain.load_state_dict(checkpoint.state_dict)
    assert torch.equal(outputs(model, digit_images), outputs(plain, digit_images))
    assert model.num_classes == len(checkpoint.names) == 10


def test_a_quantized_model_needs_no_recipe(tiny_run, tmp_path, digit_images):
    resave(tiny_run.weights / "last.pt", tmp_path / "lost.pt", recipe="")
    whole, lost = (restore(path)[0] for path in (tiny_run.weights / "last.pt", tmp_path / "lost.pt"))
    assert torch.equal(outputs(lost, digit_images), outputs(whole, digit_images))


def test_quantized_weights_of_which_nothing_is_known_are_refused(tiny_run, tmp_path):
    resave(tiny_run.weights / "last.pt", tmp_path / "lost.pt", recipe="", quantization={})
    with pytest.raises(CheckpointError, match="recipe") as error:
        restore(tmp_path / "lost.pt")
    assert "lost.pt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda schemes: schemes.pop("model.3.conv"),
        lambda schemes: schemes["model.3.conv"]["weights"].update(per_channel=True),
        lambda schemes: schemes["model.3.conv"]["weights"].update(num_bits=16),
        lambda schemes: schemes["model.3.conv"].update(weights={"bits": 8}),
        lambda schemes: schemes.update({"model.25": {}}),
        lambda schemes: schemes.update({"model.24": {"inputs": {"num_bits": 8}}}),
        lambda schemes: schemes.update({"model.3.conv": 8}),
    ],
)
def test_quantization_that_the_weights_do_not_fit_is_refused(tiny_run, tmp_path, change):
    schemes = deepcopy(read_checkpoint(tiny_run.weights / "last.pt").quantization)
    change(schemes)
    resave(tiny_run.weights / "last.pt", tmp_path / "other.pt", quantization=schemes)
    with pytest.raises(CheckpointError, match="fit") as error:
        restore(tmp_path / "other.pt")
    assert "other.pt" in str(error.value)
    assert "\n" not in str(error.value)
