"""A trainer that is ready in a moment, and evaluations that cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import make_loader
from sparse_exp.metrics.detection import Matcher
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.training import loop
from sparse_exp.training.evaluation import Evaluation, Validation
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

IMGSZ, CLASSES, BATCH = 64, 10, 4


@pytest.fixture(scope="module")
def tiny_data(digits) -> loop.TrainingData:
    """The digits: 2 steps of 4 images an epoch; 6 images to validate on."""
    augment = TrainerConfig().augment
    train, val = [
        make_loader(digits.splits[split][:8], CLASSES, imgsz=IMGSZ, batch_size=BATCH, train=split == "train",
                    seed=3, augment=augment)
        for split in ("train", "val")
    ]  # fmt: skip
    return loop.TrainingData(train, Validation(val, CLASSES), digits.names, IMGSZ)


@pytest.fixture
def tiny_trainer(tiny_data, tmp_path):
    """A function that makes a trainer of yolov5n; its checkpoints go to ``tmp_path``."""

    def make(
        text: str, variables=None, sparsity: float = 0.5, options=None, engine: str = "native", **config
    ) -> loop.Trainer:
        torch.manual_seed(0)
        model = YOLOv5("n", CLASSES)
        prune_by_magnitude(model.prunable_convolutions(), sparsity)
        precision = Precision(autocast=False, channels_last=True)
        trainer_config = TrainerConfig(batch_size=BATCH, **config)
        recipe = Recipe(text, variables, engine=engine)
        return loop.Trainer(model, recipe, tiny_data, trainer_config, precision, weights=tmp_path, seed=3,
                            **(options or {}))  # fmt: skip

    return make


@pytest.fixture
def scripted(monkeypatch):
    """A function that sets what the next evaluations find: mAP50 by mAP50; the last one goes on."""

    def script(*values: float) -> None:
        left = list(values)

        def evaluate_model(*_args, **_options) -> Evaluation:
            found = left.pop(0) if len(left) > 1 else left[0]
            nothing = Matcher(1)
            return Evaluation(
                found, found / 2, np.zeros(101), np.zeros(101), 6, 0.0, nothing.accuracies().by_class, nothing
            )

        monkeypatch.setattr(Validation, "evaluate_model", evaluate_model)

    return script
