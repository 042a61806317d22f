"""From the records of a run to its pictures and its report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_exp.benchmark.measurements import CAUSES, Row, measured, noise_sentence
from sparse_exp.benchmark.speed_table import label
from sparse_exp.config.imgsz import in_words
from sparse_exp.config.schema import ENGINES, Experiment
from sparse_exp.data import DetectionDataset, evenly_spread
from sparse_exp.data.attributions import attributions_of
from sparse_exp.engines import IsolatedEngine
from sparse_exp.files import read_json
from sparse_exp.hardware import host_facts
from sparse_exp.hardware.targets import mismatch_sentence
from sparse_exp.metrics.classes import CLASSES
from sparse_exp.metrics.recovery import recovery_engine
from sparse_exp.metrics.result_rows import recovery
from sparse_exp.report import plots
from sparse_exp.report.answer import answer
from sparse_exp.report.markdown import ReportData, write_report
from sparse_exp.report.page import write_page
from sparse_exp.runs.directory import Run
from sparse_exp.runs.past import read_run
from sparse_exp.text import decimal

_PACKAGES = tuple(dict.fromkeys(("torch", "sparseml", *ENGINES, "mlflow", "hydra-core")))
_SHEET_IMAGES = 8
_MOST_CLASSES = 40  # whose names can be read in a picture
_CLASS_COLUMNS = {
    "mAP50": "ap50",
    "mAP50-95": "ap50_95",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
}
_FIRST = "Accuracy and speed of each file"  # the picture that belongs to the answer
_SCENARIOS = {
    "sync": "sync: one inference after the other",
    "throughput": "throughput: several streams, each one inference after the other",
    "async": "async: streams of one image each",
}
_VARIANTS = {
    "dense": "dense: fp32, not sparse",
    "dense_int8": "dense_int8: the same in 8 bits, by each engine's own quantization after the training",
    "sparse_fp32": "sparse_fp32: sparse, before it was quantized",
    "sparse": "sparse: what this run deploys",
}


@dataclass(frozen=True)
class _Source:
    """What a report is made from."""

    experiment: Experiment
    run: Run
    dataset: DetectionDataset
    cores: int
    mismatch: Sequence[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the benchmark; those of impossible files, too."""
        rows: list[dict[str, Any]] = self.run.facts("benchmark").get("rows", [])
        return rows


def compose_report(
    experiment: Experiment,
    run: Run,
    dataset: DetectionDataset,
    *,
    cores: int,
    mismatch: Sequence[str] = (),
) -> list[Path]:
    """Draw what the finished stages have numbers for, and write ``report.md`` and ``report.html``.

    Args:
        experiment: of the run.
        run: its records are read.
        dataset: validation images are shown with what the deployed engine finds in them.
        cores: that the engine runs on.
        mismatch: what of the hardware target does not fit this host, a clause each.

    Returns:
        The pictures.
    """
    source, folder = _Source(experiment, run, dataset, cores, mismatch), run.path / "plots"
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Path] = {}
    for draw in (_sheet, _curves, _precision_recall, _confusion, _layers, _sizes, _speeds):
        pictures.update(draw(source, folder))
    text = write_report(run.path / "report.md", _report_data(source, pictures))
    write_page(run.path / "report.html", text, experiment.name)
    return list(pictures.values())


def _curves(source: _Source, folder: Path) -> dict[str, Path]:
    file = source.run.path / "history.json"
    history = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not history or not history[-1]["epoch"]:  # of a recipe that was applied at once there is no curve
        return {}
    plots.training_curves(history, folder / "training.png")
    return {"Training": folder / "training.png"}


def _precision_recall(source: _Source, folder: Path) -> dict[str, Path]:
    curves = {
        "torch": source.run.facts("evaluate").get("curve"),
        **source.run.facts("verify").get("curves", {}),
    }
    drawn = {
        name: (np.asarray(c["recall"]), np.asarray(c["precision"]), c["ap"])
        for name, c in curves.items()
        if c
    }
    if not drawn:
        return {}
    plots.precision_recall(drawn, folder / "precision_recall.png")
    return {"Precision and recall on the validation split": folder / "precision_recall.png"}


