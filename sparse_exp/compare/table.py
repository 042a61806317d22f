"""Render a comparison as a table: for the terminal, as CSV, as Markdown and as plain data."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp.compare.comparison import FINISHED, Column, Comparison, RunRow
from sparse_exp.runs.deployment import FOLDER
from sparse_exp.text import console_table, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"
_TIED = 8  # runs that are named


def number(value: float | None) -> str:
    """A value with four digits; a dash when there is none."""
    return "-" if value is None else f"{value:.4g}"


def metric_lines(comparison: Comparison) -> list[str]:
    """For each column the full name of its metric, and which values are better."""
    return [
        f"{column.title}: {column.metric}, {column.better}" if column.title != column.metric else
        f"{column.title}: {column.better}"
        for column in comparison.columns
    ]  # fmt: skip


def front_line(comparison: Comparison) -> str:
    """How many runs are on the front, and how many could not be compared."""
    rows = comparison.rows
    lacking = sum(
        row.value(comparison.x) is None or row.value(comparison.y) is None or row.run.status != FINISHED
        for row in rows
    )
    gap = f" Not weighed, as they did not finish or lack a value: {lacking}." if lacking else ""
    return f"{MARK} On the Pareto front: {sum(row.front for row in rows)} of {len(rows)} runs.{gap}"


def best_lines(comparison: Comparison) -> list[str]:
    """The best run, its files, and the command that makes it again; empty where no best was asked for."""
    best, by = comparison.best, comparison.by
    if best is None or by is None:
        return []
    kept = f", keeping {', '.join(map(str, comparison.limits))}" if comparison.limits else ""
    deployment = Path(best.run.place) / FOLDER
    return [
        f"Ship run {best.number}, {best.label}: {by.metric} {number(best.value(by))}{kept}.",
        *_tied_lines(comparison, by),
        *([f"Its files: {deployment}"] if deployment.is_dir() else []),
        f"Make it again: {best.run.command}",
    ]


def _tied_lines(comparison: Comparison, by: Column) -> list[str]:
    """Which other runs are as good within the spread, and what decided between them."""
    if not comparison.tied:
        return []
    runs = ", ".join(f"{row.number} ({number(row.value(by))})" for row in comparison.tied[:_TIED])
    more = f" and {len(comparison.tied) - _TIED} more" if len(comparison.tied) > _TIED else ""
    second = comparison.second
    return [
        f"The spread of {by.title} does not tell it from run {runs}{more}: of these it is the best in "
        f"{second.title}."
    ]


def shown_rows(comparison: Comparison, limit: int) -> list[RunRow]:
    """The first ``limit`` rows, and all others that are on the front or the best."""
    return [row for row in comparison.rows if row.number <= limit or row.front or row is comparison.best]


def remarks(comparison: Comparison) -> list[str]:
    """The lines below the table: its metrics, the front, the best run."""
    return [*metric_lines(comparison), front_line(comparison), *best_lines(comparison)]


def terminal_table(comparison: Comparison, rows: Sequence[RunRow]) -> Table:
    """Rows as a table that a rich console prints; those on the front are bold."""
    titles, cells = as_cells(comparison, rows)
    styles = ["bold" if row.front else "dim" if row.run.status != FINISHED else "" for row in rows]
    table = console_table(titles, cells, right=_numeric(comparison, titles), styles=styles)
    for index, column in enumerate(table.columns):
        column.no_wrap = index < 2
        column.min_width = (1, 1, 12)[index] if index < 3 else 6
    return table


def as_cells(comparison: Comparison, rows: Sequence[RunRow]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns and the cells of each row: front, number, run, what differs, metrics.

    The first cell holds `MARK`, or the status of a run that did not finish. The column "what differs" is left
    out where it would be empty.
    """
    differences = [row.unlabelled_words for row in rows]
    texts = {"what differs": differences} if any(differences) else {}
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
    """All rows as CSV: metrics under their full names, not rounded; empty where there is no value."""
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
    """All rows as a Markdown table, with the remarks below it."""
    titles, rows = as_cells(comparison, comparison.rows)
    table = markdown_table(
        [_literal(title) for title in titles],
        [[_literal(cell) for cell in row] for row in rows],
        right=_numeric(comparison, titles),
    )
    notes = remarks(comparison)[: -1 if comparison.best else None]
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
        "tied": [row.number for row in comparison.tied],
    }


def _row_data(comparison: Comparison, row: RunRow) -> dict[str, Any]:
    return {
        "number": row.number,
        "run": row.label,
        "place": row.run.place,
        "status": row.run.status,
        "front": row.front,
        "overrides": list(row.run.overrides) if row.run.overrides is not None else None,
        "metrics": {column.metric: row.value(column) for column in comparison.columns},
    }
