"""Numbers that follow from the data and the device where the configuration leaves them open.

Two of them: the images of a step (``trainer.batch_size=auto``), and the length of a shipped recipe
(``num_epochs`` neither in ``recipe.variables`` nor in ``model``). Small sets need many small steps; a large
set shows as much in few epochs, and its steps may be larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from sparse_exp.config.plain import CONF_DIRECTORY, recipe_path
from sparse_exp.config.schema import AUTO, Experiment
from sparse_exp.data import DetectionDataset
from sparse_exp.planning.preflight import training_batch
from sparse_exp.planning.trial import images_that_fit
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

LEAST_BATCH = 4
MOST_BATCH = {"cpu": 16, "cuda": 64}
FEW_IMAGES = 128  # up to which a training is as long as the model's option says
LEAST_EPOCHS = 5.0


@dataclass(frozen=True)
class Settled:
    """What the rules have chosen for a run.

    Attributes:
        batch_size: images of a step; None: the configuration says it.
        num_epochs: length of the recipe; None: configuration or recipe say it.
        why: the rule and its result, a sentence by label.
    """

    batch_size: int | None = None
    num_epochs: float | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Settled:
        """From what a run recorded; empty where it recorded nothing. Keys of later versions are left out."""
        return cls(**{item.name: kept[item.name] for item in fields(cls) if item.name in kept})

    def as_data(self) -> dict[str, Any]:
        """For a run's manifest."""
        return asdict(self)

    def filled(self, other: Settled) -> Settled:
        """These numbers, and those of another where these lack them."""
        batch_size = other.batch_size if self.batch_size is None else self.batch_size
        num_epochs = other.num_epochs if self.num_epochs is None else self.num_epochs
        return Settled(batch_size, num_epochs, {**other.why, **self.why})

    def applied(self, experiment: Experiment) -> Experiment:
        """The experiment with these numbers where it leaves them open."""
        trainer, recipe = experiment.trainer, experiment.recipe
        if self.batch_size is not None and trainer.batch_size == AUTO:
            trainer = replace(trainer, batch_size=self.batch_size)
        if self.num_epochs is not None and length_is_open(experiment):
            recipe = replace(recipe, variables={**recipe.variables, "num_epochs": self.num_epochs})
        return replace(experiment, trainer=trainer, recipe=recipe)


def length_is_open(experiment: Experiment) -> bool:
    """Whether the length of a shipped recipe is left to the rule; a recipe of one's own says its length."""
    recipe = experiment.recipe
    shipped = recipe_path(recipe.file).is_relative_to(CONF_DIRECTORY)
    given = "num_epochs" in recipe.variables or recipe.num_epochs is not None
    return shipped and not given and not recipe.oneshot


def is_open(experiment: Experiment) -> bool:
    """Whether anything is left to the rules."""
    batch = experiment.trainer.batch_size == AUTO and not experiment.recipe.oneshot
    return batch or length_is_open(experiment)


def batch_for(images: int, most: int, devices: int = 1) -> int:
    """Images of a step, by the number of training images.

    Args:
        images: of the training split.
        most: images of a step on this kind of device.
        devices: processes that share a step equally.

    Returns:
        The largest power of two (times ``devices``, where these are no power of two) up to ``most`` that
        leaves at least four steps an epoch for each of its images; not below `LEAST_BATCH`.
    """
    sizes = [devices << power for power in range(11)]
    enough = [size for size in sizes if size >= LEAST_BATCH]
    return max((size for size in enough if size <= most and 4 * size * size <= images), default=enough[0])


def epochs_for(images: int, most: float) -> float:
    """Length of a training, by the number of training images.

    Beyond `FEW_IMAGES` it is divided by the root of how many times as many they are: more images are seen in
    all, each less often. With `batch_for`, a large set gets at least as many steps as one of 100 images.

    Args:
        images: of the training split.
        most: epochs for few images.

    Returns:
        Whole epochs, at least `LEAST_EPOCHS`, unless ``most`` is less.
    """
    if images <= FEW_IMAGES:
        return most
    return max(min(LEAST_EPOCHS, most), float(math.ceil(most * math.sqrt(FEW_IMAGES / images))))


def settle(
    experiment: Experiment,
    recipe: Recipe,
    dataset: DetectionDataset,
    precision: Precision,
    device: torch.device,
) -> Settled:
    """Choose what the configuration leaves open.

    Args:
        experiment: the checked configuration.
        recipe: its recipe; of its length nothing depends.
        dataset: its data.
        precision: how floating-point phases compute.
        device: that trains.
    """
    images, why = len(dataset.splits["train"]), {}
    batch_size = num_epochs = None
    if length_is_open(experiment):
        most = experiment.model.most_epochs
        num_epochs = experiment.model.num_epochs or epochs_for(images, most)
        rule = f"up to {FEW_IMAGES} training images (model.num_epochs=null)"
        if experiment.model.num_epochs is not None:
            rule = "model.num_epochs"
        elif images > FEW_IMAGES:
            rule = (
                f"of at most {most:g}, by the root of {FEW_IMAGES} in {images} training images, at least "
                f"{min(LEAST_EPOCHS, most):g} (model.num_epochs=null)"
            )
        why["length"] = f"{num_epochs:g} epochs, {rule}"
    if experiment.trainer.batch_size == AUTO and not experiment.recipe.oneshot:
        devices = experiment.trainer.devices
        wanted = batch_for(images, MOST_BATCH.get(device.type, MOST_BATCH["cpu"]), devices)
        batch_size = _fitting(experiment, recipe, dataset, precision, wanted)
        steps = math.ceil(images / batch_size)
        memory = "" if batch_size == wanted else f"; {wanted} would not fit into memory"
        why["batch"] = f"{batch_size} images, {steps} steps an epoch{memory} (trainer.batch_size=auto)"
    return Settled(batch_size, num_epochs, why)


def _fitting(
    experiment: Experiment, recipe: Recipe, dataset: DetectionDataset, precision: Precision, wanted: int
) -> int:
    """As many images of a step as are wanted, or half of them, or a quarter, as memory allows."""
    least = batch_for(0, 0, experiment.trainer.devices)
    if wanted <= least:
        return wanted
    asked = replace(experiment, trainer=replace(experiment.trainer, batch_size=wanted))
    return images_that_fit(
        YOLOv5(experiment.model.size, len(dataset.names)),
        recipe,
        training_batch(asked, dataset),
        asked.trainer,
        precision,
        experiment.dataset.imgsz,
        least=least,
        optimizer=experiment.recipe.optimizer,
    )
