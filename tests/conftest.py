"""What several test modules share because it is expensive: a tiny real training and its export."""

from __future__ import annotations

import copy
import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_exp import cli  # noqa: F401 - it tells OmegaConf of the resolvers that conf/ uses
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data import DetectionDataset, load_dataset
from sparse_exp.data.digits import materialize
from sparse_exp.data.loader import make_loader
from sparse_exp.locks import exclusive

torch.set_num_threads(1)  # the models are tiny, and several tests may run beside each other
gc.set_threshold(50_000, 20, 50)  # a collection walks over a million objects of the libraries
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function that has a directory of that name filled by the first worker that asks for it."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def directory(name: str, fill: Callable[[Path], object]) -> Path:
        with exclusive(common / f"{name}.lock", f"{name} is being made"):
            if not (common / name).is_dir():
                part = tmp_path_factory.mktemp(name)
                fill(part)
                part.rename(common / name)
        return common / name

    return directory


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
    from sparse_exp.recipes.recipe import Recipe
    from sparse_exp.sparsity.prune import prune_by_magnitude
    from sparse_exp.training.evaluation import Validation
    from sparse_exp.training.loop import Trainer, TrainingData
    from sparse_exp.training.precision import Precision
    from sparse_exp.yolov5 import YOLOv5

    def train(text: str, variables: dict | None = None, sparsity: float = 0.75, **config) -> TinyRun:
        torch.manual_seed(0)
        model = YOLOv5("n", CLASSES)
        prune_by_magnitude(model.prunable_convolutions(), sparsity)
        trainer_config = TrainerConfig(batch_size=BATCH, **config)
        train_loader, val_loader = [
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
        data = TrainingData(train_loader, Validation(val_loader, CLASSES), digits.names, IMGSZ)
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
def lively_start(digits):
    """A pruned yolov5n in floating point whose outputs depend on the image as a trained one's do.

    Of a detector that was trained for a minute the scores are all the same, and an engine that
    computes them wrongly would not be noticed: so batch norms get random weights and the statistics
    of real images, and the head larger weights and no bias towards "nothing here". Do not change it.
    """
    from sparse_exp.sparsity.prune import prune_by_magnitude
    from sparse_exp.yolov5 import YOLOv5

    loader = make_loader(digits.splits["train"], CLASSES, imgsz=IMGSZ, batch_size=8, train=False)
    torch.manual_seed(0)
    model = YOLOv5("n", CLASSES).train()
    prune_by_magnitude(model.prunable_convolutions(), 0.75)
    _enliven(model, [batch.images.float() / 255 for batch in loader] * 2)
    return model


@pytest.fixture(scope="session")
def lively_model(digits, lively_start):
    """`lively_start` after some steps of QAT."""
    from sparse_exp.config.schema import LossConfig
    from sparse_exp.recipes.recipe import Recipe, freeze_quantizers, pin_input_quantizer
    from sparse_exp.yolov5 import DetectionLoss

    loader = make_loader(digits.splits["train"], CLASSES, imgsz=IMGSZ, batch_size=8, train=False)
    batches = [(batch.images.float() / 255, batch.targets) for batch in loader] * 2
    model = copy.deepcopy(lively_start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sparsifier = Recipe(HOLD_AND_QUANTIZE).attach(model, optimizer, len(batches))
    sparsifier.before_step(0.0)
    pin_input_quantizer(model, model.stem)
    loss_of = DetectionLoss(model.anchors, CLASSES, LossConfig(), IMGSZ)
    for images, targets in batches:
        loss, _ = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        sparsifier.step(0.0)
    sparsifier.finish()
    return freeze_quantizers(model).eval()


HOLD_AND_QUANTIZE = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
  - !QuantizationModifier
    start_epoch: 0.0
    scheme:
      input_activations: {num_bits: 8, symmetric: False}
      weights: {num_bits: 8, symmetric: True}
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""


@torch.no_grad()
def _enliven(model, batches) -> None:
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.0)
        torch.nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = 0.5
    for conv in model.head.m:
        conv.weight.mul_(2)
        conv.bias.zero_()
    for images in batches * 2:
        model(images)
    for norm in norms:
        norm.momentum = 0.03


@pytest.fixture(scope="session")
def deployment(lively_model, digit_images, made_once) -> Path:
    """The exported files of `lively_model`; do not change them."""
    from sparse_exp.export.exporter import export_deployment
    from sparse_exp.export.onnx import FileForm

    def fill(folder: Path) -> None:
        export_deployment(lively_model, folder, FileForm(IMGSZ, opset=13), images=[digit_images])

    return made_once("deployment", fill)


@pytest.fixture(scope="session")
def new_database(made_once) -> Path:
    """MLflow's database of a store without runs, to copy: making one takes seconds."""
    from sparse_exp.tracking.mlflow import connect

    return made_once("new-store", lambda folder: connect(f"sqlite:///{folder}/mlflow.db")) / "mlflow.db"


@pytest.fixture(autouse=True)
def _quiet_loggers():
    """Each test begins with the loggers as an import leaves them: Hydra sets up the root's."""
    ours, root = logging.getLogger("sparse_exp"), logging.getLogger()
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    for handler in list(root.handlers):
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


# Of the same wheel for each platform; hashes of the files, which do not differ between platforms.
PHOTOS = {
    "astronaut": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
}


@pytest.fixture(scope="session")
def photos() -> dict[str, Path]:
    """scikit-image's photos of a person, a cat and a cup, by name; fetched (14 MB each) where not cached."""
    from sparse_exp.config.schema import SourceConfig
    from sparse_exp.sources.cache import cache_directory, fetch

    return {
        name: fetch(
            SourceConfig(f"index:scikit-image==0.25.2!skimage/data/{name}.png", sha256), cache_directory()
        ).path
        for name, sha256 in PHOTOS.items()
    }
