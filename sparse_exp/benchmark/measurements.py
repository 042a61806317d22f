"""What was measured of a cell, as metrics and as rows of ``benchmark.json`` and ``benchmark.csv``.

docs/benchmark.md describes the columns of a row.
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
from sparse_exp.benchmark.ratios import Speeds
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
_BEYOND = 10  # latencies beyond a percentile, without which it says nothing
CAUSES = ("waited", "throttled", "steal")  # of a disturbance; see `Round`
CERTAIN_NUMBERS = ("items_per_s", "latency_p25_ms", "latency_p50_ms", "spread", "peak_rss_mb")
NUMBERS = ("items_per_s", *PERCENTILES, "spread", "peak_rss_mb")


class Round(NamedTuple):
    """One repeat of a measurement.

    Attributes:
        latencies: seconds of each inference; at least one.
        wall: seconds from the first call to the last result.
        warmed: seconds of warm-up before.
        stable: latencies were stable when it began; also True where the warm-up had a fixed length.
        turn: its number, which the repeats of all cells share that were measured after one another.
        waited: share of its threads' time, 0..1, that they could have run and had no CPU.
        throttled: share of the time, 0..1, that a quota kept it from running.
        steal: share of the time, 0..1, that a hypervisor gave to other machines.
    """

    latencies: Sequence[float]
    wall: float
    warmed: float = 0.0
    stable: bool = True
    turn: int = 0
    waited: float = 0.0
    throttled: float = 0.0
    steal: float = 0.0

    @property
    def disturbance(self) -> float:
        """Share of the time that something else took, 0..1."""
        return max(self.waited, self.throttled, self.steal)


@dataclass(frozen=True)
class Measurement:
    """The numbers of one cell, with their conditions.

    Attributes:
        cell: what was measured.
        rounds: its repeats; empty for a cell that is impossible.
        peak_rss_mb: most memory that the engine's process held, in units of 1e6 bytes.
        noisy: something else disturbed the repeats, or its ratio to the dense network is not known to
            ``hardware.precision``.
        dropped: repeats that something else disturbed, and that others were measured for.
        conditions: version and setting of the engine, the host, the protocol.
    """

    cell: Cell
    rounds: Sequence[Round] = ()
    peak_rss_mb: float = 0.0
    noisy: bool = False
    dropped: Sequence[Round] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def each(self) -> list[float]:
        """Images per second of each repeat."""
        return [self._speed(one) for one in self.rounds]

    @property
    def speeds(self) -> Speeds:
        """Images per second by the number of the turn."""
        return {one.turn: self._speed(one) for one in self.rounds}

    def _speed(self, one: Round) -> float:
        return self.cell.load.batch_size * len(one.latencies) / one.wall

    def numbers(self) -> dict[str, float]:
        """Those of `NUMBERS`, by name; empty for a cell that is impossible.

        ``items_per_s`` is the median of the repeats, ``spread`` see `spread`; the percentiles are taken
        over the latencies of all repeats together, those beyond which at least ten of them lie.
        """
        if not self.rounds:
            return {}
        milliseconds = 1e3 * np.concatenate([np.asarray(one.latencies) for one in self.rounds])
        known = {
            name: at
            for name, at in PERCENTILES.items()
            if at <= 50 or round(len(milliseconds) * (1 - at / 100), 6) >= _BEYOND
        }
        found = np.percentile(milliseconds, list(known.values()))
        return {
            "items_per_s": float(np.median(self.each)),
            **dict(zip(known, map(float, found), strict=True)),
            "spread": spread(self.each),
            "peak_rss_mb": self.peak_rss_mb,
        }

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in ``result.json``."""
        return {f"benchmark/{self.cell.name}/{name}": value for name, value in self.numbers().items()}

    def row(self) -> Row:
        """As plain data; docs/benchmark.md describes it."""
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
            "turns": [one.turn for one in self.rounds],
            "runs": sum(len(one.latencies) for one in self.rounds),
            "noisy": self.noisy,
            "warmed_s": [round(one.warmed, 3) for one in self.rounds],
            "stable": all(one.stable for one in self.rounds),
            **{name: round(max(getattr(one, name) for one in self.rounds), 4) for name in CAUSES},
            "dropped": [
                {"items_per_s": self._speed(one), "disturbance": round(one.disturbance, 4)}
                for one in self.dropped
            ],
            **self.conditions,
        }


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that have numbers: all but those of impossible cells."""
    return [row for row in rows if "impossible" not in row and row.get("items_per_s")]


def noise_sentence(rows: Sequence[Row]) -> str:
    """Why some rows are noisy, and what helps; empty where none is."""
    noisy = [row for row in rows if row.get("noisy")]
    if not noisy:
        return ""
    some = f"{len(noisy)} of {sum('impossible' not in row for row in rows)} cells"
    taken = max(float(row.get(cause, 1.0)) for row in noisy for cause in CAUSES)
    first = noisy[0]
    if taken > float(first.get("max_disturbance", 0.0)):
        return f"Something else ran while {some} were measured. Measure again with nothing else running."
    return (
        f"The ratios of {some} are not known to {first['precision_of_ratios']:.0%}: turns differ, though "
        f"nothing else ran here. More turns tell more: hardware.budget_s={5 * first['budget_s']:g}."
    )


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the most items per second; None of none."""
    return max(rows, key=lambda row: float(row["items_per_s"]), default=None)


def spread(values: Sequence[float]) -> float:
    """How far repeats are apart: (largest - smallest) / median; 0 for one value."""
    return float((max(values) - min(values)) / np.median(values))


def megabytes(model: Path) -> float:
    """Size of a model's files in units of 1e6 bytes."""
    return sum(file.stat().st_size for file in files_of(model) if file.is_file()) / 1e6


def write_rows(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write ``benchmark.json`` and ``benchmark.csv`` into a folder; returns their paths."""
    return [
        write_json(folder / "benchmark.json", rows),
        write_text(folder / "benchmark.csv", as_csv(rows)),
    ]


def as_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV: lists and dictionaries as JSON; a cell is empty where a row lacks the column."""
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
