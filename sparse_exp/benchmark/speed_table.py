"""Rows of a benchmark as titles and cells, for whoever shows them as a table: console, report, page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparse_exp.benchmark.measurements import Row, fastest, measured
from sparse_exp.benchmark.ratios import SAME, Ratio, ratio_of_rows

Table = tuple[list[str], list[list[str]]]
NOISY = "noisy"


def _number(name: str, digits: int) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    return shown


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(name) is None else str(row[name])


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": _text("network"),
    "engine": _text("engine"),
    "variant": _text("variant"),
    "precision": _text("precision"),
    "scenario": _text("scenario"),
    "batch": _text("batch"),
    "streams": _text("streams"),
    "cores": _text("cores"),
    "items/s": _number("items_per_s", 2),
    "spread": lambda row: "-" if row.get("spread") is None else f"{row['spread']:.1%}",
    "p50 ms": _number("latency_p50_ms", 2),
    "p90 ms": _number("latency_p90_ms", 2),
    "p99 ms": _number("latency_p99_ms", 2),
    "peak MB": _number("peak_rss_mb", 0),
    "mAP50": _number("map50", 3),
    "file MB": _number("size_mb", 1),
    "gzip MB": _number("gzip_mb", 1),
}
_OPTIONAL = ("network", "precision", "mAP50", "gzip MB", "file MB", "peak MB")  # left out where no row has it
_BASELINES: dict[str, Callable[[Row], bool]] = {
    "x ORT fp32": lambda row: row["engine"] == "onnxruntime" and row["variant"] == "dense",
    "x best fp32": lambda row: row["variant"] == "dense",
    "x best int8": lambda row: row["variant"] == "dense_int8",
}


def speed_table(rows: Sequence[Row]) -> Table:
    """What was measured, with the ratios to the dense baselines of the same load.

    ``x ORT fp32`` compares with ONNX Runtime's dense fp32, ``x best fp32`` with the fastest dense fp32 of all
    engines, ``x best int8`` with the fastest dense int8. A ratio that cannot be told from 1 stands after a
    tilde. A noisy row says so in the last column.

    Args:
        rows: see docs/benchmark.md; those of impossible cells are left out.

    Returns:
        Titles of the columns, and the cells of each row. A column that no row needs is left out.
    """
    found = measured(rows)
    columns: dict[str, Sequence[str]] = {
        title: [shown(row) for row in found] for title, shown in _COLUMNS.items()
    }
    for title in _BASELINES:
        columns[title] = [shown_ratio(ratio(rows, row, title)) for row in found]
    columns[""] = [NOISY if row.get("noisy") else "" for row in found]
    droppable = (*_OPTIONAL, *_BASELINES, "")
    kept = {
        title: cells for title, cells in columns.items() if title not in droppable or set(cells) - {"-", ""}
    }
    return list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)]


def ratio(rows: Iterable[Row], row: Row, baseline: str) -> Ratio | None:
    """How many times faster a row is than a baseline under the same conditions.

    Args:
        rows: all.
        row: one of them.
        baseline: ``x ORT fp32``, ``x best fp32`` or ``x best int8``.

    Returns:
        None where the baseline was not measured.
    """
    others = [
        other
        for other in measured(rows)
        if _conditions(other) == _conditions(row) and _BASELINES[baseline](other)
    ]
    best = fastest(others)
    if best is None:
        return None
    return SAME if best is row else ratio_of_rows(row, best)


def noisy_labels(rows: Iterable[Row]) -> set[str]:
    """The `label` of each row that is noisy."""
    return {label(row) for row in rows if row.get("noisy")}


def shown_gains(rows: Sequence[Row]) -> dict[str, str]:
    """The ratio of each row to the fastest dense fp32 as tables show it, by `label`."""
    return {label(row): shown_ratio(ratio(rows, row, "x best fp32")) for row in measured(rows)}


def vague_labels(rows: Sequence[Row]) -> set[str]:
    """The `label` of each row that cannot be told from the fastest dense fp32, but for that itself."""
    ratios = {label(row): ratio(rows, row, "x best fp32") for row in measured(rows)}
    return {name for name, found in ratios.items() if found and found is not SAME and found.is_noise}


def options_table(rows: Sequence[Row]) -> Table:
    """The settings that tuning chose, and their gain over the first that it tried.

    The first are the engine's defaults with the fewest streams. A cell that was not tuned has no row.

    Returns:
        Titles of the columns, and the cells of each row.
    """
    tried = [row for row in measured(rows) if len(row.get("tries") or ()) > 1]
    cells = [
        [label(row), str(row["streams"]), options_text(row), _decimal(_gain(row)), str(len(row["tries"]))]
        for row in tried
    ]
    titles = ["cell", "streams", "options", "x first try", "tries"]
    failures = [_failures(row) for row in tried]
    if any(failures):
        titles.append("did not work")
        cells = [[*row, failure] for row, failure in zip(cells, failures, strict=True)]
    return titles, cells


def _gain(row: Row) -> float | None:
    """How many times faster the chosen setting is than the first; None where neither was measured.

    Old rows only say how fast each was when it was tried.
    """
    first, *_ = row["tries"]
    chosen = next(
        one
        for one in row["tries"]
        if one["streams"] == row["streams"] and one["options"] == row["options"] and "failed" not in one
    )
    if "gain" in chosen:
        return float(chosen["gain"])
    if "items_per_s" not in first or "items_per_s" not in chosen:
        return None
    return float(chosen["items_per_s"] / first["items_per_s"])


def impossible_lines(rows: Iterable[Row]) -> list[str]:
    """A sentence for each engine and variant that could not be measured: which, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "impossible" in row:
            cell = "/".join(filter(None, (row.get("network"), row["engine"], row["variant"])))
            found.setdefault((cell, row["impossible"]), []).append(key(row))
    return [f"{cell} ({', '.join(keys)}): {reason}" for (cell, reason), keys in found.items()]


def key(row: Row) -> str:
    """The load's part of a metric's name; rows of old versions have no scenario, and no key."""
    return str(row.get("key") or f"b{row['batch']}")


def load_text(row: Row) -> str:
    """How the engine was asked, in words: ``batch 16, throughput``, ``async, 4 streams``."""
    scenario = row.get("scenario", "sync")
    if scenario == "async":
        return f"async, {row['streams']} streams"
    fixed = f", {row['streams']} streams" if "_s" in key(row) else ""
    return f"batch {row['batch']}" + (f", {scenario}{fixed}" if scenario != "sync" else "")


def label(row: Row) -> str:
    """A row's part of a metric's name: ``<engine>/<variant>/<key>``, after its network if it has one."""
    return "/".join(filter(None, (row.get("network"), row["engine"], row["variant"], key(row))))


def options_text(row: Row) -> str:
    """The options that were chosen, in words; ``defaults`` where there are none."""
    options = row.get("options") or {}
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"


def _failures(row: Row) -> str:
    failed = [one for one in row["tries"] if "failed" in one]
    return "; ".join(f"{one['streams']} streams, {options_text(one)}: {one['failed']}" for one in failed)


def _conditions(row: Row) -> tuple[Any, ...]:
    """What two rows must share to be compared; of a network's name the part before the first hyphen."""
    return str(row.get("network", "")).split("-")[0], key(row), row["cores"], row["imgsz"], row.get("cpu")


def shown_ratio(found: Ratio | None) -> str:
    """A ratio as tables show it."""
    return "-" if found is None else "1.00" if found is SAME else str(found)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
