"""One short function per stage: a context in, an outcome out.

Stages hand each other files and the facts of their records, never objects, so that each can run
alone and a run can be resumed between any two of them. Libraries are imported when a stage runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sparse_exp.artifacts import sha256_of, write_json, write_text
from sparse_exp.context import Context, Outcome
from sparse_exp.tracking import Artifact, Dataset, Metrics, Pause, Resume, Tags

_log = logging.getLogger(__name__)


def fetch(context: Context) -> Outcome:
    """Bring the data set and the start checkpoint onto this machine, verified."""
    from sparse_exp.data import check_dataset
    from sparse_exp.zoo.start import SCRATCH, fetch_start

    dataset = context.dataset
    boxes = check_dataset(dataset)
    for split, samples in dataset.splits.items():
        context.tracker.log(Dataset(dataset.name, dataset.digest, str(dataset.root), split, len(samples)))
        _log.info("%s/%s: %d images, %d boxes", dataset.name, split, len(samples), boxes[split])
    facts: dict[str, Any] = {"dataset": dataset.digest, "boxes": boxes, "names": list(dataset.names)}
    if "train" in context.experiment.stages:
        start = fetch_start(context.experiment.model, context.cache)
        facts["origin"] = start.origin if start else SCRATCH
        facts["sha256"] = start.sha256 if start else ""
        context.tracker.log(Tags({"weights/origin": facts["origin"]}))
    context.tracker.log(Tags({"dataset.digest": dataset.digest}))
    origin = {"weights/origin": facts["origin"]} if "origin" in facts else {}
    return Outcome(metrics=origin, facts=facts)


def plan(context: Context) -> Outcome:
    """Say what will happen, and refuse what cannot end well."""
    if "train" not in context.experiment.stages:
        return Outcome()
    from sparse_exp.plan import make_plan
    from sparse_exp.report.console import show_plan
    from sparse_exp.training.start import examine, load_start

    model, start = load_start(context.experiment, context.dataset, context.cache)
    context.recipe.check(model)
    laid_out = make_plan(context.experiment, context.recipe, examine(model, start), context.precision)
    show_plan(laid_out)
    facts = {
        "prune_to": laid_out.prune_to,
        "pruning": laid_out.pruning,
        "phases": laid_out.phases,
        "sparsity": laid_out.sparsity,
    }
    transfer = f"{start.report.taken} of {start.report.total} tensors" if start.report else "none"
    return Outcome(facts={**facts, "transferred": transfer, "left": list(start.left)})


def baseline(context: Context) -> Outcome:
    """Find or train the dense counterpart, where the configuration asks for it."""
    return Outcome()


def train(context: Context) -> Outcome:
    """Fine-tune under the recipe; the best checkpoint of the last phase goes on."""
    from sparse_exp.sparsity.measure import layer_sparsity, require_sparsity
    from sparse_exp.training.loop import Trainer, TrainingData
    from sparse_exp.training.start import load_start, prune_start

    experiment, weights = context.experiment, context.run.path / "weights"
    weights.mkdir(exist_ok=True)
    model, _ = load_start(experiment, context.dataset, context.cache)
    prune_start(model, context.facts("plan").get("prune_to"))
    layers = layer_sparsity(model.prunable_convolutions())
    require_sparsity(layers, context.planned_sparsity, "of the start weights")
    loaders = context.loader("train", train=True), context.loader("val")
    data = TrainingData(*loaders, context.dataset.names, experiment.dataset.imgsz)
    trainer = Trainer(
        model,
        context.recipe,
        data,
        experiment.trainer,
        context.precision,
        weights=weights,
        seed=experiment.seed,
        on_epoch=lambda record: _log_epoch(context, record),
    )
    _log.info("Training with %s.", context.precision)
    result = trainer.fit()
    history = write_json(context.run.path / "history.json", result.history)
    final = result.best[context.recipe.phases()[-1].name]
    facts = {"checkpoint": str(final.relative_to(context.run.path))}
    return Outcome([history, *sorted(weights.glob("*.pt"))], facts=facts)


def _log_epoch(context: Context, record: dict[str, Any]) -> None:
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    context.tracker.log(Metrics(numbers, step=round(100 * record["epoch"])))
    _log.info(
        "epoch %-5g %-12s box %.4f obj %.4f cls %.4f  mAP50 %.3f  sparsity %.4f  %.1f images/s",
        record["epoch"],
        record["phase"],
        *(record[f"loss/{part}"] for part in ("box", "obj", "cls")),
        *(record[name] for name in ("val/map50", "sparsity/prunable", "images_per_s")),
    )


def evaluate(context: Context) -> Outcome:
    """Measure mAP of the final torch model on the validation split, and on the test split if there is one."""
    from sparse_exp.sparsity.measure import layer_sparsity, overall, require_sparsity, total_sparsity
    from sparse_exp.training.checkpoints import restore
    from sparse_exp.training.loop import evaluate_model

    model, checkpoint = restore(context.checkpoint)
    trainer = context.experiment.trainer
    layout = context.precision.memory_format  # as in training: another order of sums rounds otherwise
    model.to(memory_format=layout)
    result = evaluate_model(model, context.loader("val"), trainer, layout, description="Evaluating torch")
    layers = layer_sparsity(model.prunable_convolutions())
    require_sparsity(layers, context.planned_sparsity, f"in {context.checkpoint.name}")
    metrics: dict[str, Any] = {
        "val/map50": result.map50,
        "val/map50_95": result.map50_95,
        "sparsity/prunable": overall(layers),
        "sparsity/total": total_sparsity(model),
        "size/checkpoint_mb": context.checkpoint.stat().st_size / 1e6,
    }
    if "test" in context.dataset.splits:
        test = evaluate_model(model, context.loader("test"), trainer, layout, description="Evaluating test")
        metrics.update({"test/map50": test.map50, "test/map50_95": test.map50_95})
    curve = {"recall": list(result.recall), "precision": list(result.precision), "ap": result.map50}
    facts = {
        "phase": checkpoint.phase,
        "epoch": checkpoint.epoch,
        "curve": curve,
        "layers": [asdict(layer) for layer in layer_sparsity(model.quantizable_convolutions())],
    }
    return Outcome(metrics=metrics, facts=facts)


def export(context: Context) -> Outcome:
    """Write the deployment: for DeepSparse, for QDQ engines, and the dense baseline."""
    from sparse_exp.export.deployment import export_deployment
    from sparse_exp.training.checkpoints import restore

    model, checkpoint = restore(context.checkpoint)
    imgsz = checkpoint.imgsz or context.experiment.dataset.imgsz
    folder = context.run.path / "deployment"
    files = export_deployment(model, folder, imgsz=imgsz, opset=context.experiment.export.opset)
    facts = {"imgsz": imgsz, "checkpoint_sha256": sha256_of(context.checkpoint)}
    return Outcome(files, facts=facts)


def verify(context: Context) -> Outcome:
    """Hold the exported files against the checkpoint they came from, in each engine."""
    from sparse_exp.export.verification import measure_sizes, verify_deployment

    metrics, curves = verify_deployment(context)
    sizes = measure_sizes(context.run.path / "deployment")
    return Outcome(metrics={**metrics, **sizes}, facts={"curves": curves})


def benchmark(context: Context) -> Outcome:
    """Throughput and latency of the deployed files, while nothing else of the run works."""
    from sparse_exp.benchmark import Cell
    from sparse_exp.benchmark import benchmark as measure
    from sparse_exp.export.verification import sample_images

    hardware = context.experiment.hardware
    cells = [
        Cell(engine, variant, path, batch)
        for batch in hardware.batch_sizes
        for engine in hardware.engines
        for variant, path in (("dense", context.dense), ("sparse", context.deployed(engine)))
    ]
    images = sample_images(context, max(32, *hardware.batch_sizes))
    context.tracker.log(Pause())
    try:
        measurements = measure(cells, images, hardware=hardware)
    finally:
        context.tracker.log(Resume())
    rows = [{**m.conditions, "items_per_s": m.items_per_s, "each": list(m.repeats)} for m in measurements]
    file = write_json(context.run.path / "benchmark.json", rows)
    metrics = {name: value for m in measurements for name, value in m.metrics().items()}
    return Outcome([file], metrics=metrics, facts={"rows": rows})


def report(context: Context) -> Outcome:
    """Draw the pictures, write the report, and show the summary."""
    from sparse_exp.report.compose import compose_report
    from sparse_exp.report.console import show_summary

    pictures = compose_report(context)
    show_summary(dict(context.run.result()), context.experiment.name, context.run.path)
    for folder in ("plots", "deployment"):
        context.tracker.log(Artifact(context.run.path / folder))
    return Outcome([*pictures, context.run.path / "report.md"])


STAGES: dict[str, Callable[[Context], Outcome]] = {
    function.__name__: function
    for function in (fetch, plan, baseline, train, evaluate, export, verify, benchmark, report)
}


def write_recipe(context: Context) -> None:
    """Keep the recipe as it runs beside the run's other files."""
    write_text(context.run.path / "recipe.md", f"---\n{context.recipe.text.strip()}\n---\n")