def _confusion(source: _Source, folder: Path) -> dict[str, Path]:
    """Which classes the deployed network takes for which; no picture of one class, or of very many."""
    engine, found = _classes(source)
    if not found or not 1 < len(found["names"]) <= _MOST_CLASSES:
        return {}
    deployed = found[f"{engine}/sparse"]
    plots.confusion_matrix(
        deployed["confusion"], found["names"], folder / "confusion.png", conf=deployed["conf"]
    )
    return {f"Objects and what {engine} takes them for": folder / "confusion.png"}


def _classes(source: _Source) -> tuple[str, dict[str, Any]]:
    """The engine whose accuracy stands for the run, and the accuracies by class; nothing without any."""
    found = read_json(source.run.path / CLASSES)
    engines = [name for name in source.experiment.hardware.engines if f"{name}/sparse" in found]
    return (recovery_engine(engines), found) if engines else ("", {})


def _class_rows(source: _Source) -> list[dict[str, str]]:
    """The accuracies of each class with objects: of what is deployed, and against the dense network."""
    engine, found = _classes(source)
    if not found:
        return []
    deployed, dense = found[f"{engine}/sparse"], found.get(f"{engine}/dense")
    rows = []
    for number, name in enumerate(found["names"]):
        if not deployed["objects"][number]:
            continue
        numbers = {title: deployed[key][number] for title, key in _CLASS_COLUMNS.items()}
        row = {"class": name, "objects": str(deployed["objects"][number])}
        row |= {title: decimal(value, 3) for title, value in numbers.items()}
        if dense:
            row["change"] = f"{deployed['ap50'][number] - dense['ap50'][number]:+.3f}"
        rows.append(row)
    return rows


def _layers(source: _Source, folder: Path) -> dict[str, Path]:
    layers = source.run.facts("evaluate").get("layers", [])
    if not layers:
        return {}
    rows = [(row["name"], row["zeros"] / row["weights"], row["weights"], row.get("macs")) for row in layers]
    target = source.run.result().get("sparsity/prunable", 0.0)
    plots.layer_sparsity(rows, folder / "layer_sparsity.png", target=target)
    return {"Zeros and work of each convolution": folder / "layer_sparsity.png"}


def _sizes(source: _Source, folder: Path) -> dict[str, Path]:
    names = {
        "size/dense_onnx_mb": "dense ONNX",
        "size/dense_onnx_gzip_mb": "dense ONNX, gzip",
        "size/checkpoint_mb": "checkpoint",
        "size/onnx_mb": "deployed ONNX",
        "size/onnx_gzip_mb": "deployed ONNX, gzip",
    }
    result = source.run.result()
    sizes = {label: float(result[name]) for name, label in names.items() if name in result}
    if not sizes:
        return {}
    plots.size_bars(sizes, folder / "sizes.png")
    return {"Sizes": folder / "sizes.png"}


def _speeds(source: _Source, folder: Path) -> dict[str, Path]:
    rows = measured(source.rows)
    pictures: dict[str, Path] = {}
    if rows:
        plots.throughput_bars(rows, folder / "throughput.png")
        pictures["Throughput; error bars from the slowest to the fastest repeat"] = folder / "throughput.png"
    if rows and "latency_p25_ms" in rows[0]:
        plots.latencies(rows, folder / "latency.png")
        pictures["Latency of one inference"] = folder / "latency.png"
    if any("map50" in row for row in rows):
        plots.accuracy_and_speed([row for row in rows if "map50" in row], folder / "accuracy_speed.png")
        pictures[_FIRST] = folder / "accuracy_speed.png"
    return pictures


