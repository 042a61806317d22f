"""From latencies to numbers, and from numbers to rows: of JSON, of CSV, of metrics.

docs/benchmark.md describes the row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_exp.benchmark.cells import Cell
from sparse_exp.engines.base import files_of
from sparse_exp.files import write_json, write_text

Row = dict[str, Any]
PERCENTILES = {
    "latency_p25_ms": 25.0,
    "latency_p50_ms": 50.0,
    "latency_p75_ms": 75.0,
    "latency_p90_ms": 90.0,
    "latency_p95_ms": 95.0,
    "latency_p99_ms": 99.0,
    "latency_p999_ms": 99.9,
}
NUMBERS = ("items_per_s", *PERCENTILES, "spread", "peak_rss_mb")


class Round(NamedTuple):
    """One of the repeats.

    Attributes:
        latencies: seconds of each inference; at least one.
        wall: seconds in which they ran.
        warmed: seconds of warm-up before.
        stable: latencies were stable when it began, or the warm-up was not to go on until then.
        steal: share of the time, 0..1, that a hypervisor gave to others.
    """

    latencies: Sequence[float]
    wall: float
    warmed: float = 0.0
    stable: bool = True
    steal: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """What was measured of a cell, with its conditions.

    Attributes:
        cell: what was measured.
        rounds: its repeats; none for a cell that is impossible.
        peak_rss_mb: most memory that the engine's process had, in units of 1e6 bytes.
        noisy: the repeats differ by more than they may, and did so each time.
        conditions: engine's version, setting, host and protocol.
    """

    cell: Cell
    rounds: Sequence[Round] = ()
    peak_rss_mb: float = 0.0
    noisy: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def each(self) -> list[float]:
        """Images per second of each repeat."""
        batch = self.cell.load.batch_size
        return [batch * len(one.latencies) / one.wall for one in self.rounds]

    def numbers(self) -> dict[str, float]:
        """The numbers of a row that are metrics, by name: the median of the repeats and their spread
        ((largest - smallest) / median), percentiles of all latencies, memory.
        """
        if not self.rounds:
            return {}
        milliseconds = 1e3 * np.concatenate([np.asarray(one.latencies) for one in self.rounds])
        found = np.percentile(milliseconds, list(PERCENTILES.values()))
        return {
            "items_per_s": float(np.median(self.each)),
            **dict(zip(PERCENTILES, map(float, found), strict=True)),
            "spread": spread(self.each),
            "peak_rss_mb": self.peak_rss_mb,
        }

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of `result.json`."""
        return {f"benchmark/{self.cell.name}/{name}": value for name, value in self.numbers().items()}

    def row(self) -> Row:
        """Plain data, as docs/benchmark.md describes it."""
        cell, load = self.cell, self.cell.load
        row: Row = {
            **({"network": cell.network} if cell.network else {}),
            "engine": cell.engine,
            "variant": cell.variant,
            "key": load.key,
            "scenario": load.scenario,
            "batch": load.batch_size,
            "streams": load.streams,
            "cores": load.cores,
            "model": cell.model.name if cell.model else None,
        }
        if cell.impossible:
            return {**row, "impossible": cell.impossible, **self.conditions}
        return {
            **row,
            **self.numbers(),
            "each": self.each,
            "runs": sum(len(one.latencies) for one in self.rounds),
            "noisy": self.noisy,
            "warmed_s": [round(one.warmed, 3) for one in self.rounds],
            "stable": all(one.stable for one in self.rounds),
            "steal": round(max(one.steal for one in self.rounds), 4),
            **self.conditions,
        }


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median; 0 for one value."""
    return float((max(values) - min(values)) / np.median(values))


def megabytes(model: Path) -> float:
    """Size of a model's files in units of 1e6 bytes."""
    return sum(file.stat().st_size for file in files_of(model) if file.is_file()) / 1e6


def write_rows(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write ``benchmark.json`` and ``benchmark.csv``; returns both."""
    return [
        write_json(folder / "benchmark.json", rows),
        write_text(folder / "benchmark.csv", as_csv(rows)),
    ]


def as_csv(rows: Iterable[Row]) -> str:
    """The same as a table: lists and dictionaries as JSON, nothing where a row lacks a column."""
    listed = list(rows)
    columns = list(dict.fromkeys(name for row in listed for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in listed:
        writer.writerow(_plain(row.get(name)) for name in columns)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value
