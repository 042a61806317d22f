"""A short QAT run under SparseML itself, to its exported file; skipped where SparseML is not installed.

Outputs are compared in two steps, because one rounding that falls the other way in an early layer moves all
behind it, by any number of pixels in a detector as lively as this one (see
`sparse_exp.quantization.reference`). SparseML's model and ours are compared in float64, where the order of a
sum decides no rounding. The deployed network is then compared number by number.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from available import needs_sparseml

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import make_loader
from sparse_exp.engines import create_engine
from sparse_exp.export.exporter import MODEL, export_deployment
from sparse_exp.export.verification import predict
from sparse_exp.quantization.choice import AS_THE_RECIPE_SAYS, QuantizationChoice
from sparse_exp.quantization.modules import Quantizer
from sparse_exp.quantization.reference import IntegerConv, as_deployed
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training.evaluation import Validation
from sparse_exp.training.loop import Trainer, TrainingData
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

pytestmark = [needs_sparseml, pytest.mark.slow]
IMGSZ, CLASSES = 64, 10
LENGTH = {"num_epochs": 2.0, "quantization_epochs": 1.5}
RATES = {"init_lr": 1e-5, "final_lr": 1e-5, "quantization_init_lr": 1e-5}  # larger ones undo the liveliness


@pytest.fixture(
    scope="module",
    params=[AS_THE_RECIPE_SAYS, QuantizationChoice(per_channel=True, num_bits=7)],
    ids=["one scale for a layer", "7 bits, a scale for each channel"],
)
def trained(request, digits, lively_start, recipe_text, tmp_path_factory) -> tuple[YOLOv5, YOLOv5]:
    """The model that SparseML has trained, as it left it, and the one that its checkpoint is restored to."""
    config, folder = TrainerConfig(batch_size=4), tmp_path_factory.mktemp("weights")
    train, val, calibration = [
        make_loader(
            digits.splits[split], CLASSES, imgsz=IMGSZ, batch_size=4, train=augmented, augment=config.augment
        )
        for split, augmented in (("train", True), ("val", False), ("train", False))
    ]
    data = TrainingData(train, Validation(val, CLASSES), digits.names, IMGSZ, calibration)
    recipe = Recipe(recipe_text, LENGTH | RATES, engine="sparseml", quantization=request.param)
    precision = Precision(autocast=False, channels_last=False)
    model = copy.deepcopy(lively_start)
    result = Trainer(model, recipe, data, config, precision, weights=folder, seed=3).fit()
    assert [record["phase"] for record in result.history] == ["pruned", "pruned_quant", "pruned_quant"]
    return model.eval(), restore(folder / "last.pt")[0]


@torch.no_grad()
def in_float64(model, images) -> torch.Tensor:
    """Predictions of a model whose sums are float64, and whose scales stay what they are."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, Quantizer | torch.ao.quantization.FakeQuantizeBase):
            module.float()
    return model(images.double() / 255)[0]


def test_the_checkpoint_is_restored_as_the_model_that_sparseml_trained(trained, digit_images):
    by_sparseml, restored = trained
    images = torch.from_numpy(digit_images)
    predicted = in_float64(by_sparseml, images)
    assert float(predicted[..., 4].amax()) > 0.5  # it sees something
    torch.testing.assert_close(in_float64(restored, images), predicted, rtol=0, atol=1e-6)  # px, or score


def test_the_deployed_network_has_sparsemls_numbers_and_whole_biases(trained):
    """Weights are the same integers, and a bias moves by half a step of the integer sums at most."""
    by_sparseml, restored = trained
    integer = {name: m for name, m in as_deployed(restored).named_modules() if isinstance(m, IntegerConv)}
    assert len(integer) == 60
    for name, ours in integer.items():
        wrapper = by_sparseml.get_submodule(name)
        conv, quantizer = wrapper.module, wrapper.module.weight_fake_quant
        weight, bias = folded(conv)
        scale = quantizer.scale.view(-1, 1, 1, 1)
        assert torch.equal(ours.weight.float(), torch.round(quantizer(weight) / scale)), name
        step = wrapper.quant.activation_post_process.scale * quantizer.scale
        assert torch.equal(ours.step.flatten(), step), name
        off = (ours.bias.double() * step.double() - bias.double()).abs() / step
        assert float(off.max()) <= 0.5 + 1e-3, name  # and float32's own rounding


@torch.no_grad()
def folded(conv) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution of SparseML's with its batch norm, where it has one."""
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    if not hasattr(conv, "bn"):
        return conv.weight, bias
    factor = conv.bn.weight / torch.sqrt(conv.bn.running_var + conv.bn.eps)
    return conv.weight * factor.view(-1, 1, 1, 1), conv.bn.bias + (bias - conv.bn.running_mean) * factor


def test_the_exported_file_predicts_what_the_deployed_network_does(trained, digit_images, tmp_path: Path):
    """But for an image in which a value lies so near to a tie that the last bit of a SiLU decides."""
    _, restored = trained
    export_deployment(restored, tmp_path, imgsz=IMGSZ, opset=13, images=[digit_images])
    engine = create_engine("onnxruntime")
    engine.load(tmp_path / MODEL, batch_size=len(digit_images), cores=1)
    found = torch.from_numpy(engine.run(digit_images)[0])
    engine.close()
    expected = predict(as_deployed(restored), torch.from_numpy(digit_images))
    differences = (found - expected).abs().amax((1, 2))  # px, of each image
    assert int((differences < 0.01).sum()) > len(digit_images) / 2, differences
