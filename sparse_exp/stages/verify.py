"""The exported files against the checkpoint they came from; accuracy and size of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparse_exp.config.runtimes import runs_quantized
from sparse_exp.config.schema import Experiment
from sparse_exp.files import write_json
from sparse_exp.metrics.classes import CLASSES, as_plain, class_metrics
from sparse_exp.metrics.detection import ratio_interval
from sparse_exp.metrics.recovery import recovery_engine, recovery_metrics
from sparse_exp.metrics.result_rows import SPARSITIES
from sparse_exp.runs.deployment import (
    DENSE,
    MODEL,
    ONNXRUNTIME,
    QDQ,
    TORCH,
    accuracy_prefix,
    file_name,
    size_prefix,
)
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Artifact

if TYPE_CHECKING:
    from sparse_exp.training.evaluation import Evaluation

_SIZES = ("onnx_mb", "onnx_gzip_mb", "nonzero_mb")
_MAPS = ("map50", "map50_95")
_DIFFERENCES = (
    "score_mean",
    "score_max",
    "box_mean_px",
    "box_max_px",
    "matched_of_torch",
    "matched_of_engine",
    "map50_difference",
    "map50_difference_error",
)


def _run(context: Context) -> Outcome:
    from sparse_exp.export.accuracy import measure_files
    from sparse_exp.export.first_outputs import FILE, FirstOutputs
    from sparse_exp.export.verification import Promise, verify_deployment

    experiment, validation = context.experiment, context.validation()
    promise = Promise(context.planned_sparsity, context.facts("train").get("promised", {}))
    deployment, first = context.run.deployment, FirstOutputs()
    metrics, deployed = verify_deployment(
        deployment,
        context.checkpoint,
        validation,
        experiment,
        promise=promise,
        images=len(context.dataset.splits["val"]),
        layout=context.precision.memory_format,
        device=context.device,
        cores=context.cores,
        first=first,
    )
    measured, cells, others = measure_files(
        deployment,
        validation,
        experiment,
        metrics,
        checkpoints=context.facts("export"),
        cores=context.cores,
        first=first,
    )
    metrics |= measured
    engines = experiment.hardware.engines
    metrics |= recovery_metrics(context.facts("baseline"), metrics, engines)
    evaluations = {(engine, "sparse"): found for engine, found in deployed.items()} | others
    metrics |= _recovery_intervals(evaluations, metrics, engines)
    metrics |= _by_class(evaluations, context.dataset.names, engines)
    classes = {
        "names": context.dataset.names,
        **{"/".join(cell): as_plain(found.by_class) for cell, found in evaluations.items()},
    }
    files = [first.write(context.run.path / FILE), write_json(context.run.path / CLASSES, classes)]
    curves = {
        engine: {"recall": list(found.recall), "precision": list(found.precision), "ap": found.map50}
        for engine, found in deployed.items()
    }
    return Outcome(files, metrics, {"curves": curves, "cells": cells}, events=[Artifact(files[1])])


def _recovery_intervals(
    evaluations: Mapping[tuple[str, str], Evaluation], metrics: Mapping[str, float], engines: Sequence[str]
) -> dict[str, float]:
    """Between what the recovery lies in each engine in which the dense network was evaluated, too."""
    found: dict[str, float] = {}
    for engine in engines:
        deployed, dense = (evaluations.get((engine, variant)) for variant in ("sparse", "dense"))
        if f"recovery/{engine}/map50" in metrics and deployed and dense:
            bounds = ratio_interval(deployed.matcher, dense.matcher)
            for end, bound in zip(("low", "high"), bounds or (), strict=False):
                found[f"recovery/{engine}/map50_{end}"] = bound
    return found


def _by_class(
    evaluations: Mapping[tuple[str, str], Evaluation], names: Sequence[str], engines: Sequence[str]
) -> dict[str, float]:
    """Accuracies of each class, deployed and dense, in the engine whose accuracy stands for the run."""
    run_in = [engine for engine in engines if (engine, "sparse") in evaluations]
    if not run_in:
        return {}
    deployed, dense = (evaluations.get((recovery_engine(run_in), variant)) for variant in ("sparse", "dense"))
    return class_metrics(names, deployed.by_class, dense.by_class if dense else None) if deployed else {}


def _marks(context: Context) -> dict[str, Any]:
    """The engines and variants, and the accuracy of the baseline."""
    hardware = context.experiment.hardware
    return {
        "baseline": context.facts("baseline").get("map50"),
        "engines": hardware.engines,
        "variants": sorted(hardware.variants),
    }


def _certain_names(experiment: Experiment) -> Iterator[str]:
    yield from (f"size/{size_prefix(file)}{name}" for file in (MODEL, DENSE) for name in _SIZES)
    yield from (name for name in SPARSITIES if name == "sparsity/onnx")
    yield from ("quantized/convolutions", "quantizable/convolutions")
    for engine in [name for name in experiment.hardware.engines if runs_quantized(name)]:
        yield from (f"deployed/{engine}/{name}" for name in _MAPS)
        yield from (f"verify/{engine}/{name}" for name in _DIFFERENCES)


def _possible_names(experiment: Experiment) -> Iterator[str]:
    """Names of files that may turn out to be impossible, or whose weights may be initial ones."""
    hardware = experiment.hardware
    others = [variant for variant in hardware.variants if variant != "sparse"]
    yield "size/dense_checkpoint_mb"
    for file in (QDQ, ONNXRUNTIME):  # of a quantized network
        yield from (f"size/{size_prefix(file)}{name}" for name in _SIZES)
    if "sparse_fp32" in others:
        yield "size/sparse_fp32/checkpoint_mb"
    for engine in hardware.engines:
        yield from (accuracy_prefix(engine, variant) + name for variant in others for name in _MAPS)
        prefixes = {size_prefix(file_name(engine, variant)) for variant in others if engine != TORCH}
        yield from (f"size/{prefix}{name}" for prefix in prefixes for name in _SIZES)
    for engine in [name for name in hardware.engines if not runs_quantized(name)]:
        yield from (f"deployed/{engine}/{name}" for name in _MAPS)
        yield from (f"verify/{engine}/{name}" for name in _DIFFERENCES)
    if experiment.recovery.baseline != "none":
        yield "recovery/map50"
        ends = ("", "_low", "_high")
        yield from (f"recovery/{engine}/map50{end}" for engine in hardware.engines for end in ends)


STAGE = Stage(
    name="verify",
    run=_run,
    marks=_marks,
    shared=lambda _: True,
    computes=True,
    takes_checkpoint=True,
    needs_files=True,
    certain_names=_certain_names,
    possible_names=_possible_names,
)
