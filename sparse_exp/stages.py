"""One short function per stage: a context in, an outcome out.

Stages hand each other files and the facts of their records, never objects, so that each can run
alone and a run can be resumed between any two of them. Libraries are imported when a stage runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sparse_exp import __version__
from sparse_exp.artifacts import sha256_of, write_json, write_text
from sparse_exp.config.resolve import as_dict
from sparse_exp.context import Context, Outcome
from sparse_exp.errors import ConfigError
from sparse_exp.tracking import Artifact, Dataset, Model, Pause, Resume, Tags

_log = logging.getLogger(__name__)


def fetch(context: Context) -> Outcome:
    """Bring the data set and the start checkpoint onto this machine, verified."""
    from sparse_exp.data import check_dataset

    dataset = context.dataset
    boxes = check_dataset(dataset)
    for split, samples in dataset.splits.items():
        _log.info("%s/%s: %d images, %d boxes", dataset.name, split, len(samples), boxes[split])
    facts: dict[str, Any] = {
        "dataset": dataset.digest,
        "boxes": boxes,
        "names": list(dataset.names),
        "skipped": dataset.skipped,
    }
    if "train" in context.experiment.stages:
        facts |= _fetch_start(context)
    origin = {"weights/origin": facts["origin"]} if "origin" in facts else {}
    return Outcome(metrics=origin, facts=facts)


def _fetch_start(context: Context) -> dict[str, str]:
    """Where the start comes from, the sha256 of its file, and the file's origin if it is grown from that."""
    from sparse_exp.zoo.start import SCRATCH, fetch_start

    start = fetch_start(context.experiment.model, context.cache, context.zoo)
    if start is None:
        facts = {"origin": SCRATCH, "sha256": ""}
    else:
        facts = {"origin": start.name, "sha256": start.file.sha256}
        facts |= {"grown_from": start.file.origin} if start.grown else {}
        _log.info("Start weights: %s, sha256 %s", start.name, start.file.sha256)
    return facts


def _announce_fetch(context: Context) -> None:
    dataset, facts = context.dataset, context.facts("fetch")
    for split, samples in dataset.splits.items():
        context.tracker.log(Dataset(dataset.name, dataset.digest, str(dataset.root), split, len(samples)))
    tags = {"dataset.digest": facts["dataset"], "dataset.skipped": str(facts["skipped"])}
    weights = {f"weights/{name}": facts.get(name) for name in ("origin", "sha256", "grown_from")}
    context.tracker.log(Tags({**tags, **{name: text for name, text in weights.items() if text}}))


def plan(context: Context) -> Outcome:
    """Say what will happen, and refuse what cannot end well."""
    if "train" not in context.experiment.stages:
        return Outcome()
    from sparse_exp.plan import with_mismatch
    from sparse_exp.report.console import show_plan
    from sparse_exp.training.preflight import lay_out

    laid_out, start = lay_out(
        context.experiment, context.recipe, context.dataset, context.precision, context.cache
    )
    laid_out = with_mismatch(laid_out, context.experiment.hardware.name, context.mismatch)
    show_plan(laid_out)
    transfer = f"{start.report.taken} of {start.report.total} tensors" if start.report else "none"
    found = {"sparsity": laid_out.start.sparsity, "quantized": laid_out.start.quantized}
    return Outcome(facts={**laid_out.as_facts(), "transferred": transfer, "start": found})


def _announce_plan(context: Context) -> None:
    facts = context.facts("plan")
    if facts and context.facts("fetch").get("sha256"):  # a start from random weights has none
        tags = {"taken": facts["transferred"], **facts["start"]}
        context.tracker.log(Tags({f"weights/{name}": str(value) for name, value in tags.items()}))


def baseline(context: Context) -> Outcome:
    """Find or train the dense counterpart, where the configuration asks for it."""
    from sparse_exp.recovery import find_or_train

    facts = find_or_train(context)
    return Outcome(metrics={"baseline/map50": facts["map50"]} if "map50" in facts else {}, facts=facts)


