"""Throughput and latency of the exported files, while nothing else of the run works."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_exp.benchmark import CERTAIN_NUMBERS, NUMBERS, cells_of, loads_of, write_rows
from sparse_exp.benchmark import benchmark as measure
from sparse_exp.benchmark.layers import profiles_of
from sparse_exp.benchmark.why import console_lines, explain
from sparse_exp.config.runtimes import runs_quantized
from sparse_exp.config.schema import Experiment
from sparse_exp.files import write_json
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.runs.deployment import accuracy_prefix, size_prefix
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Pause, Resume

_log = logging.getLogger(__name__)


def _run(context: Context) -> Outcome:
    from sparse_exp.export.first_outputs import FILE, FirstOutputs
    from sparse_exp.export.verification import sample_images
    from sparse_exp.report.why import to_markdown

    hardware, limits = context.experiment.hardware, context.experiment.export
    first = FirstOutputs.read(context.run.path / FILE)
    cells = cells_of(hardware, usable_physical_cores(), context.run.deployment.file)
    images = sample_images(context.loader("val"), max(32, *hardware.batch_sizes))
    context.tracker.log(Pause())
    try:
        measurements = measure(
            cells,
            images,
            hardware=hardware,
            settings=context.cache / "engine-settings",
            check=lambda cell, found: first.compare(cell.engine, cell.variant, found, limits),
        )
        rows = [
            {**_with_accuracy_and_size(context, one.row()), "mismatch": list(context.mismatch)}
            for one in measurements
        ]
        profiles = profiles_of(cells, rows, images) if hardware.profile else None
        why = explain(rows, profiles, context.run.result().get("sparsity/macs"))
    finally:
        context.tracker.log(Resume())
    for line in console_lines(why):
        _log.info("%s", line)
    files = [*write_rows(context.run.path, rows), write_json(context.run.path / "why.json", why.as_dict())]
    metrics = {name: value for one in measurements for name, value in one.metrics().items()}
    return Outcome(files, metrics=metrics, facts={"rows": rows, "why": to_markdown(why)})


def _with_accuracy_and_size(context: Context, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the benchmark with what verification found of its file."""
    result, deployed = context.run.result(), accuracy_prefix(row["engine"], row["variant"])
    prefix = size_prefix(row["model"]) if row["model"] else None
    found = {name: result.get(f"{deployed}{name}") for name in ("map50", "map50_95")}
    found["gzip_mb"] = None if prefix is None else result.get(f"size/{prefix}onnx_gzip_mb")
    return {**row, **{name: value for name, value in found.items() if value is not None}}


def _certain_names(experiment: Experiment) -> Iterator[str]:
    hardware = experiment.hardware
    engines = [name for name in hardware.engines if runs_quantized(name)]
    variants = [name for name in hardware.variants if name in ("dense", "sparse")]
    yield from _speeds(experiment, engines, variants, CERTAIN_NUMBERS)


def _possible_names(experiment: Experiment) -> Iterator[str]:
    """Names of files that may turn out to be impossible, and of percentiles of too few inferences."""
    yield from _speeds(experiment, experiment.hardware.engines, experiment.hardware.variants, NUMBERS)


def _speeds(
    experiment: Experiment, engines: Sequence[str], variants: Sequence[str], numbers: Sequence[str]
) -> Iterator[str]:
    for load in loads_of(experiment.hardware, usable_physical_cores()):
        for engine in engines:
            for variant in variants:
                yield from (f"benchmark/{engine}/{variant}/{load.key}/{name}" for name in numbers)


STAGE = Stage(
    name="benchmark",
    run=_run,
    depends_on=("hardware",),
    light=True,
    takes_checkpoint=True,
    needs_files=True,
    certain_names=_certain_names,
    possible_names=_possible_names,
)
