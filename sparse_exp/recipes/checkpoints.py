"""The checkpoints of a training: write and check them, and rebuild the model that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.errors import CheckpointError
from sparse_exp.quantization.from_sparseml import from_sparseml
from sparse_exp.quantization.quantizers import (
    begin,
    freeze_quantizers,
    is_quantized,
    is_rounding,
    prepare,
    schemes_of,
)
from sparse_exp.quantization.scheme import as_data, from_data
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.measure import require_layer_sparsity, state_sparsity
from sparse_exp.yolov5 import Checkpoint, YOLOv5, read_checkpoint, save_checkpoint
from sparse_exp.yolov5.channels import build_detector


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one training.

    Attributes:
        folder: an existing directory.
        names: class names.
        imgsz: size of the training images.
        recipe: the recipe that the weights are trained with, that of the start checkpoint included.
    """

    folder: Path
    names: tuple[str, ...]
    imgsz: Imgsz
    recipe: str

    def save(
        self, name: str, model: YOLOv5, phase: str, record: Mapping[str, Any], promised: Mapping[str, float]
    ) -> Path:
        """Write a checkpoint, and read it again to check its zeros.

        Args:
            name: of the file.
            model: the model with the weights to write.
            phase: name of the phase.
            record: a record of the history; its numbers become the checkpoint's metrics.
            promised: least share of zeros of each layer, 0..1; empty: no check.

        Returns:
            The path of the file.

        Raises:
            SparsityError: a layer in the file has fewer zeros.
        """
        path = self.folder / name
        save_checkpoint(
            path,
            model_state=model.state_dict(),
            size=model.size,
            num_classes=model.num_classes,
            names=self.names,
            imgsz=self.imgsz,
            recipe=self.recipe,
            phase=phase,
            epoch=record["epoch"],
            metrics={name: value for name, value in record.items() if isinstance(value, float)},
            quantization=as_data(schemes_of(model)) if is_rounding(model) else {},
            widths=model.widths,
        )
        if promised:
            layers = state_sparsity(read_checkpoint(path).state_dict)
            require_layer_sparsity(layers, promised, f"in {name}")
        return path


def restore(path: Path) -> tuple[YOLOv5, Checkpoint]:
    """Rebuild a trained model, quantized or not.

    Args:
        path: a checkpoint in our own format, or of a quantized model of SparseML's.

    Returns:
        The model in evaluation mode, its quantizers frozen, and the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or its parts do not fit each other.
    """
    checkpoint = read_checkpoint(path)
    model = build_detector(checkpoint.size, checkpoint.num_classes, checkpoint.widths)
    state = checkpoint.state_dict
    try:
        if checkpoint.quantization:
            begin(prepare(model, from_data(checkpoint.quantization)))
        elif is_quantized(list(state)):
            _recipe_of(path, checkpoint).apply_structure(model)
            state = from_sparseml(state, model)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"The weights in {path} do not fit the quantization that it names. "
            "Use a checkpoint that a run or SparseML wrote."
        ) from error
    return freeze_quantizers(model).eval(), checkpoint  # type: ignore[return-value]


def _recipe_of(path: Path, checkpoint: Checkpoint) -> Recipe:
    """The recipe that says how weights of SparseML's are quantized."""
    if not checkpoint.recipe:
        raise CheckpointError(
            f"{path} holds quantized weights but no recipe to rebuild them with. "
            "Use the checkpoint of a run, which has both."
        )
    return Recipe(checkpoint.recipe, name=f"the recipe in {path.name}", engine="sparseml")