def _announce_baseline(context: Context) -> None:
    from sparse_exp.recovery import TAG

    facts = context.facts("baseline")
    if "dense_fingerprint" in facts:  # this run is one, and can be found by others
        context.tracker.log(Tags({TAG: facts["dense_fingerprint"]}))


def train(context: Context) -> Outcome:
    """Fine-tune under the recipe, or apply it at once; the best checkpoint of the last phase goes on."""
    from sparse_exp.training.run import run_training
    from sparse_exp.training.state import STATE

    weights = context.run.path / "weights"
    weights.mkdir(exist_ok=True)
    result, composed = run_training(context, lambda record: _log_epoch(context, record))
    history = write_json(context.run.path / "history.json", result.history)
    phase, best = list(result.phases.items())[-1]
    table = _write_sparsity(context, best.path, best.promised)
    facts = {
        "checkpoint": str(best.path.relative_to(context.run.path)),
        "phase": phase,
        "epoch": best.epoch,
        "promised": best.promised,
        "recipe": composed,
        "devices": context.experiment.trainer.devices,
        "threads": context.threads,
    }
    state = context.run.path / STATE
    checkpoints = sorted(path for path in weights.glob("[!.]*.pt") if path != state)
    return Outcome([history, table, *checkpoints], facts=facts, spent=[state])


def _announce_train(context: Context) -> None:
    context.tracker.log(Artifact(write_recipe(context)))
    _announce_sparsity(context, "train")


def _write_sparsity(context: Context, checkpoint: Path, promised: Mapping[str, float]) -> Path:
    """Zeros of each layer in a checkpoint's file, as ``sparsity.csv``."""
    from sparse_exp.sparsity.measure import sparsity_table, state_sparsity
    from sparse_exp.yolov5 import read_checkpoint

    layers = state_sparsity(read_checkpoint(checkpoint).state_dict)
    return write_text(context.run.path / "sparsity.csv", sparsity_table(layers, promised))


def _announce_sparsity(context: Context, stage: str) -> None:
    name = "sparsity.csv"
    if name in context.run.records[stage].outputs:
        context.tracker.log(Artifact(context.run.path / name))


def _log_epoch(context: Context, record: dict[str, Any]) -> None:
    from sparse_exp.training.run import epoch_metrics

    context.tracker.log(epoch_metrics(record))
    losses = "".join(
        f"{name.removeprefix('loss/')} {value:.4f} "
        for name, value in record.items()
        if name.startswith("loss/")
    )
    speed = f"  {record['images_per_s']:.1f} images/s" if "images_per_s" in record else ""
    _log.info(
        "epoch %-5.4g %-12s %s mAP50 %.3f  sparsity %.4f%s",
        *(record[name] for name in ("epoch", "phase")),
        losses,
        *(record[name] for name in ("val/map50", "sparsity/prunable")),
        speed,
    )


def evaluate(context: Context) -> Outcome:
    """Measure mAP of the final torch model on the validation split, and on the test split if there is one."""
    from sparse_exp.export.reference import as_deployed
    from sparse_exp.sparsity.measure import (
        layer_sparsity,
        overall,
        require_layer_sparsity,
        require_sparsity,
        total_sparsity,
    )
    from sparse_exp.training.checkpoints import restore
    from sparse_exp.training.evaluation import evaluate_model

    model, checkpoint = restore(context.checkpoint)
    layers, where = layer_sparsity(model.prunable_convolutions()), f"in {context.checkpoint.name}"
    require_sparsity(layers, context.planned_sparsity, where)
    require_layer_sparsity(layers, context.facts("train").get("promised", {}), where)
    trainer, layout = context.experiment.trainer, context.precision.memory_format
    deployed = as_deployed(model).to(memory_format=layout)
    result = evaluate_model(deployed, context.loader("val"), trainer, layout, description="Evaluating torch")
    metrics: dict[str, Any] = {
        "val/map50": result.map50,
        "val/map50_95": result.map50_95,
        "sparsity/prunable": overall(layers),
        "sparsity/total": total_sparsity(model),
        "size/checkpoint_mb": context.checkpoint.stat().st_size / 1e6,
    }
    if "test" in context.dataset.splits:
        test = evaluate_model(
            deployed, context.loader("test"), trainer, layout, description="Evaluating test"
        )
        metrics.update({"test/map50": test.map50, "test/map50_95": test.map50_95})
    facts = {
        "phase": checkpoint.phase,
        "epoch": checkpoint.epoch,
        "curve": {"recall": list(result.recall), "precision": list(result.precision), "ap": result.map50},
        "layers": [asdict(layer) for layer in layer_sparsity(model.quantizable_convolutions())],
        "dense_fingerprint": context.facts("baseline").get("dense_fingerprint"),
    }
    trained = "train" in context.experiment.stages
    return Outcome([] if trained else [_write_sparsity(context, context.checkpoint, {})], metrics, facts)