def _sheet(source: _Source, folder: Path) -> dict[str, Path]:
    """Validation images with ground truth and what the deployed engine finds."""
    from sparse_exp.yolov5 import non_max_suppression

    engines, trainer = source.experiment.hardware.engines, source.experiment.trainer
    result = source.run.result()
    engine_name = next((name for name in engines if f"deployed/{name}/map50" in result), engines[0])
    if not source.run.deployment.deployed(engine_name).is_file():
        return {}
    batch = _sheet_batch(source)
    with closing(IsolatedEngine(engine_name)) as engine:
        engine.load(
            source.run.deployment.deployed(engine_name), batch_size=len(batch.images), cores=source.cores
        )
        predictions = engine.run(batch.images.numpy())[0]
    found = non_max_suppression(predictions, 0.05, trainer.iou, trainer.max_det)
    height, width = batch.images.shape[-2:]
    size = torch.tensor([width, height] * 2)
    rows = []
    for index, (image, detections) in enumerate(zip(batch.images, found, strict=True)):
        x, y, w, h = (batch.targets[batch.targets[:, 0] == index][:, 2:] * size).T
        truth = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        rows.append((image.numpy(), truth.numpy(), detections))
    title = f"Validation images: {engine_name}'s detections and the ground truth"
    plots.detection_sheet(rows, source.dataset.names, folder / "detections.png", title=title)
    return {title: folder / "detections.png"}


def _sheet_batch(source: _Source) -> Any:
    """Validation images spread evenly over the split."""
    from sparse_exp.data.loader import make_loader

    picked = evenly_spread(source.dataset.splits["val"], _SHEET_IMAGES)
    imgsz = source.experiment.dataset.imgsz
    return next(
        iter(make_loader(picked, len(source.dataset.names), imgsz=imgsz, batch_size=len(picked), train=False))
    )


def _report_data(source: _Source, pictures: dict[str, Path]) -> ReportData:
    experiment, start = source.experiment, source.run.facts("plan")
    pictures = dict(pictures)
    first = pictures.pop(_FIRST, None)
    fetched = source.run.facts("fetch")
    transferred = f" {start['transferred']} taken." if start.get("transferred", "none") != "none" else ""
    return ReportData(
        title=experiment.name,
        answer=answer(source.run.result(), source.rows),
        first=(_FIRST, first) if first else None,
        command=_command(source),
        result=source.run.result(),
        summary=_summary(source),
        origin=f"{_origin(fetched)}.{transferred}" if "origin" in fetched else "",
        pruning=start.get("pruning", ""),
        phases=start.get("phases", ()),
        recovery=_recovery(source),
        classes=_class_rows(source),
        layers=source.run.path / "sparsity.csv",
        speeds=source.rows,
        conditions=_conditions(source),
        why=source.run.facts("benchmark").get("why", ""),
        warnings=_warnings(source),
        pictures=pictures,
        attributions=_attributions(source),
        environment=environment(),
    )


def _command(source: _Source) -> str:
    run = read_run(source.run.path)
    return run.command if run else ""


def _origin(fetched: dict[str, Any]) -> str:
    """Where the start weights came from; of a start that was grown also from which file; "" without one."""
    if "grown_from" not in fetched:
        return str(fetched.get("origin", ""))
    return (
        f"{fetched['origin']}: no checkpoint of this size could be had, so a smaller one was grown, which "
        f"computes nearly the same. Grown from {fetched['grown_from']}"
    )


def _recovery(source: _Source) -> str:
    """What is kept of the dense accuracy, and whose accuracy that is."""
    baseline = source.run.facts("baseline")
    if "origin" not in baseline:
        return ""
    run = f"run {baseline['directory']}, " if baseline["directory"] else ""
    return f"{recovery(source.run.result()).rstrip('.')} (baseline: {run}{baseline['origin']})."


def _summary(source: _Source) -> dict[str, str]:
    experiment, evaluated = source.experiment, source.run.facts("evaluate")
    exported = f"{_shown(source)}, phase {evaluated['phase']}" if evaluated else ""
    boxes = source.run.facts("fetch").get("boxes", {})
    return {
        "model": f"{experiment.model.name}, {in_words(experiment.dataset.imgsz)} px",
        "data": f"{experiment.dataset.name}: " + ", ".join(f"{s} {n} boxes" for s, n in boxes.items()),
        "recipe": experiment.recipe.name,
        **({"exported checkpoint": f"{exported}, epoch {evaluated['epoch']:g}"} if exported else {}),
    }


