"""Repeat the benchmark of a finished run, and print how far each ratio moves from one time to the next.

    python benchmarks/repeatability.py outputs/runs/DATE/TIME-NAME --times 5

Every time all cells are measured as the run's own benchmark stage did, in the same settings. Ratios are those
to dense fp32 in one engine, which is the same every time. Nothing of the run is changed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import yaml

from sparse_exp.benchmark import Cell, Row, benchmark, cells_of
from sparse_exp.benchmark.measurements import measured
from sparse_exp.benchmark.ratios import Ratio, ratio_of_rows
from sparse_exp.benchmark.speed_table import label
from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import read_json, write_json
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.runs.directory import CONFIG, Run
from sparse_exp.text import markdown_table


def main() -> int:
    """Measure, and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run with exported files")
    parser.add_argument("--times", type=whole, default=5)
    parser.add_argument("--baseline", default="onnxruntime", help="engine whose dense fp32 counts as 1")
    parser.add_argument("--out", type=Path, help="JSON file for all rows; one that is there is gone on with")
    options = parser.parse_args()
    times: list[list[Row]] = read_json(options.out).get("times", []) if options.out else []
    hardware, cells = _cells(options.run)
    imgsz = _imgsz(options.run)
    images = np.random.default_rng(0).integers(0, 256, (32, 3, imgsz, imgsz), np.uint8)
    while len(times) < options.times:
        times.append([one.row() for one in benchmark(cells, images, hardware=hardware)])
        if options.out:
            write_json(options.out, {"times": times})
    sys.stdout.write(table(times, options.baseline))
    return 0


def _cells(directory: Path) -> tuple[HardwareConfig, list[Cell]]:
    """What the run measured, in the settings that its search found."""
    run = Run.read(directory)
    asked = yaml.safe_load((run.path / CONFIG).read_text(encoding="utf-8"))["hardware"]
    hardware = HardwareConfig(**{**asked, "tune": False})
    return hardware, cells_of(hardware, usable_physical_cores(), run.deployment.file)


def _imgsz(directory: Path) -> int:
    rows = measured(Run.read(directory).facts("benchmark").get("rows", []))
    if not rows:
        do = "Give one that ran the stage benchmark."
        raise ConfigError(expected("the run", "measured", str(directory), do))
    return int(rows[0]["imgsz"])


def table(times: Sequence[Sequence[Row]], engine: str) -> str:
    """How far the ratio of each cell to dense fp32 in an engine moves, as Markdown.

    Args:
        times: the rows of each measurement.
        engine: of the baseline.
    """
    ratios: dict[str, list[Ratio]] = {}
    marked: dict[str, int] = {}
    for rows in times:
        (baseline,) = [r for r in measured(rows) if (r["engine"], r["variant"]) == (engine, "dense")][:1]
        for row in measured(rows):
            if row is not baseline:
                ratios.setdefault(label(row), []).append(ratio_of_rows(row, baseline))
                marked[label(row)] = marked.get(label(row), 0) + bool(row["noisy"])
    lines = [_line(name, found, marked[name]) for name, found in ratios.items()]
    titles = ("cell", "each time", "largest / smallest", "intervals that meet", "noisy")
    seconds = sum(map(_seconds, times))
    facts = host_facts()
    how = f"{len(times)} times in {seconds / 60:.0f} min on {facts.cpu} ({', '.join(facts.isa)})"
    return f"{how}; times as fast as dense fp32 in {engine}:\n\n{markdown_table(titles, lines, right=())}\n"


def _line(name: str, ratios: Sequence[Ratio], marked: int) -> tuple[str, ...]:
    values = [one.value for one in ratios]
    meet = max(one.low for one in ratios) <= min(one.high for one in ratios)
    return (
        name,
        ", ".join(f"{value:.2f}" for value in values),
        f"{max(values) / min(values) - 1:.1%}",
        "all" if meet else "not all",
        f"{marked} of {len(values)}",
    )


def _seconds(rows: Sequence[Row]) -> float:
    started, ended = (datetime.fromisoformat(rows[0][name]) for name in ("started", "ended"))
    return (ended - started).total_seconds()


if __name__ == "__main__":
    run_command(main)