def export(context: Context) -> Outcome:
    """Write the deployment: for each engine and variant of the target a file that suits it."""
    from sparse_exp.export.deployment import export_run

    files, facts = export_run(context)
    return Outcome(files, facts={**facts, "checkpoint_sha256": sha256_of(context.checkpoint)})


def verify(context: Context) -> Outcome:
    """Hold the exported files against the checkpoint they came from; accuracy and size of each cell."""
    from sparse_exp.export.cells import measure_cells
    from sparse_exp.export.verification import verify_deployment
    from sparse_exp.recovery import recovery_metrics

    metrics, curves = verify_deployment(context)
    measured, cells = measure_cells(context, metrics)
    metrics |= measured
    metrics |= recovery_metrics(context.facts("baseline"), metrics, context.experiment.hardware.engines)
    return Outcome(metrics=metrics, facts={"curves": curves, "cells": cells})


def benchmark(context: Context) -> Outcome:
    """Throughput and latency of the exported files, while nothing else of the run works."""
    from sparse_exp.benchmark import benchmark as measure
    from sparse_exp.benchmark import cells_of, write_rows
    from sparse_exp.benchmark.why import console_lines, explain, profiles_of, to_markdown
    from sparse_exp.export.square import model_for
    from sparse_exp.export.verification import sample_images
    from sparse_exp.hardware import usable_physical_cores

    hardware = context.experiment.hardware
    cells = cells_of(hardware, usable_physical_cores(), partial(model_for, context))
    images = sample_images(context, max(32, *hardware.batch_sizes))
    context.tracker.log(Pause())
    try:
        measurements = measure(cells, images, hardware=hardware)
        rows = [
            {**_accuracy_and_size(context, one.row()), "mismatch": list(context.mismatch)}
            for one in measurements
        ]
        why = explain(rows, profiles_of(cells, rows, images) if hardware.profile else None)
    finally:
        context.tracker.log(Resume())
    for line in console_lines(why):
        _log.info("%s", line)
    files = [*write_rows(context.run.path, rows), write_json(context.run.path / "why.json", why.as_dict())]
    metrics = {name: value for one in measurements for name, value in one.metrics().items()}
    return Outcome(files, metrics=metrics, facts={"rows": rows, "why": to_markdown(why)})


