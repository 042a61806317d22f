"""A network loses channels while it trains."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from test_resume_training import same, telling, train, whole_and_cut

from sparse_exp.data.loader import make_loader
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.training import loop
from sparse_exp.training.evaluation import Validation
from sparse_exp.training.state import StateError
from sparse_exp.yolov5 import YOLOv5, read_checkpoint
from sparse_exp.yolov5.channels import channels_of

__all__ = ["telling", "train", "whole_and_cut"]
IMGSZ, CLASSES = 64, 10


@pytest.fixture(scope="module")
def tiny_data(digits) -> loop.TrainingData:
    loaders = [
        make_loader(
            digits.splits[split][:8], CLASSES, imgsz=IMGSZ, batch_size=4, train=split == "train", seed=3
        )
        for split in ("train", "val")
    ]
    seen = make_loader(digits.splits["train"][:4], CLASSES, imgsz=IMGSZ, batch_size=4, train=False)
    return loop.TrainingData(loaders[0], Validation(loaders[1], CLASSES), digits.names, IMGSZ, seen)


def recipe(start=1.0, end=2.0, steps=2, length=4.0, more="", importance="gradients") -> str:
    return f"""modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: {length}
  - !SlimmingModifier
    start_epoch: {start}
    end_epoch: {end}
    share: 0.5
    steps: {steps}
    importance: {importance}
{more}"""


HOLD = """  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
"""
DISTILL = """  - !DistillationModifier
    start_epoch: 1.0
"""
QUANTIZE = """  - !QuantizationModifier
    start_epoch: 3.0
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True, strategy: channel}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


def macs(model: YOLOv5) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, model.export_mode(IMGSZ), torch.no_grad():
        model(torch.zeros(1, 3, IMGSZ, IMGSZ))
    return counter.get_total_flops() // 2


def test_phases_and_their_checkpoints(tiny_trainer):
    trainer = tiny_trainer(recipe(steps=2), sparsity=0.0)
    optimizer, parameters = trainer._optimizer, list(trainer.model.parameters())
    result = trainer.fit()
    assert [record["phase"] for record in result.history] == ["dense", "slimming", "slim", "slim"]
    whole = macs(YOLOv5("n", CLASSES))
    left = {name: macs(restore(path)[0]) / whole for name, path in result.best.items()}
    assert left["dense"] == 1.0
    assert 0.70 < left["slimming"] <= 0.75
    assert 0.45 < left["slim"] <= 0.50
    assert list(map(id, trainer.model.parameters())) == list(map(id, parameters))
    assert macs(copy.deepcopy(trainer.model)) / whole == left["slim"]
    for parameter in parameters:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    checkpoint = read_checkpoint(result.best["slim"])
    assert checkpoint.widths == channels_of(trainer.model)


def test_channels_go_out_of_the_best_weights_before(tiny_trainer, telling, caplog):
    caplog.set_level(logging.INFO)
    trainer = tiny_trainer(recipe(2.0, 2.0, steps=1, length=3.0), sparsity=0.0)
    telling.append(trainer)  # each evaluation finds less than the one before: epoch 1 is the best
    seen: dict[str, torch.Tensor] = {}
    cut = trainer._slim
    trainer._slim = lambda *a: (seen.update(copy.deepcopy(trainer.model.state_dict())), cut(*a))
    result = trainer.fit()
    assert result.phases["dense"].epoch == 1.0
    assert same(seen, read_checkpoint(result.best["dense"]).state_dict)
    assert "the best weights so far, those after epoch 1" in caplog.text


def test_the_parent_teaches(tiny_trainer):
    teacher = YOLOv5("n", CLASSES)
    untaught = copy.deepcopy(teacher.state_dict())
    options = {"teacher": teacher, "parent_teaches": True}
    trainer = tiny_trainer(recipe(more=DISTILL), sparsity=0.0, options=options)
    result = trainer.fit()
    parent = read_checkpoint(result.best["dense"]).state_dict
    assert same(trainer._teacher.state_dict(), parent)
    assert not torch.equal(untaught["model.1.conv.weight"], parent["model.1.conv.weight"])
    assert [record["loss/distill"] != 0 for record in result.history] == [False, True, True, True]


def test_zeros_are_held_in_the_channels_that_stay(tiny_trainer):
    trainer = tiny_trainer(recipe(more=HOLD), sparsity=0.5)
    zero = {name: conv.weight == 0 for name, conv in trainer.model.prunable_convolutions().items()}
    result = trainer.fit()
    assert [record["phase"] for record in result.history] == [
        "pruned",
        "slimming_pruned",
        *["slim_pruned"] * 2,
    ]
    model = restore(result.best["slim_pruned"])[0]
    zeros = sum(int((c.weight == 0).sum()) for c in model.prunable_convolutions().values())
    weights = sum(c.weight.numel() for c in model.prunable_convolutions().values())
    assert 0.3 < zeros / weights < 0.7
    assert weights < sum(mask.numel() for mask in zero.values())
    with torch.no_grad():  # the contract still holds each of them
        conv = trainer.model.prunable_convolutions()["model.1.conv"]
        conv.weight[conv.weight == 0] = 1.0
    with pytest.raises(Exception, match=r"model\.1\.conv"):
        trainer._check_zeros(trainer._recipe.phases()[-1], trainer.model, 4.0)


def test_a_slim_network_is_quantized(tiny_trainer):
    result = tiny_trainer(recipe(more=QUANTIZE), sparsity=0.0).fit()
    assert [record["phase"] for record in result.history] == ["dense", "slimming", "slim", "slim_quant"]
    model, checkpoint = restore(result.best["slim_quant"])
    assert checkpoint.widths == read_checkpoint(result.best["slim"]).widths
    assert len(model.model[1].conv.weight_quantizer.scale) == checkpoint.widths["model.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kills", "options"),
    [
        (recipe(), [1, 1, -1, 1], {}),
        (recipe(0.0, 1.5, steps=3), [1, 1, 1], {}),
        (recipe(more=HOLD), [2, 1], {"sparsity": 0.5}),
        (recipe(1.0, 1.0, steps=1, more=QUANTIZE), [1, 1, 1], {}),
    ],
    ids=["in two steps", "at once and in mid-epoch", "with zeros", "with QAT"],
)
def test_a_killed_training_ends_as_if_it_had_not_been(whole_and_cut, text, kills, options):
    whole_and_cut(text, kills, **options)


def test_a_state_with_other_groups_is_not_used(tiny_trainer):
    trainer = tiny_trainer(recipe(), sparsity=0.0)
    with pytest.raises(StateError, match="does not fit this training"):
        trainer.fit({"widths": {"model.0": 4}})


@pytest.mark.slow
def test_a_slim_network_trains_again(tiny_data, tiny_trainer, tmp_path):
    first = tiny_trainer(recipe(), sparsity=0.0).fit()
    model = restore(first.best["slim"])[0]
    trainer = tiny_trainer(recipe(0.0, 0.0, steps=1, length=1.0, importance="weights"), sparsity=0.0)
    (tmp_path / "again").mkdir()
    again = loop.Trainer(
        model.train(), trainer._recipe, tiny_data, trainer._config, trainer._precision,
        weights=tmp_path / "again", seed=3,
    )  # fmt: skip
    left = macs(restore(again.fit().best["slim"])[0]) / macs(restore(first.best["slim"])[0])
    assert 0.44 < left <= 0.5
