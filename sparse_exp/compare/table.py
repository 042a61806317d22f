"""A comparison as a table: on the terminal, as CSV, as Markdown and as plain data."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp.compare.comparison import FINISHED, Comparison, Row
from sparse_exp.text import console_table, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"


def number(value: float | None) -> str:
    """A value with four digits; a dash when there is none."""
    return "-" if value is None else f"{value:.4g}"


def metrics_line(comparison: Comparison) -> list[str]:
    """For each column its full name and which values of it are better."""
    return [
        f"{column.title}: {column.metric}, {column.better}" if column.title != column.metric else
        f"{column.title}: {column.better}"
        for column in comparison.columns
    ]  # fmt: skip


def front_line(comparison: Comparison) -> str:
    """How many runs are on the front, and how many could not be weighed."""
    rows = comparison.rows
    lacking = sum(
        row.value(comparison.x) is None or row.value(comparison.y) is None or row.run.status != FINISHED
        for row in rows
    )
    gap = f" Not weighed, as they did not finish or lack a value: {lacking}." if lacking else ""
    return f"{MARK} On the Pareto front: {sum(row.front for row in rows)} of {len(rows)} runs.{gap}"


def best_lines(comparison: Comparison) -> list[str]:
    """The run to ship, where it lies, and how to make it again; empty where none was asked for."""
    best, by = comparison.best, comparison.by
    if best is None or by is None:
        return []
    kept = f", keeping {', '.join(map(str, comparison.limits))}" if comparison.limits else ""
    deployment = Path(best.run.place) / "deployment"
    return [
        f"Ship run {best.number}, {best.label}: {by.metric} {number(best.value(by))}{kept}.",
        *([f"Its files: {deployment}"] if deployment.is_dir() else []),
        f"Make it again: {best.run.command}",
    ]


def shown_rows(comparison: Comparison, limit: int) -> list[Row]:
    """The first rows, and those of the front and the best wherever they are."""
    return [row for row in comparison.rows if row.number <= limit or row.front or row is comparison.best]


def said(comparison: Comparison) -> list[str]:
    """What is to be said about the table, one line each."""
    return [*metrics_line(comparison), front_line(comparison), *best_lines(comparison)]


def terminal_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Rows as a table that a rich console prints; those of the front are bold."""
    titles, cells = as_cells(comparison, rows)
    styles = ["bold" if row.front else "dim" if row.run.status != FINISHED else "" for row in rows]
    table = console_table(titles, cells, right=_numeric(comparison, titles), styles=styles)
    for index, column in enumerate(table.columns):
        column.no_wrap = index < 2
        column.min_width = (1, 1, 12)[index] if index < 3 else 6
    return table


def as_cells(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns and the cells of each row: front, number, run, what differs, metrics.

    The first has `MARK`, or the status of a run that did not finish. What differs is left out where
    nothing does.
    """
    beyond = [row.beyond for row in rows]
    texts = {"what differs": beyond} if any(beyond) else {}
    cells = [
        [
            MARK if row.front else "" if row.run.status == FINISHED else row.run.status,
            str(row.number),
            row.label,
            *(values[index] for values in texts.values()),
            *(number(row.value(column)) for column in comparison.columns),
        ]
        for index, row in enumerate(rows)
    ]
    return ["", "#", "run", *texts, *(column.title for column in comparison.columns)], cells


_HEAD = ("number", "front", "run", "place", "status", "overrides")


def as_csv(comparison: Comparison) -> str:
    """All rows as CSV: metrics under their full names, unrounded; empty where there is no value."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_HEAD, *(column.metric for column in comparison.columns)])
    for row in comparison.rows:
        values = [row.value(column) for column in comparison.columns]
        texts = [row.label, row.run.place, row.run.status, " ".join(row.run.overrides or ())]
        writer.writerow(
            [row.number, int(row.front), *texts, *("" if value is None else value for value in values)]
        )
    return stream.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """All rows as a Markdown table, with what is to be said about it."""
    titles, rows = as_cells(comparison, comparison.rows)
    table = markdown_table(
        [_literal(title) for title in titles],
        [[_literal(cell) for cell in row] for row in rows],
        right=_numeric(comparison, titles),
    )
    notes = said(comparison)[: -1 if comparison.best else None]
    command = ["", f"    {comparison.best.run.command}"] if comparison.best else []
    return "\n".join(["# Comparison", "", table, "", *(f"- {_literal(x)}" for x in notes), *command]) + "\n"


def _numeric(comparison: Comparison, titles: Sequence[str]) -> list[int]:
    """The columns of numbers: the second, of the runs' own numbers, and those of metrics."""
    return [1, *range(len(titles) - len(comparison.columns), len(titles))]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is; bars only matter in tables, which escape them."""
    return re.sub(r"([*`<\\])", r"\\\1", text)


def as_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, for ``--json``."""
    best = comparison.best
    return {
        "x": comparison.x.metric,
        "y": comparison.y.metric,
        "less_is_better": [column.metric for column in comparison.columns if column.less],
        "runs": [_row_data(comparison, row) for row in comparison.rows],
        "best": {**_row_data(comparison, best), "command": best.run.command} if best else None,
    }


def _row_data(comparison: Comparison, row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "run": row.label,
        "place": row.run.place,
        "status": row.run.status,
        "front": row.front,
        "overrides": list(row.run.overrides) if row.run.overrides is not None else None,
        "metrics": {column.metric: row.value(column) for column in comparison.columns},
    }
