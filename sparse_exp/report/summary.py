"""The tables of results that a run ends with on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparse_exp.benchmark.measurements import Row, noise_sentence
from sparse_exp.benchmark.speed_table import impossible_lines, noisy_labels, shown_gains, vague_labels
from sparse_exp.metrics.result_rows import (
    SIZES,
    SPARSITIES,
    Result,
    accuracies,
    number,
    recovery,
    throughputs,
    work,
)
from sparse_exp.report.answer import answer
from sparse_exp.text import console_table, decimal, percent, plain_text


def summary_table(result: Result, title: str = "Result", rows: Sequence[Row] = ()) -> RenderableType:
    """The answer, then accuracy, sparsity, sizes and throughput, for a rich console.

    It fits in 80 columns, and reads well without colours or a terminal.

    Args:
        result: the flat numbers of ``result.json``; tables without numbers are left out.
        title: headline.
        rows: of the benchmark; those that are noisy or impossible are named.
    """
    accuracy, files, speeds = _accuracy(result), _files(result), _benchmark(result, rows)
    parts: list[RenderableType] = [Text(title, style="bold")]
    parts += [_sentences(found)] if (found := answer(result, rows)) else []
    parts += [accuracy] if accuracy.row_count else []
    parts += [Text(recovery(result) + "\n")] if recovery(result) else []
    parts += [files] if files.row_count else []
    parts += [Text(work(result) + "\n")] if work(result) else []
    parts += [speeds] if speeds.row_count else []
    return Group(*parts, *(Text(line) for line in _remarks(rows)))


def summary_text(result: Result, title: str = "Result", width: int = 80, rows: Sequence[Row] = ()) -> str:
    """`summary_table` as plain text of that many columns at most."""
    return plain_text(summary_table(result, title, rows), width=width)


def _sentences(sentences: Sequence[str]) -> Table:
    """A bullet for each, whose further lines are indented."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        grid.add_row("-", sentence)
    grid.add_row()
    return grid


def _accuracy(result: Result) -> Table:
    rows = [
        (where, decimal(map50, 3), decimal(map50_95, 3), difference)
        for where, map50, map50_95, difference in accuracies(result)
    ]
    return _table(("Accuracy", "mAP50", "mAP50-95", "against torch"), rows)


def _files(result: Result) -> Table:
    shares = {f"zeros in {label}": number(result, key) for key, label in SPARSITIES.items()}
    sizes = {label: number(result, key) for key, label in SIZES.items()}
    rows = [(label, percent(share, 2)) for label, share in shares.items() if share is not None]
    rows += [(label, f"{size:.1f} MB") for label, size in sizes.items() if size is not None]
    return _table(("Zeros and sizes", ""), rows)


def _benchmark(result: Result, rows: Sequence[Row]) -> Table:
    noisy = noisy_labels(rows)
    gains = shown_gains(rows)
    found = throughputs(result)
    best = {one.load: max(r.items_per_s for r in found if r.load == one.load) for one in found}
    cells = [
        (
            one.engine,
            one.variant,
            one.load,
            decimal(one.items_per_s, 1),
            decimal(one.p50, 1),
            percent(one.spread) + (" !" if one.label in noisy else ""),
            gains.get(one.label) or decimal(one.speedup, 2),
        )
        for one in found
    ]
    titles = ("Throughput", "variant", "load", "items/s", "p50 ms", "spread", "x dense")
    styles = ["bold" if one.items_per_s == best[one.load] else "" for one in found]
    return _table(titles, cells, texts=3, styles=styles)


def _remarks(rows: Sequence[Row]) -> list[str]:
    """The lines below the speeds."""
    marks = [f"! noisy. {sentence}"] if (sentence := noise_sentence(rows)) else []
    marks += ["~ within noise of the fastest dense network."] if vague_labels(rows) else []
    return marks + [f"Not measured: {line}" for line in impossible_lines(rows)]


def _table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    texts: int = 1,
    styles: Sequence[str] | None = None,
) -> Table:
    """A narrow table whose cells stay on one line; the first ``texts`` columns hold no numbers."""
    table = console_table(titles, rows, right=range(texts, len(titles)), styles=styles)
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    table.columns[0].min_width = 11
    return table
