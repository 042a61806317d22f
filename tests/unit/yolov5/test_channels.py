from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sparse_exp.errors import CheckpointError
from sparse_exp.yolov5 import YOLOv5, read_checkpoint, save_checkpoint, transfer_weights
from sparse_exp.yolov5.channels import IMAGE, build_detector, channels_of, keep_channels, layers_of
from sparse_exp.yolov5.grow import grow

CLASSES = 3


@torch.no_grad()
def lively(size: str = "n", *, quantizers: bool = False) -> YOLOv5:
    """A detector whose outputs depend on the image, in double precision."""
    torch.manual_seed(1)
    model = YOLOv5(size, CLASSES).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
        norm.running_mean.uniform_(-0.3, 0.3)
        norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def outputs(model: YOLOv5, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)[0]


@pytest.mark.parametrize("size", "nsm")
def test_every_convolution_has_its_place_between_groups(size):
    with torch.device("meta"):
        model = YOLOv5(size, CLASSES)
    layers, channels = layers_of(model), channels_of(model)
    convs = model.quantizable_convolutions()
    assert [layer.convolution for layer in layers] == list(
        dict.fromkeys(layer.convolution for layer in layers)
    )
    assert {layer.convolution for layer in layers} == set(convs)
    for layer in layers:
        conv = convs[layer.convolution]
        assert conv.in_channels == sum(3 if name == IMAGE else channels[name] for name in layer.reads)
        assert not layer.gives or conv.out_channels == channels[layer.gives]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", ["n", "s"])
def test_channels_that_are_zero_can_go_without_a_trace(size, seed):
    model, drawn = lively(size), random.Random(seed)
    images = torch.rand(2, 3, 64, 64, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    kept = {
        name: torch.tensor(sorted(drawn.sample(range(count), drawn.randint(1, count))))
        for name, count in channels_of(model).items()
        if drawn.random() < 0.7
    }
    with torch.no_grad():
        for layer in layers_of(model):
            if layer.gives in kept:
                gone = torch.ones(channels_of(model)[layer.gives], dtype=torch.bool)
                gone[kept[layer.gives]] = False
                norm = model.get_submodule(f"{layer.name}.bn")
                norm.weight[gone], norm.bias[gone] = 0.0, 0.0
    before = outputs(model, images)
    parameters = [id(p) for p in model.parameters()]
    keep_channels(model, kept)
    assert [id(p) for p in model.parameters()] == parameters
    assert {name: model.widths[name] for name in kept} == {name: len(own) for name, own in kept.items()}
    assert torch.allclose(outputs(model, images), before, rtol=1e-9, atol=1e-9)
    assert before.std() > 0.1


def test_what_is_kept_is_what_was_there_and_it_trains():
    model = lively().to(memory_format=torch.channels_last)
    first = model.model[1].conv.weight.detach().clone()
    keep_channels(model, {"model.0": torch.tensor([0, 5, 7]), "model.1": torch.tensor([1, 2, 30])})
    conv = model.model[1].conv
    assert torch.equal(conv.weight, first[[1, 2, 30]][:, [0, 5, 7]])
    assert (conv.in_channels, conv.out_channels, model.model[1].bn.num_features) == (3, 3, 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.rand(2, 3, 64, 64, dtype=torch.double))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(conv.weight, first[[1, 2, 30]][:, [0, 5, 7]])


def slim() -> YOLOv5:
    model = lively().float()
    keep_channels(model, {"model.0": torch.arange(8), "model.6.cv1": torch.tensor([0, 9, 30])})
    return model


def saved(path, model: YOLOv5):
    save_checkpoint(
        path, model_state=model.state_dict(), size=model.size, num_classes=CLASSES, names=("a", "b", "c"),
        imgsz=64, recipe="", phase="slim", epoch=1.0, metrics={}, widths=model.widths,
    )  # fmt: skip
    return read_checkpoint(path)


def test_widths_stand_in_the_checkpoint(tmp_path):
    model = slim()
    checkpoint = saved(tmp_path / "slim.pt", model)
    assert checkpoint.widths == model.widths == channels_of(model)
    assert checkpoint.widths["model.6.cv1"] == 3
    again = build_detector(checkpoint.size, CLASSES, checkpoint.widths)
    transfer_weights(again, checkpoint)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(outputs(again.eval(), images), outputs(model.eval(), images))
    assert saved(tmp_path / "stock.pt", YOLOv5("n", CLASSES)).widths == {}


def test_what_only_knows_the_stock_widths_is_told(tmp_path):
    checkpoint = saved(tmp_path / "slim.pt", slim())
    tree = torch.load(tmp_path / "slim.pt", weights_only=True)
    assert tree["format"] == "sparse_exp/2"  # a release that knows only sparse_exp/1 names it and stops
    with pytest.raises(
        CheckpointError, match="stock widths, with the model's widths, but got 'slimmed'"
    ) as one:
        transfer_weights(YOLOv5("n", CLASSES), checkpoint)
    with pytest.raises(CheckpointError, match=r"to be slimmed, with .* but got 'of the stock widths'") as two:
        transfer_weights(slim(), saved(tmp_path / "stock.pt", YOLOv5("n", CLASSES)))
    with pytest.raises(CheckpointError, match="to be of the stock widths, but got 'slimmed'") as three:
        grow(checkpoint, "s")
    assert not any("\n" in str(error.value) for error in (one, two, three))


@pytest.mark.parametrize("widths", [{"model.0": 8}, "all but one", {"x": 1}, 0, 17])
def test_impossible_widths_are_refused_in_one_line(widths):
    stock = channels_of(YOLOv5("n", CLASSES))
    if widths == "all but one":
        widths = dict(list(stock.items())[1:])
    elif not isinstance(widths, dict):
        widths = {**stock, "model.0": widths}
    with pytest.raises(CheckpointError, match=r"the width of .* in yolov5n to be .* channels") as error:
        build_detector("n", CLASSES, widths)
    assert "\n" not in str(error.value)


def test_damaged_widths_are_refused(tmp_path):
    saved(tmp_path / "slim.pt", slim())
    tree = torch.load(tmp_path / "slim.pt", weights_only=True)
    torch.save({**tree, "widths": {**tree["widths"], "model.0": "text"}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="its widths is malformed"):
        read_checkpoint(tmp_path / "x.pt")
