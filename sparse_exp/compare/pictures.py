"""Draw a comparison: a PNG, and an HTML page that shows a run when the mouse is over it."""

from __future__ import annotations

import math
from pathlib import Path

from sparse_exp.compare.comparison import FINISHED, Column, Comparison, RunRow
from sparse_exp.compare.scatter import page
from sparse_exp.compare.table import as_cells, number, remarks
from sparse_exp.files import write_text
from sparse_exp.metrics.pareto import Axis, Point


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.png`` and ``compare.html``; nothing where no run has both metrics.

    Args:
        comparison: its finished runs are drawn.
        folder: where the files go.

    Returns:
        The files that were written.
    """
    points = [point for row in comparison.rows if (point := _point(comparison, row))]
    if not points:
        return []
    from sparse_exp.report.plots import trade_off  # it imports matplotlib

    x, y = _axis(comparison.x), _axis(comparison.y)
    picture = folder / "compare.png"
    trade_off(points, x, y, picture)
    titles, rows = as_cells(comparison, comparison.rows)
    text = page(
        f"{comparison.y.title} over {comparison.x.title}: {len(comparison.rows)} runs",
        points,
        x,
        y,
        notes={row.number: _note(comparison, row) for row in comparison.rows},
        table=(titles, [(row.number, cells) for row, cells in zip(comparison.rows, rows, strict=True)]),
        numeric=len(comparison.columns),
        lines=remarks(comparison),
    )
    return [picture, write_text(folder / "compare.html", text)]


def _axis(column: Column) -> Axis:
    return Axis(column.metric, column.less)


def _point(comparison: Comparison, row: RunRow) -> Point | None:
    """The run as a point; None where it did not finish, or lacks a finite value."""
    x, y = row.value(comparison.x), row.value(comparison.y)
    if x is None or y is None or row.run.status != FINISHED or not (math.isfinite(x) and math.isfinite(y)):
        return None
    best = row is comparison.best
    return Point(row.number, row.own_words or row.label, x, y, front=row.front, best=best)


def _note(comparison: Comparison, row: RunRow) -> str:
    """The lines that the HTML page shows when the mouse is over the run."""
    values = [f"{column.metric}: {number(row.value(column))}" for column in comparison.columns]
    status = [row.run.status] if row.run.status != FINISHED else []
    words = [row.own_words] if row.own_words else []
    return "\n".join([f"{row.number}  {row.label}", *status, *words, *values])
