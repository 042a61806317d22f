"""Compare runs by two metrics: which are on the Pareto front, and which is best within limits."""

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
_WORK = ("sparsity/macs", "size/macs")  # shown wherever it differs: it says where a gain of speed comes from


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        metric: full name.
        title: short name, different for each column.
        less: whether less is better.
    """

    metric: str
    title: str
    less: bool

    @property
    def better(self) -> str:
        """A phrase that says which values are better."""
        return "less is better" if self.less else "more is better"


@dataclass(frozen=True)
class RunRow:
    """A run as a row of the table.

    Attributes:
        number: from 1, the same in table and pictures.
        run: the run.
        label: its name in the table, different for each run.
        own_words: the words of its command line that not all runs have.
        front: whether it is on the Pareto front.
    """

    number: int
    run: PastRun
    label: str
    own_words: str
    front: bool

    @property
    def unlabelled_words(self) -> str:
        """Its own words without those whose value is a part of the label, as model and recipe often are."""

        def is_labelled(word: str) -> bool:
            value = word.partition("=")[2]
            # A bare number in the label may mean something else, for example the number of the job.
            return any(map(str.isalpha, value)) and f"-{value}-" in f"-{self.label}-"

        return " ".join(word for word in self.own_words.split(" ") if word and not is_labelled(word))

    def value(self, column: Column) -> float | None:
        """The run's value of a metric; None where it has none, or NaN."""
        value = self.run.metrics.get(column.metric)
        return None if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        x, y: the two metrics of the Pareto front.
        others: the metrics of the limits, and the one that the best is chosen by, unless they are x or y; and
            what the runs compute, where it differs.
        rows: runs, best in y first; those that lack x or y, or did not finish, last.
        limits: the limits that the best must keep.
        by: the metric that the best is chosen by; None where no best was asked for.
        best: the best of the finished runs that keep the limits; None where no best was asked for.
        tied: the others that the spread of the measurements does not tell from the best in ``by``.
    """

    x: Column
    y: Column
    others: tuple[Column, ...]
    rows: tuple[RunRow, ...]
    limits: tuple[Limit, ...] = ()
    by: Column | None = None
    best: RunRow | None = None
    tied: tuple[RunRow, ...] = ()

    @property
    def second(self) -> Column:
        """The metric that decides between runs that are equal in ``by``: y, or x where ``by`` is y."""
        return self.x if self.by is not None and self.by.metric == self.y.metric else self.y

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns of the table that hold a metric."""
        return (self.x, self.y, *self.others)


def compare(
    runs: Sequence[PastRun], x: str, y: str, *, limits: str | None = None, by: str | None = None
) -> Comparison:
    """Compare runs.

    Only finished runs can be on the front or the best; the others are listed.

    Args:
        runs: at least one.
        x: a metric, in full or short; see `sparse_exp.metrics.names.full_name`.
        y: likewise.
        limits: limits that the best must keep, for example ``map50>=0.6, size<=4``; None or empty: no limits.
        by: the metric that the best is chosen by; None: ``y``. Of runs that are equal within the spread of
            their measurements the better in y is chosen (of those equal in y itself, the better in x), then
            the first.

    Raises:
        ConfigError: a metric or limit cannot be understood.
        SparseExpError: a best was asked for, and no run keeps the limits.
    """
    metrics = {name for run in runs for name in run.metrics}
    if not metrics:
        raise ConfigError(f"The runs have no metrics yet ({len(runs)} runs). Let one finish its evaluation.")
    names = [full_name(name, metrics) for name in (x, y)]
    parsed = tuple(parse_limits(limits or "", metrics))
    chosen = full_name(by or y, metrics) if limits is not None or by else None
    if names[0] == names[1]:
        raise ConfigError(expected("--x and --y", "two different metrics", names[0], "Change one of them."))
    columns = _columns(
        [*names, *(limit.metric for limit in parsed), *([chosen] if chosen else []), *_differing(runs)]
    )
    first, second, *others = columns.values()
    comparison = Comparison(first, second, tuple(others), _rows(runs, first, second), parsed)
    if chosen is None:
        return comparison
    return _with_best(replace(comparison, by=columns[chosen]), columns[chosen])


