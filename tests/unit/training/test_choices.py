"""What a user chooses about a training: layers to freeze, the accuracy that counts, when it is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.errors import ConfigError
from sparse_exp.metrics.detection import Matcher
from sparse_exp.training.averaging import exponential
from sparse_exp.training.evaluation import Evaluation, Validation
from sparse_exp.training.optimizer import WEIGHTS, make_optimizer
from sparse_exp.yolov5 import YOLOv5, read_checkpoint

EPOCHS = "training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {}\n"


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["backbone"], [f"model.{number}." for number in range(10)]),
        (["model.0", "model.2.cv1"], ["model.0.", "model.2.cv1."]),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_frozen_layers_stay_as_they_are(tiny_trainer, recipe_text, scripted, names, parts, quantized) -> None:
    scripted(0.5)
    text, variables = (recipe_text, {"num_epochs": 2}) if quantized else (EPOCHS.format(2), None)
    trainer = tiny_trainer(text, variables, freeze=names)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.fit()
    own = {name: tensor for name, tensor in trainer.model.state_dict().items() if name in before}
    own = {name: tensor for name, tensor in own.items() if "quantizer" not in name}
    moved = {name for name, tensor in own.items() if not torch.equal(tensor, before[name])}
    assert not [name for name in moved if name.startswith(tuple(parts))]
    free = {
        name for name in own if not name.startswith(tuple(parts)) and name.endswith(("weight", "running_var"))
    }
    assert free <= moved


@pytest.mark.parametrize(
    ("names", "message"), [(["model.99"], "model.99"), ([""], "trainer.freeze"), (["model"], "all layers")]
)
def test_layers_that_cannot_be_frozen_are_refused(tiny_trainer, names, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_trainer(EPOCHS.format(1), freeze=names)


@pytest.mark.parametrize(("monitor", "epoch"), [("map50", 2.0), ("map50_95", 3.0), ("fitness", 3.0)])
@pytest.mark.slow
def test_the_monitored_accuracy_chooses_the_checkpoint(tiny_trainer, monkeypatch, monitor, epoch) -> None:
    """0.1 x 0.6 + 0.9 x 0.2 = 0.24 after epoch 2; 0.1 x 0.5 + 0.9 x 0.3 = 0.32 after epoch 3."""
    found = iter([(0.4, 0.1), (0.6, 0.2), (0.5, 0.3), (0.4, 0.2)])

    def evaluate_model(*_args, **_options) -> Evaluation:
        nothing, curve = Matcher(1), np.zeros(101)
        return Evaluation(*next(found), curve, curve, 6, 0.0, nothing.accuracies().by_class, nothing)

    monkeypatch.setattr(Validation, "evaluate_model", evaluate_model)
    result = tiny_trainer(EPOCHS.format(4), monitor=monitor).fit()
    assert read_checkpoint(result.best["dense"]).epoch == epoch


def test_some_epochs_are_left_out_of_the_history(tiny_trainer, scripted) -> None:
    scripted(0.5)
    history = tiny_trainer(EPOCHS.format(5), val_every=2).fit().history
    assert [record["epoch"] for record in history] == [2.0, 4.0, 5.0]


def test_averages_of_440_steps_are_those_of_a_decay_of_98_percent() -> None:
    """(1 + n) / (10 + n) is below 0.98 up to there: what was trained in fewer steps stays bit for bit."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    averages = [
        AveragedModel(model, multi_avg_fn=exponential(decay)) for decay in (0.98, TrainerConfig().ema_decay)
    ]
    for step in range(460):
        with torch.no_grad():
            model.weight.add_(torch.randn(8, 8))
        for average in averages:
            average.update_parameters(model)
        same = torch.equal(averages[0].module.weight, averages[1].module.weight)
        assert same is (step <= 440)


@pytest.mark.parametrize(
    ("kind", "batch", "decay"), [("sgd", 64, 0.3), ("sgd", 4, 0.01875), ("sgd", 128, 0.6), ("adamw", 4, 0.3)]
)
def test_the_decay_of_sgd_acts_once_for_64_images(kind, batch, decay) -> None:
    config = TrainerConfig(batch_size=batch, weight_decay=0.3)
    groups = make_optimizer(YOLOv5("n", 1), config, kind).param_groups
    assert groups[WEIGHTS]["weight_decay"] == pytest.approx(decay)
    assert TrainerConfig().momentum == 0.937
