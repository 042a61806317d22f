"""Throughput and latency of the exported files."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from sparse_exp.files import write_json
from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Pause, Resume

_log = logging.getLogger(__name__)


def benchmark(context: Context) -> Outcome:
    """Throughput and latency of the exported files, while nothing else of the run works."""
    from sparse_exp.benchmark import benchmark as measure
    from sparse_exp.benchmark import cells_of, write_rows
    from sparse_exp.benchmark.layers import profiles_of
    from sparse_exp.benchmark.why import console_lines, explain
    from sparse_exp.export.square import model_for
    from sparse_exp.export.verification import sample_images
    from sparse_exp.hardware import usable_physical_cores
    from sparse_exp.report.why import to_markdown

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
