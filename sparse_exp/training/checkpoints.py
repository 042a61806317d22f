"""From a checkpoint file back to the model that wrote it."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.errors import CheckpointError
from sparse_exp.sparsity.recipe import Recipe, freeze_quantizers, is_quantized
from sparse_exp.yolov5 import Checkpoint, YOLOv5, read_checkpoint


def restore(path: Path) -> tuple[YOLOv5, Checkpoint]:
    """Rebuild a trained model; a quantized one gets its structure from the recipe it was trained with.

    Args:
        path: a checkpoint that a training here wrote.

    Returns:
        The model in evaluation mode, its quantizers frozen, and the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or recipe and weights do not fit each other.
    """
    checkpoint = read_checkpoint(path)
    model = YOLOv5(checkpoint.size, checkpoint.num_classes)
    if is_quantized(list(checkpoint.state_dict)):
        if not checkpoint.recipe:
            raise CheckpointError(
                f"{path} holds quantized weights but no recipe to rebuild them with. "
                "Use the checkpoint of a run, which has both."
            )
        Recipe(checkpoint.recipe, name=f"the recipe in {path.name}").apply_structure(model)
    try:
        model.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path} do not fit the model that its recipe makes. "
            "Use a checkpoint that this version wrote."
        ) from error
    return freeze_quantizers(model).eval(), checkpoint  # type: ignore[return-value]
