"""The few numbers that a run ends with on the console."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sparse_exp.report.results import SIZES, SPARSITIES, Result, accuracies, number, recovery, throughputs

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def summary_table(result: Result, title: str = "Result") -> RenderableType:
    """Accuracy, sparsity, sizes and throughput as something that a rich console prints.

    Fits in 80 columns, and reads well without colours or a terminal.

    Args:
        result: the flat numbers of ``result.json``; what is missing is left out.
        title: headline.
    """
    from rich.console import Group
    from rich.text import Text

    accuracy, *others = (_accuracy(result), _files(result), _benchmark(result))
    kept = [Text(recovery(result) + "\n")] if recovery(result) else []
    tables = [table for table in others if table.row_count]
    return Group(Text(title, style="bold"), *([accuracy] if accuracy.row_count else []), *kept, *tables)


def summary_text(result: Result, title: str = "Result", width: int = 80) -> str:
    """`summary_table` as plain text of that many columns at most."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(summary_table(result, title))
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


def _benchmark(result: Result) -> Table:
    table = _table("Throughput", "variant", "batch", "items/s", "p50 ms", "spread", "x best dense")
    rows = throughputs(result)
    best = {row.batch: max(r.items_per_s for r in rows if r.batch == row.batch) for row in rows}
    for row in rows:
        table.add_row(
            row.engine,
            row.variant,
            str(row.batch),
            decimal(row.items_per_s, 1),
            decimal(row.p50, 1),
            percent(row.spread),
            decimal(row.speedup, 2),
            style="bold" if row.items_per_s == best[row.batch] else "",
        )
    return table


def _table(first: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True, min_width=11)
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    return table


def decimal(value: float | None, digits: int) -> str:
    """A number with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percentage with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}%}"
