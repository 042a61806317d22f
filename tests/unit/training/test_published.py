"""What the published training of YOLOv5 does besides: mosaic ends, momentum rises, the average's ramp."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training.averaging import exponential
from sparse_exp.training.phases import last_mosaic

FLOAT = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 4.0
"""
QUANTIZED = f"""{FLOAT}
  - !QuantizationModifier
    start_epoch: 2.5
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


@pytest.fixture
def passes(tiny_trainer, scripted):
    """A function from a recipe and ``close_mosaic`` to whether each pass over the images had mosaics."""
    scripted(0.5)

    def train(text: str, close_mosaic: float | None, **config) -> list[bool]:
        trainer, seen = tiny_trainer(text, close_mosaic=close_mosaic, **config), []
        set_epoch = trainer._share.set_epoch

        def spied(epoch: int, skip: int = 0, *, mosaic: bool = True) -> None:
            seen.append(mosaic)
            set_epoch(epoch, skip, mosaic=mosaic)

        trainer._share.set_epoch = spied
        trainer.fit()
        return seen

    return train


@pytest.mark.parametrize(
    ("close_mosaic", "wanted"),
    [(0.0, [True] * 4), (1.0, [True] * 3 + [False]), (9.0, [False] * 4), (None, [True] * 3 + [False])],
)
def test_mosaic_ends_before_the_training_does(passes, close_mosaic, wanted):
    assert passes(FLOAT, close_mosaic) == wanted


@pytest.mark.parametrize(("close_mosaic", "with_mosaic"), [(0.5, 2), (1.0, 1), (None, 1)])
def test_mosaic_ends_before_quantization_begins(passes, close_mosaic, with_mosaic):
    """A pass of which a part would lie beyond the end has none."""
    assert passes(QUANTIZED, close_mosaic) == [True] * with_mosaic + [False] * (4 - with_mosaic)


@pytest.mark.parametrize(
    ("epochs", "quantization_start", "wanted"),
    [(12, None, 10.8), (12, 10, 9), (5, None, 4), (50, 40, 36), (300, None, 290), (1, None, 0), (2, 0, -1)],
)
def test_by_default_the_last_tenth_of_the_epochs_has_no_mosaic(epochs, quantization_start, wanted):
    assert last_mosaic(TrainerConfig(), epochs, quantization_start) == pytest.approx(wanted)


def test_quantization_never_sees_a_mosaic_where_the_phase_before_ends_early(passes):
    longer = QUANTIZED.replace("4.0", "8.0").replace("2.5", "6.0")
    seen = passes(longer, 1.0, patience=1)  # the first phase ends after two epochs, of six
    assert seen == [True, True, False, False]


def momenta(trainer, until: int) -> list[float]:
    found = []
    for step in range(until):
        trainer._set_momentum(step / 4)
        found.append(trainer._optimizer.param_groups[0]["momentum"])
    return found


def test_the_momentum_of_sgd_rises_in_a_line(tiny_trainer):
    options = {"options": {"optimizer": "sgd"}, "warmup": 1.0, "momentum": 0.9}
    assert momenta(tiny_trainer(FLOAT, warmup_momentum=0.8, **options), 6) == pytest.approx(
        [0.8, 0.825, 0.85, 0.875, 0.9, 0.9]
    )
    assert momenta(tiny_trainer(FLOAT, **options), 3) == [0.9] * 3
    low = {**options, "momentum": 0.5}
    assert momenta(tiny_trainer(FLOAT, warmup_momentum=0.8, **low), 3) == [0.5] * 3  # never above it


def test_adam_has_no_momentum_to_warm_up(tiny_trainer):
    trainer = tiny_trainer(FLOAT, warmup_momentum=0.8)
    trainer._set_momentum(0.0)
    assert "momentum" not in trainer._optimizer.param_groups[0]


def test_the_published_ramp_of_the_average():
    model = torch.nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=exponential(0.9999, tau=2000.0))
    averaged.update_parameters(model)  # the first copies
    wanted = float(model.weight.detach())
    for update in range(2, 6):
        with torch.no_grad():
            model.weight += 1.0
        averaged.update_parameters(model)
        decay = 0.9999 * (1 - math.exp(-update / 2000))
        wanted = decay * wanted + (1 - decay) * float(model.weight.detach())
        assert float(averaged.module.weight.detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_recipe_without_quantization_has_no_start_of_it():
    assert Recipe(FLOAT).quantization_start is None