def _differing(runs: Sequence[PastRun]) -> list[str]:
    """The metrics of `_WORK` in which runs differ."""
    return [name for name in _WORK if len({run.metrics[name] for run in runs if name in run.metrics}) > 1]


def _columns(names: Sequence[str]) -> dict[str, Column]:
    """A column for each metric, in that order, titled with the last part of its name where that is unique."""
    unique = list(dict.fromkeys(names))
    ends = [name.rpartition("/")[2] for name in unique]
    titles = [end if ends.count(end) == 1 else name for name, end in zip(unique, ends, strict=True)]
    return {
        name: Column(name, title, less_is_better(name)) for name, title in zip(unique, titles, strict=True)
    }


def _rows(runs: Sequence[PastRun], x: Column, y: Column) -> tuple[RunRow, ...]:
    finished = [run.metrics if run.status == FINISHED else {} for run in runs]
    front = pareto_front(
        [metrics.get(x.metric) for metrics in finished],
        [metrics.get(y.metric) for metrics in finished],
        x_less=x.less,
        y_less=y.less,
    )
    common = set.intersection(*(set(run.words) for run in runs))
    labels = _labels(runs)
    rows = [
        RunRow(0, run, labels[i], " ".join(word for word in run.words if word not in common), front[i])
        for i, run in enumerate(runs)
    ]
    ordered = sorted(rows, key=lambda row: (row.run.status != FINISHED, *_rank(row, y), *_rank(row, x)))
    return tuple(replace(row, number=number) for number, row in enumerate(ordered, 1))


def _rank(row: RunRow, column: Column) -> tuple[bool, float]:
    """A sort key: the best first, rows without a value last."""
    value = row.value(column)
    return (True, 0.0) if value is None else (False, value if column.less else -value)


def _labels(runs: Sequence[PastRun]) -> list[str]:
    """For a directory its path below the common one; for an MLflow run its name and the start of its id."""
    places = [Path(run.place).absolute() for run in runs if run.place != run.run_id]
    shared = os.path.commonpath([place.parent for place in places]) if places else ""
    return [
        f"{run.name} ({run.place[:8]})"
        if run.place == run.run_id
        else str(Path(run.place).absolute().relative_to(shared))
        for run in runs
    ]


def _with_best(comparison: Comparison, by: Column) -> Comparison:
    finished = [row for row in comparison.rows if row.run.status == FINISHED]
    limits = comparison.limits
    candidates = [
        row
        for row in finished
        if row.value(by) is not None
        and all(limit.keeps(row.run.metrics.get(limit.metric)) for limit in limits)
    ]
    if not candidates:
        raise SparseExpError(_no_candidates(finished, limits, by))
    low, high = _interval(min(candidates, key=lambda row: _rank(row, by)), by)
    equal = [row for row in candidates if _interval(row, by)[0] <= high and _interval(row, by)[1] >= low]
    best = min(equal, key=lambda row: (*_rank(row, comparison.second), *_rank(row, by), row.number))
    return replace(comparison, best=best, tied=tuple(row for row in equal if row is not best))


def _interval(row: RunRow, column: Column) -> tuple[float, float]:
    """Between what a run's value lies, by what it says of that: bounds, or the spread of its repeats."""
    value, metrics, metric = row.value(column), row.run.metrics, column.metric
    assert value is not None
    place, _, name = metric.rpartition("/")
    if f"{metric}_low" in metrics and f"{metric}_high" in metrics:
        return metrics[f"{metric}_low"], metrics[f"{metric}_high"]
    timed = name == "items_per_s" or name.startswith("latency_")
    half = value * metrics.get(f"{place}/spread", 0.0) / 2 if timed else 0.0
    return value - half, value + half


def _no_candidates(finished: Sequence[RunRow], limits: Sequence[Limit], by: Column) -> str:
    """Why there is no best: how many runs keep each limit alone, and the closest value where none does."""
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
