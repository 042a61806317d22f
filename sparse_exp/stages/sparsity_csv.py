"""Zeros of each layer, as ``sparsity.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparse_exp.files import write_text
from sparse_exp.stages.base import Context


def write_sparsity(context: Context, checkpoint: Path, promised: Mapping[str, float]) -> Path:
    """Write the zeros of each layer in a checkpoint's file.

    Args:
        context: of the run whose directory the table is written to.
        checkpoint: its file.
        promised: least share of zeros of each layer, 0..1, by name; shown beside what was found.
    """
    from sparse_exp.sparsity.measure import sparsity_table, state_sparsity
    from sparse_exp.yolov5 import read_checkpoint

    imgsz = context.experiment.dataset.imgsz
    layers = state_sparsity(read_checkpoint(checkpoint).state_dict)
    return write_text(context.run.path / "sparsity.csv", sparsity_table(layers, promised, imgsz))
