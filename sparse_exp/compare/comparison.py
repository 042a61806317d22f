"""Runs beside each other: which are on the Pareto front, and which is the one to ship."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.metrics.names import Limit, full_name, parse_limits
from sparse_exp.metrics.pareto import less_is_better, pareto_front
from sparse_exp.runs.past import PastRun

FINISHED = "FINISHED"


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        metric: full name.
        title: short, and no other column's.
        less: less of it is better.
    """

    metric: str
    title: str
    less: bool

    @property
    def better(self) -> str:
        """Which values are better, for people."""
        return "less is better" if self.less else "more is better"


@dataclass(frozen=True)
class Row:
    """A run of the table.

    Attributes:
        number: from 1, the same in table and pictures.
        run: as it was read.
        label: what to call it; no other run's.
        differs: words of its command line that not all runs have.
        front: it is on the Pareto front.
    """

    number: int
    run: PastRun
    label: str
    differs: str
    front: bool

    @property
    def beyond(self) -> str:
        """What differs and cannot be read off the label, which has model, data and recipe by default."""
        words = [word for word in self.differs.split(" ") if word]
        return " ".join(word for word in words if not _is_said(self.label, word.partition("=")[2]))

    def value(self, column: Column) -> float | None:
        """The run's value of a metric; None where it has none, or one that is no number."""
        value = self.run.metrics.get(column.metric)
        return None if value is None or math.isnan(value) else value


def _is_said(label: str, value: str) -> bool:
    """Whether a label has a value among its parts. A bare number may be anything, such as the job's."""
    return any(map(str.isalpha, value)) and f"-{value}-" in f"-{label}-"


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        x, y: the two metrics that are weighed against each other.
        others: those of the limits, and the one that the best is chosen by, where they are not x or y.
        rows: runs, best in y first; those that lack x or y, or did not finish, last.
        limits: that the best must keep.
        by: what the best is best in; None where no best was asked for.
        best: of the finished runs that keep the limits; None where none was asked for.
    """

    x: Column
    y: Column
    others: tuple[Column, ...]
    rows: tuple[Row, ...]
    limits: tuple[Limit, ...] = ()
    by: Column | None = None
    best: Row | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """All metrics of the table."""
        return (self.x, self.y, *self.others)


def compare(
    runs: Sequence[PastRun], x: str, y: str, *, limits: str | None = None, by: str | None = None
) -> Comparison:
    """Lay runs side by side.

    Only finished runs are on the front or can be the best; the others are listed.

    Args:
        runs: at least one.
        x: metric, in full or short; see `sparse_exp.metrics.names.full_name`.
        y: likewise.
        limits: what the best must keep, such as ``map50>=0.6, size<=4``; None or empty: nothing.
        by: metric that the best is best in; None: ``y``. Of equals the better in y is, then the first.

    Raises:
        ConfigError: a metric or limit cannot be understood.
        SparseExpError: a best was asked for, and no run keeps the limits.
    """
    metrics = {name for run in runs for name in run.metrics}
    if not metrics:
        raise ConfigError(f"The runs have no metrics yet ({len(runs)} runs). Let one finish its evaluation.")
    names = [full_name(name, metrics) for name in (x, y)]
    kept = tuple(parse_limits(limits or "", metrics))
    chosen = full_name(by or y, metrics) if limits is not None or by else None
    if names[0] == names[1]:
        raise ConfigError(expected("--x and --y", "two different metrics", names[0], "Change one of them."))
    columns = _columns([*names, *(limit.metric for limit in kept), *([chosen] if chosen else [])])
    first, second, *others = columns.values()
    comparison = Comparison(first, second, tuple(others), _rows(runs, first, second), kept)
    if chosen is None:
        return comparison
    return replace(comparison, by=columns[chosen], best=_best(comparison, columns[chosen]))


def _columns(names: Sequence[str]) -> dict[str, Column]:
    """A column for each metric, in that order; titles are as short as they can be told apart."""
    unique = list(dict.fromkeys(names))
    ends = [name.rpartition("/")[2] for name in unique]
    titles = [end if ends.count(end) == 1 else name for name, end in zip(unique, ends, strict=True)]
    return {
        name: Column(name, title, less_is_better(name)) for name, title in zip(unique, titles, strict=True)
    }


def _rows(runs: Sequence[PastRun], x: Column, y: Column) -> tuple[Row, ...]:
    counted = [run.metrics if run.status == FINISHED else {} for run in runs]
    front = pareto_front(
        [metrics.get(x.metric) for metrics in counted],
        [metrics.get(y.metric) for metrics in counted],
        x_less=x.less,
        y_less=y.less,
    )
    common = set.intersection(*(set(run.words) for run in runs))
    labels = _labels(runs)
    rows = [
        Row(0, run, labels[i], " ".join(word for word in run.words if word not in common), front[i])
        for i, run in enumerate(runs)
    ]
    ordered = sorted(rows, key=lambda row: (row.run.status != FINISHED, *_rank(row, y), *_rank(row, x)))
    return tuple(
        Row(number, row.run, row.label, row.differs, row.front) for number, row in enumerate(ordered, 1)
    )


def _rank(row: Row, column: Column) -> tuple[bool, float]:
    """Sorts the best first, and what has no value last."""
    value = row.value(column)
    return (True, 0.0) if value is None else (False, value if column.less else -value)


def _labels(runs: Sequence[PastRun]) -> list[str]:
    """Of a directory what sets it apart from the others; of an MLflow run its name and some of its id."""
    places = [Path(run.place).absolute() for run in runs if run.place != run.run_id]
    shared = os.path.commonpath([place.parent for place in places]) if places else ""
    return [
        f"{run.name} ({run.place[:8]})"
        if run.place == run.run_id
        else str(Path(run.place).absolute().relative_to(shared))
        for run in runs
    ]


def _best(comparison: Comparison, by: Column) -> Row:
    finished = [row for row in comparison.rows if row.run.status == FINISHED]
    limits = comparison.limits
    fitting = [
        row
        for row in finished
        if row.value(by) is not None
        and all(limit.keeps(row.run.metrics.get(limit.metric)) for limit in limits)
    ]
    if not fitting:
        raise SparseExpError(_nothing_fits(finished, limits, by))
    return min(fitting, key=lambda row: (*_rank(row, by), *_rank(row, comparison.y), row.number))


def _nothing_fits(finished: Sequence[Row], limits: Sequence[Limit], by: Column) -> str:
    """Why there is no best: how many runs keep each limit alone, and what comes closest where none does."""
    parts = []
    for limit in limits:
        values = [row.run.metrics[limit.metric] for row in finished if limit.metric in row.run.metrics]
        keeping = sum(limit.keeps(value) for value in values)
        extreme = (min if limit.sign.startswith("<") else max)(values, default=None)
        closest = "" if extreme is None or keeping else f", which reach {extreme:.4g}"
        parts.append(f"{limit} by {keeping} of {len(values)} that have it{closest}")
    if not any(row.value(by) is not None for row in finished):
        parts.append(f"{by.metric} was measured in none")
    return f"Of {len(finished)} finished runs none keeps all limits: {'; '.join(parts)}. Loosen one."
