"""What several test modules share because it is expensive: a tiny real training and its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data import DetectionDataset, load_dataset
from sparse_exp.data.digits import materialize
from sparse_exp.data.loader import make_loader

torch.set_num_threads(1)  # the models are tiny, and several tests may run beside each other
CONF = Path(__file__).parents[1] / "conf"
IMGSZ, CLASSES, BATCH, STEPS_PER_EPOCH = 64, 10, 4, 4


@dataclass
class TinyRun:
    """A training that ended: what it was made with and what it left."""

    trainer: object
    history: list
    best: dict[str, Path]
    weights: Path

    @property
    def model(self):
        return self.trainer.model


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """The recipe that runs by default."""
    return (CONF / "recipe" / "transfer_quant.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> DetectionDataset:
    """Images of 64 px: 16 to train on, which are 4 steps an epoch, and 6 to validate on."""
    folder = tmp_path_factory.mktemp("digits")
    return load_dataset(materialize(folder / "digits", imgsz=IMGSZ, train=16, val=6, test=2), "digits")


@pytest.fixture(scope="session")
def digit_images(digits) -> np.ndarray:
    """The validation images: uint8 (6, 3, 64, 64)."""
    loader = make_loader(digits.splits["val"], CLASSES, imgsz=IMGSZ, batch_size=6, train=False)
    return next(iter(loader)).images.numpy()


@pytest.fixture(scope="session")
def train_tiny(digits, tmp_path_factory):
    """A function that trains yolov5n, pruned before, on the digits for a few steps."""
    from sparse_exp.sparsity.prune import prune_by_magnitude
    from sparse_exp.sparsity.recipe import Recipe
    from sparse_exp.training.loop import Trainer, TrainingData
    from sparse_exp.training.precision import Precision
    from sparse_exp.yolov5 import YOLOv5

    def train(text: str, variables: dict | None = None, sparsity: float = 0.75, **config) -> TinyRun:
        torch.manual_seed(0)
        model = YOLOv5("n", CLASSES)
        prune_by_magnitude(model.prunable_convolutions(), sparsity)
        trainer_config = TrainerConfig(batch_size=BATCH, **config)
        loaders = [
            make_loader(
                digits.splits[split],
                CLASSES,
                imgsz=IMGSZ,
                batch_size=BATCH,
                train=split == "train",
                seed=3,
                augment=trainer_config.augment,
            )
            for split in ("train", "val")
        ]
        data = TrainingData(*loaders, digits.names, IMGSZ)
        weights = tmp_path_factory.mktemp("weights")
        precision = Precision(autocast=False, channels_last=True)
        recipe = Recipe(text, variables)
        trainer = Trainer(model, recipe, data, trainer_config, precision, weights=weights, seed=3)
        result = trainer.fit()
        return TinyRun(trainer, result.history, result.best, weights)

    return train


QUANTIZED_FROM_MID_EPOCH = {"num_epochs": 3, "quantization_epochs": 1.5, "warmup_epochs": 0.5}


@pytest.fixture(scope="session")
def tiny_run(train_tiny, recipe_text) -> TinyRun:
    """Three epochs of the default recipe; quantization begins in the middle of the second."""
    return train_tiny(recipe_text, QUANTIZED_FROM_MID_EPOCH)


@pytest.fixture(scope="session")
def deployment(tiny_run, tmp_path_factory) -> Path:
    """The exported files of `tiny_run`'s last checkpoint."""
    from sparse_exp.export.deployment import export_deployment
    from sparse_exp.training.checkpoints import restore

    folder = tmp_path_factory.mktemp("deployment")
    model, _ = restore(tiny_run.weights / "last.pt")
    export_deployment(model, folder, imgsz=IMGSZ, opset=13)
    return folder
