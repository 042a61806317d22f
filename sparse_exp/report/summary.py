"""The tables of results that a run ends with on the console."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparse_exp.benchmark.results import Row
from sparse_exp.benchmark.table import impossible_lines
from sparse_exp.benchmark.table import label as label_of
from sparse_exp.metrics.result_rows import (
    SIZES,
    SPARSITIES,
    Result,
    accuracies,
    number,
    recovery,
    throughputs,
)
from sparse_exp.text import decimal, percent


def summary_table(result: Result, title: str = "Result", rows: Sequence[Row] = ()) -> RenderableType:
    """Accuracy, sparsity, sizes and throughput as tables that a rich console prints.

    They fit in 80 columns, and can be read without colours.

    Args:
        result: the flat numbers of ``result.json``; tables without numbers are left out.
        title: headline.
        rows: of the benchmark; noisy cells are marked, cells that could not be measured are named below.
    """
    accuracy, *others = (_accuracy(result), _files(result), _benchmark(result, rows))
    kept = [Text(recovery(result) + "\n")] if recovery(result) else []
    tables = [table for table in others if table.row_count]
    remarks = [Text(line) for line in _remarks(rows)]
    return Group(
        Text(title, style="bold"), *([accuracy] if accuracy.row_count else []), *kept, *tables, *remarks
    )


def summary_text(result: Result, title: str = "Result", width: int = 80, rows: Sequence[Row] = ()) -> str:
    """`summary_table` as plain text of at most ``width`` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(summary_table(result, title, rows))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _accuracy(result: Result) -> Table:
    table = _table("Accuracy", "mAP50", "mAP50-95", "against torch")
    for where, map50, map50_95, difference in accuracies(result):
        table.add_row(where, decimal(map50, 3), decimal(map50_95, 3), difference)
    return table


def _files(result: Result) -> Table:
    table = _table("Zeros and sizes", "")
    for key, label in SPARSITIES.items():
        if (share := number(result, key)) is not None:
            table.add_row(f"zeros in {label}", percent(share, 2))
    for key, label in SIZES.items():
        if (size := number(result, key)) is not None:
            table.add_row(label, f"{size:.1f} MB")
    return table


def _benchmark(result: Result, rows: Sequence[Row]) -> Table:
    noisy = {label_of(row) for row in rows if row.get("noisy")}
    table = _table("Throughput", "variant", "load", "items/s", "p50 ms", "spread", "x dense")
    found = throughputs(result)
    best = {one.load: max(r.items_per_s for r in found if r.load == one.load) for one in found}
    for one in found:
        mark = " !" if f"{one.engine}/{one.variant}/{one.load}" in noisy else ""
        table.add_row(
            one.engine,
            one.variant,
            one.load,
            decimal(one.items_per_s, 1),
            decimal(one.p50, 1),
            percent(one.spread) + mark,
            decimal(one.speedup, 2),
            style="bold" if one.items_per_s == best[one.load] else "",
        )
    return table


def _remarks(rows: Sequence[Row]) -> list[str]:
    """The lines below the tables: what noisy means, and the cells that could not be measured."""
    noisy = ["! noisy: the repeats differ too much."] if any(row.get("noisy") for row in rows) else []
    return noisy + [f"Not measured: {line}" for line in impossible_lines(rows)]


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, min_width=11)
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "load") else "right", no_wrap=True)
    return table