def _accuracy_and_size(context: Context, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the benchmark with what verification found of its file."""
    from sparse_exp.export.square import accuracy_prefix, size_prefix

    result, deployed = context.run.result(), accuracy_prefix(row["engine"], row["variant"])
    prefix = size_prefix(row["model"]) if row["model"] else None
    found = {name: result.get(f"{deployed}{name}") for name in ("map50", "map50_95")}
    found["gzip_mb"] = None if prefix is None else result.get(f"size/{prefix}onnx_gzip_mb")
    return {**row, **{name: value for name, value in found.items() if value is not None}}


def report(context: Context) -> Outcome:
    """Draw the pictures, write the report, and show the summary."""
    from sparse_exp.report.compose import compose_report
    from sparse_exp.report.console import show_summary

    pictures = compose_report(context)
    rows = context.facts("benchmark").get("rows", [])
    show_summary(dict(context.run.result()), context.experiment.name, context.run.path, rows)
    for folder in ("plots", "deployment"):
        context.tracker.log(Artifact(context.run.path / folder))
    return Outcome([*pictures, context.run.path / "report.md"])


def publish(context: Context) -> Outcome:
    """Put the finished run into the local zoo, where the configuration asks for it."""
    from sparse_exp.zoo.publish import AUTO, FinishedRun, publish_run

    experiment, run = context.experiment, context.run
    if experiment.publish is None:
        return Outcome()
    finished = FinishedRun(run.path, as_dict(experiment), run.records, run.state)
    model = publish_run(
        finished,
        context.zoo,
        stub=experiment.publish,
        force=experiment.overwrite,
        numbered=experiment.publish == AUTO,
        dataset=context.dataset,
    )
    _log.info("Published as %s in %s", model.stub, model.directory)
    context.tracker.log(Tags({"zoo/stub": model.stub}))
    return Outcome(metrics={"zoo/stub": model.stub}, facts={"directory": str(model.directory)})


def register(context: Context) -> Outcome:
    """Make the deployed file a version in the tracker's model registry, where that is asked for."""
    from sparse_exp.export.square import FOLDER, MODEL, TORCH
    from sparse_exp.recovery import recovery_engine

    experiment, run, name = context.experiment, context.run, context.experiment.tracker.register
    if name is None:
        return Outcome()
    engine = recovery_engine(experiment.hardware.engines)
    file = run.path / FOLDER / MODEL if engine == TORCH else context.deployed(engine)
    if "verify" not in run.records or not file.is_file():
        raise ConfigError(
            f"{run.path} has no verified deployment to register. Add export and verify to stages."
        )
    result = run.result()
    map50 = result.get(f"deployed/{engine}/map50")  # torch alone cannot run what was quantized
    tags = {
        **({} if map50 is None else {"map50": f"{map50:.4f}"}),
        "sparsity": f"{result['sparsity/onnx']:.4f}",
        "run": experiment.name,
        "sparse_exp.version": __version__,
    }
    context.tracker.log(Model(file, name, experiment.tracker.alias, tags))
    return Outcome(facts={"name": name, "alias": experiment.tracker.alias, "sha256": sha256_of(file)})


STAGES: dict[str, Callable[[Context], Outcome]] = {
    function.__name__: function
    for function in (
        fetch, plan, baseline, train, evaluate, export, verify, benchmark, report, publish, register
    )
}  # fmt: skip


_ANNOUNCED: dict[str, Callable[[Context], None]] = {
    "fetch": _announce_fetch,
    "plan": _announce_plan,
    "baseline": _announce_baseline,
    "train": _announce_train,
    "evaluate": lambda context: _announce_sparsity(context, "evaluate"),
}


def announce(context: Context, stage: str, *, replay: bool = False) -> None:
    """Tell the tracker what a finished stage found, beside its metrics: from its record and its files alone.

    Args:
        context: of the run, which has the stage's record.
        stage: its name.
        replay: the tracker has seen nothing of it, as it was done by another job or at another time: the
            epochs of a training, too.
    """
    if stage in _ANNOUNCED:
        _ANNOUNCED[stage](context)
    if stage == "train" and replay:
        from sparse_exp.training.run import epoch_metrics

        for record in json.loads((context.run.path / "history.json").read_text(encoding="utf-8")):
            context.tracker.log(epoch_metrics(record))


def write_recipe(context: Context) -> Path:
    """Keep the recipe as it runs beside the run's other files, after the training with that of its start."""
    text = str(context.facts("train").get("recipe", "")) or context.recipe.text
    return write_text(context.run.path / "recipe.md", f"---\n{text.strip()}\n---\n")