def _shown(source: _Source) -> str:
    """The exported checkpoint as the report names it: relative to the run where it lies there."""
    path = (source.run.checkpoint or source.run.path).resolve()
    return str(path.relative_to(source.run.path) if path.is_relative_to(source.run.path) else path)


def _conditions(source: _Source) -> dict[str, str]:
    found = measured(source.rows)
    if not found:
        return {}
    first, versions = found[0], {row["engine"]: row["version"] for row in found}
    return {
        "engines": ", ".join(f"{engine} {number}" for engine, number in versions.items()),
        "host": f"{first['cpu']}; {', '.join(first['isa'])}",
        "does not fit the target": "; ".join(first.get("mismatch", ())) or "nothing",
        "images": f"{in_words(first['imgsz'])} px, uint8, of the validation split",
        "scenarios": "; ".join(_SCENARIOS[name] for name in dict.fromkeys(row["scenario"] for row in found)),
        "protocol": f"at least {first['repeats']} repeats in turns of {first['duration_s']:g} s each after "
        f"{first['warmup_s']:g} s of warm-up or more; median, spread = (max - min) / median over the repeats",
        "other load before": _state(first["before"]),
        "other load after": _state(first["after"]),
        "taken by others": f"at most {max(map(_disturbance, found)):.1%} of the time of a repeat",
        "variants": "; ".join(_VARIANTS[name] for name in dict.fromkeys(row["variant"] for row in found)),
        **_dense(source, found),
    }


def _dense(source: _Source, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Whose weights the dense network has, where it was measured: without training it has no accuracy."""
    dense = source.run.facts("export").get("dense")
    if dense is None or not any(row["variant"].startswith("dense") for row in rows):
        return {}
    untrained = "; its speed and size count, and it has no accuracy: recovery.baseline=auto trains it"
    return {"weights of the dense network": dense["origin"] + ("" if dense["trained"] else untrained)}


def _disturbance(row: Row) -> float:
    """Share of a repeat's time that other programs, a quota or a hypervisor took at most."""
    return max(float(row.get(name, 0.0)) for name in CAUSES)


def _state(state: dict[str, Any]) -> str:
    clock = f", {state['frequency_mhz']:.0f} MHz" if state["frequency_mhz"] else ""
    return f"load average {state['load_average']}, {state['busy_cores']} cores busy{clock}"


def _warnings(source: _Source) -> list[str]:
    warnings, fetched = [], source.run.facts("fetch")
    if fetched.get("skipped"):
        warnings.append(f"{fetched['skipped']} images were left out: they or their labels cannot be used.")
    if fetched.get("origin") == "scratch":
        warnings.append("Trained from random weights on this data alone: the accuracies mean little.")
    mismatch = next((row["mismatch"] for row in source.rows if row.get("mismatch")), source.mismatch)
    if mismatch:
        warnings.append(mismatch_sentence(source.experiment.hardware.name, mismatch))
    noisy = [row for row in source.rows if row.get("noisy")]
    if noisy:
        cells = ", ".join(label(row) for row in noisy)
        warnings.append(f"Noisy: {cells}. {noise_sentence(source.rows)}")
    if source.dataset.splits.get("val"):
        warnings.append(
            "The checkpoint was chosen by mAP50 on the validation split that the accuracies are reported on, "
            "as is usual for YOLO; a held-out test split is reported beside it where the data set has one."
        )
    return warnings


def _attributions(source: _Source) -> list[str]:
    experiment, origin = source.experiment, _origin(source.run.facts("fetch"))
    return attributions_of(origin, experiment.dataset.generator, *experiment.hardware.engines)


def environment() -> dict[str, str]:
    """Versions and host of this process."""
    facts = host_facts()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "Python": platform.python_version(),
        "host": f"{facts.cpu}, {facts.physical_cores} cores, {facts.memory_gb:g} GB, {facts.os}",
        **versions,
    }
