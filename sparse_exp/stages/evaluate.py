"""Accuracy and sparsity of the final torch model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, expected
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.stages.sparsity_csv import write_sparsity
from sparse_exp.tracking import Artifact

_log = logging.getLogger(__name__)


def _run(context: Context) -> Outcome:
    """Measure mAP on the validation split, and on the test split if there is one."""
    from sparse_exp.quantization.reference import as_deployed
    from sparse_exp.recipes.checkpoints import restore
    from sparse_exp.sparsity.measure import (
        GIGA,
        layer_sparsity,
        overall,
        require_layer_sparsity,
        require_sparsity,
        stock_macs,
        total_macs,
        work_sparsity,
    )

    model, checkpoint = restore(context.checkpoint)
    _require_classes(context.checkpoint, checkpoint.names, context.dataset.names)
    layers, where = layer_sparsity(model.prunable_convolutions()), f"in {context.checkpoint.name}"
    require_sparsity(layers, context.planned_sparsity, where)
    require_layer_sparsity(layers, context.facts("train").get("promised", {}), where)
    convolutions, imgsz = model.quantizable_convolutions(), context.experiment.dataset.imgsz
    every = layer_sparsity(convolutions)
    layout = context.precision.memory_format
    deployed = as_deployed(model).to(context.device).to(memory_format=layout)
    result = context.validation().evaluate_model(deployed, layout, description="Evaluating torch")
    metrics: dict[str, Any] = {
        "val/map50": result.map50,
        "val/map50_95": result.map50_95,
        "sparsity/prunable": overall(layers),
        "sparsity/total": overall(every),
        "sparsity/macs": work_sparsity(every),
        "size/macs": total_macs(convolutions, imgsz) / GIGA,
        "size/dense_macs": stock_macs(model.size, model.num_classes, imgsz) / GIGA,
        "size/checkpoint_mb": context.checkpoint.stat().st_size / 1e6,
    }
    if "test" in context.dataset.splits:
        test = context.validation("test").evaluate_model(deployed, layout, description="Evaluating test")
        metrics.update({"test/map50": test.map50, "test/map50_95": test.map50_95})
    facts = {
        "phase": checkpoint.phase,
        "epoch": checkpoint.epoch,
        "curve": {"recall": list(result.recall), "precision": list(result.precision), "ap": result.map50},
        "layers": [{**asdict(layer), "macs": layer.macs(imgsz)} for layer in every],
        "dense_fingerprint": context.facts("baseline").get("dense_fingerprint"),
    }
    if context.checkpoint == context.run.trained_checkpoint:  # the table of its training stands
        return Outcome(metrics=metrics, facts=facts)
    table = write_sparsity(context, context.checkpoint, {})
    return Outcome([table], metrics, facts, events=[Artifact(table)])


def _require_classes(checkpoint: Path, has: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a checkpoint whose classes are not those of the data set, by number or by order.

    Raises:
        ConfigError: the accuracy of such a checkpoint would mean nothing.
    """
    from sparse_exp.yolov5.checkpoint import mixes_classes, numbered_names

    if len(has) != len(wanted) or mixes_classes(has, wanted):
        should_be = f"of the data set's classes {shorten(', '.join(wanted), 80)}, in this order"
        do = "Choose another checkpoint, or the data set that it was trained on."
        raise ConfigError(expected(str(checkpoint), should_be, shorten(", ".join(has), 80), do))
    if set(has) != set(wanted) and tuple(has) != numbered_names(len(has)):
        names = f"{shorten(', '.join(has), 80)}; the data set's are {shorten(', '.join(wanted), 80)}"
        _log.warning("The classes of %s are called %s. They are taken one for one.", checkpoint, names)


def _certain_names(_: Experiment) -> Iterator[str]:
    yield from ("val/map50", "val/map50_95", "size/checkpoint_mb", "size/macs", "size/dense_macs")
    yield from ("sparsity/prunable", "sparsity/total", "sparsity/macs")


def _possible_names(_: Experiment) -> Iterator[str]:
    yield from ("test/map50", "test/map50_95")  # where the data set has that split


STAGE = Stage(
    name="evaluate",
    run=_run,
    shared=lambda _: True,
    computes=True,
    takes_checkpoint=True,
    needs_checkpoint=True,
    certain_names=_certain_names,
    possible_names=_possible_names,
)
