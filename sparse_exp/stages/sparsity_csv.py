"""Zeros of each layer, as ``sparsity.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparse_exp.files import write_text
from sparse_exp.stages.base import Context
from sparse_exp.tracking import Artifact


def write_sparsity(context: Context, checkpoint: Path, promised: Mapping[str, float]) -> Path:
    """Zeros of each layer in a checkpoint's file, as ``sparsity.csv``."""
    from sparse_exp.sparsity.measure import sparsity_table, state_sparsity
    from sparse_exp.yolov5 import read_checkpoint

    layers = state_sparsity(read_checkpoint(checkpoint).state_dict)
    return write_text(context.run.path / "sparsity.csv", sparsity_table(layers, promised))


def announce_sparsity(context: Context, stage: str) -> None:
    """Give the tracker ``sparsity.csv`` where the stage wrote it."""
    name = "sparsity.csv"
    if name in context.run.records[stage].outputs:
        context.tracker.log(Artifact(context.run.path / name))
