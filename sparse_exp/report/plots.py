"""Draw the pictures of a run and of a comparison. No other file imports Matplotlib.

Each function takes plain data and writes one PNG, whole or not at all. Figures are made without pyplot,
which keeps state for the whole process. The colours are those of Okabe and Ito, which colour-blind people can
tell apart (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from sparse_exp.benchmark.measurements import PERCENTILES, Row, fastest
from sparse_exp.benchmark.ratios import speeds_of
from sparse_exp.benchmark.speed_table import load_text
from sparse_exp.config.runtimes import may_be_shipped
from sparse_exp.config.schema import VARIANTS
from sparse_exp.files import landing
from sparse_exp.metrics.pareto import Axis, Point, staircase
from sparse_exp.text import in_picture

DPI = 130
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
YELLOW, GREY, INK = "#F0E442", "#B5B5B5", "#333333"
_CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
_VARIANT_COLOURS = {"dense": GREY, "dense_int8": ORANGE, "sparse_fp32": SKY, "sparse": BLUE}
_WIDEST = 13  # inches
_LEAST_ACCURACY = 0.05  # of mAP50 on an axis
_WORK_LINE: dict[str, Any] = {
    "color": ORANGE, "linewidth": 0, "marker": "D", "markersize": 3.5, "markeredgecolor": INK,
    "markeredgewidth": 0.4,
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v")
_CURVES = ((GREY, "-", 6.0), (BLUE, "-", 2.4), (RED, "--", 2.0), (GREEN, ":", 2.2), (ORANGE, "-.", 1.8))
_PHASE_TINTS = ("#E8F1F8", "#FBEFD9", "#E6F4EF", "#F7E9F1")
_PHASE_NAMES = {
    "dense_quant": "dense + quantized",
    "pruning_quant": "pruning + quantized",
    "pruned_quant": "pruned + quantized",
    "slim_quant": "slim + quantized",
}
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "Training loss",
        {"loss/box": "box", "loss/obj": "objectness", "loss/cls": "class", "loss/distill": "distillation"},
    ),
    ("Accuracy on the validation split", {"val/map50": "mAP50", "val/map50_95": "mAP50-95"}),
    ("Zeros in prunable weights", {"sparsity/prunable": "sparsity"}),
    ("Learning rate", {"lr": "learning rate"}),
)


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses, accuracy, sparsity and learning rate over the epochs, with the phases as shades.

    Args:
        history: one row for each epoch, at least one, with ``epoch`` (its end), ``phase``, and as far as
            known ``loss/box|obj|cls|distill``, ``val/map50``, ``val/map50_95``, ``sparsity/prunable`` (all
            0..1 but the losses) and ``lr``.
        path: PNG to write.
    """
    figure, grid = _figure(10.5, 6.6, rows=2, columns=2, sharex=True)
    spans = _phase_spans(history)
    for axes, (title, lines) in zip(grid.flat, _PANELS, strict=True):
        _shade_phases(axes, spans)
        _draw_lines(axes, history, lines)
        _title(axes, title)
        axes.set_xlim(spans[0][1], spans[-1][2])
    _format_curves(grid)
    tints = {name: tint for name, _, _, tint in spans}
    shades = [Patch(color=tint, label=_PHASE_NAMES.get(name, name)) for name, tint in tints.items()]
    figure.legend(handles=shades, loc="outside upper center", ncols=len(shades), frameon=False, title="Phase")
    _save(figure, path)


def _format_curves(grid: Any) -> None:
    """Set the limits, scales and legends of the four panels."""
    loss, accuracy, sparsity, rate = grid.flat
    for axes in (loss, accuracy):
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    sparsity.set_ylim(0, 1.03)
    sparsity.yaxis.set_major_formatter(PercentFormatter(1.0))
    if rate.lines:
        rate.set_yscale("log")
    for axes in (sparsity, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


Span = tuple[str, float, float, str]


def _phase_spans(history: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Name, start, end (epochs) and colour of each run of rows with the same phase."""
    spans: list[Span] = []
    start = max(0.0, float(history[0]["epoch"]) - 1.0)
    tints: dict[str, str] = {}
    for row in history:
        name, end = str(row.get("phase", "")), float(row["epoch"])
        tint = tints.setdefault(name, _PHASE_TINTS[len(tints) % len(_PHASE_TINTS)])
        if spans and spans[-1][0] == name:
            start = spans.pop()[1]
        spans.append((name, start, end, tint))
        start = end
    return spans


def _shade_phases(axes: Axes, spans: list[Span]) -> None:
    for _, start, end, tint in spans:
        axes.axvspan(start, end, color=tint, zorder=0, linewidth=0)
    for _, start, _, _ in spans[1:]:
        axes.axvline(start, color=INK, linewidth=0.8, linestyle=":", zorder=1)


def _draw_lines(axes: Axes, history: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> None:
    for (key, label), colour in zip(lines.items(), _CYCLE, strict=False):
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, label=label, marker="o", markersize=3, linewidth=1.6)


def precision_recall(
    curves: Mapping[str, tuple[NDArray[Any], NDArray[Any], float]],
    path: Path,
) -> None:
    """Draw precision over recall at IoU 0.5, a curve for each label.

    Args:
        curves: for each label the recall ``(n,)``, rising, the precision ``(n,)``, and the AP, all 0..1.
        path: PNG to write.
    """
    figure, axes = _figure(6.4, 5.4)
    for index, (label, (recall, precision, ap)) in enumerate(curves.items()):
        # Curves of one model cover each other. So the first is wide, and the others are drawn on it.
        colour, style, width = _CURVES[index % len(_CURVES)]
        text = f"{label} (AP {ap:.3f})"
        axes.plot(recall, precision, color=colour, linestyle=style, linewidth=width, label=text)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower left")
    _title(axes, "Precision and recall, IoU 0.5")
    _save(figure, path)


LayerRow = tuple[str, float, int, int | None]


def confusion_matrix(
    counts: Sequence[Sequence[int]], names: Sequence[str], path: Path, *, conf: float
) -> None:
    """Draw which classes objects are taken for, each row as shares of its objects.

    Args:
        counts: ``(K + 1, K + 1)``: row: class of the object, column: that of the detection; the last row
            counts detections of no object, the last column objects that were not found.
        names: of the K classes.
        path: PNG to write.
        conf: confidence from which detections count, 0..1.
    """
    table = np.asarray(counts, float)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(_WIDEST, 3.2 + 0.42 * len(table))
    figure, axes = _figure(side, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    shown = [in_picture(_wrapped(name, 18)) for name in names]
    ticks = range(len(table))
    axes.set_xticks(ticks, [*shown, "not found"], rotation=90, fontsize=8)
    axes.set_yticks(ticks, [*shown, "no object"], fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    for row, column in zip(*np.nonzero(table), strict=True):
        colour = "white" if shares[row, column] > 0.6 else INK
        text = _count(table[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    _title(axes, f"from confidence {conf:.2f} on; colour: share of the row")
    _save(figure, path)


def layer_sparsity(layers: Sequence[LayerRow], path: Path, target: float = 0.75) -> None:
    """Draw a bar for each layer's share of zeros, and on a second axis its share of the work.

    Args:
        layers: name, sparsity (0..1), number of weights and of multiplications (None: not known) of each
            layer, in the model's order; at least one.
        path: PNG to write.
        target: sparsity of all prunable layers together, 0..1; marked by a line.
    """
    columns = 1 + (len(layers) > 30) + (len(layers) > 70)
    per_column = math.ceil(len(layers) / columns)
    figure, grid = _figure(
        0.6 + 4.7 * columns, max(2.2, 1.3 + 0.19 * per_column), columns=columns, squeeze=False
    )
    work = sum(macs or 0 for *_, macs in layers)
    for index, axes in enumerate(grid.flat):
        here = layers[index * per_column : (index + 1) * per_column]
        _layer_bars(axes, here, target, per_column)
        if work:
            _layer_work(axes, here, work, max(macs or 0 for *_, macs in layers) / work)
    total = sum(weights for _, _, weights, _ in layers)
    zeros = sum(sparsity * weights for _, sparsity, weights, _ in layers)
    title = f"{zeros / max(total, 1):.1%} of {_count(total)} weights are zero"
    if work:
        met = sum(sparsity * (macs or 0) for _, sparsity, _, macs in layers)
        title += f", and {met / work:.1%} of {_count(work)} multiplications meet one"
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    handles: list[Any] = [
        Patch(color=BLUE, label="at least as sparse as all together"),
        Patch(color=SKY, label="less sparse"),
        Line2D(
            [], [], color=INK, linestyle="--", linewidth=1, label=f"prunable layers together: {target:.1%}"
        ),
        *([Line2D([], [], **_WORK_LINE, label="share of all multiplications, upper axis")] if work else []),
    ]
    side_by_side = 2 if columns > 1 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=side_by_side, frameon=False, fontsize=8)
    _save(figure, path)


def _layer_bars(axes: Axes, layers: Sequence[LayerRow], target: float, rows: int) -> None:
    values = [sparsity for _, sparsity, *_ in layers]
    # Pruning rounds to whole weights: a layer may miss the target by up to half a percent.
    colours = [BLUE if value >= target - 0.005 else SKY for value in values]
    axes.barh(range(len(layers)), values, color=colours, height=0.74)
    for row, (_, sparsity, weights, _) in enumerate(layers):
        axes.text(1.02, row, f"{sparsity:.1%} of {_count(weights)}", va="center", fontsize=6, color=INK)
    axes.axvline(target, color=INK, linestyle="--", linewidth=1)
    names = [name.removeprefix("model.").removesuffix(".weight") for name, *_ in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=6.5)
    axes.set(xlim=(0, 1.0), ylim=(rows - 0.4, -0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(visible=False, axis="y")


def _layer_work(axes: Axes, layers: Sequence[LayerRow], total: int, largest: float) -> None:
    """Draw each layer's share of all multiplications on an axis of its own, which ends at the largest."""
    upper = axes.twiny()
    upper.plot([(macs or 0) / total for *_, macs in layers], range(len(layers)), **_WORK_LINE)
    upper.set_xlim(0, 1.05 * largest)
    upper.xaxis.set_major_locator(MaxNLocator(4))
    upper.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    upper.spines[["right", "bottom"]].set_visible(False)
    upper.spines["top"].set_color(ORANGE)
    upper.tick_params(axis="x", color=ORANGE, labelcolor=INK, labelsize=7)


def size_bars(sizes: Mapping[str, float], path: Path) -> None:
    """Draw a bar for the size of each file.

    Args:
        sizes: megabytes (1e6 bytes) under each label.
        path: PNG to write.
    """
    figure, axes = _figure(7.4, 1.1 + 0.42 * len(sizes))
    colours = [GREY if "dense" in label.lower() else BLUE for label in sizes]
    bars = axes.barh(list(sizes), list(sizes.values()), color=colours, height=0.64)
    largest = max(sizes.values(), default=0.0)
    labels = []
    for size in sizes.values():
        smaller = f"  ({largest / size:.1f}x smaller)" if size and largest / size >= 1.05 else ""
        labels.append(f"{size:.1f} MB{smaller}")
    axes.bar_label(bars, labels, padding=4, fontsize=8.5, color=INK)
    axes.set(xlabel="MB (1e6 bytes); in brackets: against the largest", xlim=(0, (largest or 1.0) * 1.28))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _title(axes, "Size on disk")
    _save(figure, path)


def throughput_bars(rows: Sequence[Row], path: Path) -> None:
    """Draw the items per second of each engine: a bar for each variant, a panel for each load.

    Args:
        rows: of the benchmark, at least one, with ``engine``, ``variant``, ``batch`` and ``items_per_s``.
            Optional are ``key``, ``scenario``, ``noisy`` (hatched), and ``each``, whose smallest and largest
            are drawn as an error bar.
        path: PNG to write.
    """
    panels, engines, variants = _by_load(rows), _distinct(rows, "engine"), _variants(rows)
    width = 1.4 + 0.5 * len(engines) * len(variants)
    columns = max(1, min(len(panels), int(_WIDEST / width)))
    lines = math.ceil(len(panels) / columns)
    figure, grid = _figure(
        max(6.4, columns * width), 0.6 + 3.8 * lines, rows=lines, columns=columns, squeeze=False
    )
    for axes, (title, here) in _panels(grid, panels):
        for index, variant in enumerate(variants):
            found = {row["engine"]: row for row in here if row["variant"] == variant}
            _throughput_group(axes, [found.get(engine) for engine in engines], variants, index)
        axes.set_xticks(range(len(engines)), engines)
        axes.margins(y=0.14)
        axes.grid(visible=False, axis="x")
        _title(axes, title)
    for axes in grid[:, 0]:
        axes.set_ylabel("items per second")
    _variant_legend(figure, variants, noisy=any(row.get("noisy") for row in rows))
    _save(figure, path)


def _by_load(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each load, under its description. Only rows of one load can be compared."""
    panels: dict[str, list[Row]] = {}
    several = len({row.get("cores") for row in rows}) > 1
    for row in sorted(rows, key=lambda row: (row.get("scenario") or "sync") != "sync"):
        cores = f", {row['cores']} cores" if several else ""
        panels.setdefault(f"{load_text(row)}{cores}", []).append(row)
    return panels


def _panels(grid: Any, panels: Mapping[str, list[Row]]) -> Iterator[tuple[Axes, tuple[str, list[Row]]]]:
    """Pair each panel with its axes, and hide the axes that are left over."""
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    yield from zip(grid.flat, panels.items(), strict=False)


def _distinct(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))


def _variants(rows: Sequence[Row]) -> list[str]:
    order = {variant: place for place, variant in enumerate(VARIANTS)}
    return sorted(_distinct(rows, "variant"), key=lambda variant: order.get(variant, len(order)))


def _variant_colour(variant: str) -> str:
    return _VARIANT_COLOURS.get(variant, PURPLE)


def _variant_legend(figure: Figure, variants: Sequence[str], *, noisy: bool) -> None:
    handles = [Patch(color=_variant_colour(variant), label=variant) for variant in variants]
    if noisy:
        handles.append(Patch(facecolor="white", edgecolor=INK, hatch="//", label="noisy"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _throughput_group(axes: Axes, rows: Sequence[Row | None], variants: Sequence[str], index: int) -> None:
    bar_width = 0.84 / len(variants)
    for engine, row in enumerate(rows):
        if row is None:
            continue
        x = engine + (index - (len(variants) - 1) / 2) * bar_width
        value = float(row["items_per_s"])
        each = [*row.get("each", ()), value]
        axes.bar(
            x, value, bar_width * 0.94, color=_variant_colour(variants[index]), capsize=2,
            yerr=[[value - min(each)], [max(each) - value]], error_kw={"elinewidth": 1},
            hatch="//" if row.get("noisy") else None, edgecolor="white", linewidth=0,
        )  # fmt: skip
        axes.annotate(
            _three_digits(value), (x, max(each)), (0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=8 if len(variants) < 3 else 6, color=INK,
        )  # fmt: skip


def latencies(rows: Sequence[Row], path: Path) -> None:
    """Draw how long inferences take: a panel for each load, a line from p25 to p99.9 for each cell.

    Args:
        rows: of the benchmark, at least one, with all percentiles.
        path: PNG to write.
    """
    panels, variants = _by_load(rows), _variants(rows)
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    most = max(len(here) for here in panels.values())
    figure, grid = _figure(
        2.0 + 4.6 * columns, 1.2 + lines * (1.0 + 0.3 * most), rows=lines, columns=columns, squeeze=False
    )
    for axes, (title, here) in _panels(grid, panels):
        for place, row in enumerate(here):
            _latency_line(axes, place, row)
        axes.set_yticks(range(len(here)), [f"{row['engine']} {row['variant']}" for row in here], fontsize=7)
        axes.set(xlabel="ms", ylim=(len(here) - 0.4, -0.6))
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        _title(axes, title)
    handles = [
        Line2D([], [], color=INK, linewidth=5, label="p25 to p75"),
        Line2D([], [], color=INK, marker="o", linewidth=0, markerfacecolor="white", label="median"),
        Line2D([], [], color=INK, linewidth=1.4, marker="|", label="p90, p95, p99, p99.9"),
        *(Patch(color=_variant_colour(variant), label=variant) for variant in variants),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


def _latency_line(axes: Axes, place: int, row: Row) -> None:
    colour = _variant_colour(str(row["variant"]))
    known = [float(row[name]) for name in PERCENTILES if row.get(name) is not None]
    p25, p50, *higher = known  # of few inferences the higher ones are not known
    tail = higher[1:]
    axes.plot([p25, known[-1]], [place, place], color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.plot(tail, [place] * len(tail), color=colour, linewidth=0, marker="|", markersize=6)
    axes.plot(
        [p25, higher[0] if higher else p50], [place, place], color=colour, linewidth=5, solid_capstyle="butt"
    )
    axes.plot(p50, place, color=INK, marker="o", markersize=4, markerfacecolor="white")


def accuracy_and_speed(rows: Sequence[Row], path: Path) -> None:
    """Draw each file's mAP50 over its items per second: a panel for each load, a marker for each engine.

    Engines that may not be used in production are hollow. The axis of mAP50 spans at least 0.05, so that
    noise does not look like a difference. A dashed line stands at the fastest dense network in fp32, a thin
    one through each marker from the first to the third quartile of its turns.

    Args:
        rows: of the benchmark, at least one, all with ``map50`` (0..1).
        path: PNG to write.
    """
    panels, engines, variants = _by_load(rows), _distinct(rows, "engine"), _variants(rows)
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure, grid = _figure(
        max(6.4, 1.0 + 4.2 * columns), 0.9 + 3.6 * lines, rows=lines, columns=columns, squeeze=False
    )
    for axes, (title, here) in _panels(grid, panels):
        baseline = fastest(row for row in here if row["variant"] == "dense")
        if baseline is not None:
            axes.axvline(baseline["items_per_s"], color=GREY, linestyle="--", linewidth=1.2, zorder=0)
        for row in here:
            colour, shipped = _variant_colour(row["variant"]), may_be_shipped(row["engine"])
            axes.hlines(
                row["map50"], *np.percentile([*speeds_of(row).values()], (25, 75)), color=colour, linewidth=1
            )
            axes.scatter(
                row["items_per_s"], row["map50"], s=64, facecolor=colour if shipped else "white",
                edgecolors=INK if shipped else colour, linewidths=0.6 if shipped else 2.0, zorder=3,
                marker=_MARKERS[engines.index(row["engine"]) % len(_MARKERS)],
            )  # fmt: skip
        axes.set_xlim(0, 1.08 * max(row["items_per_s"] for row in here))
        axes.set(xlabel="items per second", ylabel="mAP50")
        low, high = min(row["map50"] for row in here), max(row["map50"] for row in here)
        room = max(0.2 * (high - low), (_LEAST_ACCURACY - high + low) / 2)
        axes.set_ylim(low - room, high + room)
        _title(axes, title)
    handles: list[Any] = [Patch(color=_variant_colour(variant), label=variant) for variant in variants]
    handles += [
        Line2D(
            [], [], color=INK, linewidth=0, marker=marker,
            fillstyle="full" if may_be_shipped(engine) else "none",
            label=engine if may_be_shipped(engine) else f"{engine} (not for production)",
        )
        for engine, marker in zip(engines, _MARKERS, strict=False)
    ]  # fmt: skip
    if any(row["variant"] == "dense" for row in rows):
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="fastest dense fp32"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


Tile = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def detection_sheet(
    rows: Sequence[Tile], names: Sequence[str], path: Path, conf: float = 0.25, title: str = "Detections"
) -> None:
    """Draw images with their labelled boxes and the detections.

    Args:
        rows: for each image its pixels, uint8 ``(3, H, W)`` RGB; the labelled boxes ``(n, 4)``, xyxy in
            pixels; and the detections ``(D, 6)``: xyxy in pixels, confidence 0..1, class index.
        names: of the classes; written at the detections where there are several.
        path: PNG to write.
        conf: lowest confidence that is drawn.
        title: of the sheet.
    """
    columns = max(1, min(4, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    figure, grid = _figure(3.3 * columns, 3.3 * lines + 0.7, rows=lines, columns=columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, rows, strict=False):
        _draw_tile(axes, row, names, conf)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    handles = [
        Line2D([], [], color=SKY, linestyle="--", linewidth=1.8, label="ground truth"),
        Line2D([], [], color=ORANGE, linewidth=1.8, label=f"detection, confidence from {conf:g}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _draw_tile(axes: Axes, row: Tile, names: Sequence[str], conf: float) -> None:
    image, truth, detections = row
    height, width = image.shape[1:]
    axes.imshow(np.transpose(image, (1, 2, 0)), interpolation="lanczos")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for detection in sorted(detections, key=lambda found: float(found[4])):
        if detection[4] >= conf:
            _draw_box(axes, detection[:4], color=ORANGE, linewidth=1.5)
            _draw_label(axes, detection, names)
    for box in truth:
        _draw_box(axes, box, color=SKY, linewidth=1.3, linestyle=(0, (4, 2)))


def _draw_box(axes: Axes, box: NDArray[Any], **style: Any) -> None:
    x1, y1, x2, y2 = (float(value) for value in box)
    outline = [withStroke(linewidth=style["linewidth"] + 1.2, foreground="#00000090")]
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, path_effects=outline, **style))


def _draw_label(axes: Axes, detection: NDArray[Any], names: Sequence[str]) -> None:
    text = f"{float(detection[4]):.2f}"
    if len(names) > 1:
        text = f"{in_picture(names[int(detection[5])])} {text}"
    outline = [withStroke(linewidth=1.6, foreground="black")]
    x, y = max(0.0, float(detection[0])) + 2, max(0.0, float(detection[1])) + 2
    axes.text(x, y, text, color="white", fontsize=5.5, va="top", path_effects=outline, clip_on=True)


_LISTED = 16  # runs of a front whose names stand beside the picture


def trade_off(points: Sequence[Point], x: Axis, y: Axis, path: Path, what: str = "runs") -> None:
    """Draw runs by two metrics, with the Pareto front and the edge of the region that it beats.

    Args:
        points: at least one.
        x: horizontal axis.
        y: vertical axis.
        path: PNG to write.
        what: the points are.
    """
    front = sorted((point for point in points if point.front), key=lambda point: point.x)
    figure, axes = _figure(9.6, 5.4)
    hollow = {"facecolors": "none"}
    kinds: dict[str, tuple[bool, bool, dict[str, Any]]] = {  # whether dense, whether hollow, its style
        f"other {what}": (False, False, {"s": 26, "color": GREY}),
        "dense": (True, False, {"s": 40, "color": ORANGE, "marker": "D"}),
        "may not be shipped": (False, True, {"s": 34, "edgecolors": GREY, **hollow}),
        "dense, may not be shipped": (True, True, {"s": 40, "edgecolors": ORANGE, "marker": "D", **hollow}),
    }
    for number, (label, (*kind, style)) in enumerate(kinds.items()):
        of_kind = [point for point in points if [point.dense, point.hollow] == kind]
        shown = [point for point in of_kind if point.dense or not point.front]
        if shown or number == 0:
            axes.scatter(
                [point.x for point in shown], [point.y for point in shown], label=label, zorder=3, **style
            )
    _draw_front(axes, front, x)
    for best in (point for point in points if point.best):
        axes.scatter(
            best.x, best.y, s=210, facecolors="none", edgecolors=ORANGE, linewidths=2.2, label="best"
        )
    axes.set(xlabel=x.label, ylabel=y.label)
    axes.margins(0.08)
    _title(axes, f"{len(front)} of {len(points)} {what} are on the Pareto front")
    handles, labels = axes.get_legend_handles_labels()
    named = [f"{point.number}  {_wrapped(point.name)}" for point in front[:_LISTED]]
    more = [f"and {len(front) - _LISTED} more"] if len(front) > _LISTED else []
    figure.legend(
        [*handles, *(Line2D([], [], linestyle="none") for _ in [*named, *more])],
        [*labels, *named, *more],
        loc="outside right upper", frameon=False, fontsize=8, handlelength=1.2,
    )  # fmt: skip
    _save(figure, path)


def _draw_front(axes: Axes, front: Sequence[Point], x: Axis) -> None:
    corners = staircase([(point.x, point.y) for point in front], x_less=x.less)
    axes.plot(*zip(*corners, strict=True), color=BLUE, linewidth=1.2, alpha=0.55)
    axes.scatter(
        [point.x for point in front], [point.y for point in front], s=46, color=BLUE, label="Pareto front"
    )
    for point in front[:_LISTED]:
        axes.annotate(
            str(point.number), (point.x, point.y), (5, 5), textcoords="offset points", fontsize=8, color=INK
        )


def _wrapped(text: str, width: int = 34) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Make a figure of ``width`` by ``height`` inches and its axes, in the style of all pictures."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, **options)
    for axes in np.ravel(np.asarray(grid)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, labelcolor=INK, labelsize=8.5)
        axes.xaxis.label.set(size=9, color=INK)
        axes.yaxis.label.set(size=9, color=INK)
        axes.grid(color="#E3E3E3", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, grid


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, fontweight="bold", color=INK, loc="left")


def _count(number: float) -> str:
    """A number of weights with three digits: 4.56G, 1.23M, 45.6k, 789."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _three_digits(number: float) -> str:
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def _save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        if r"\mathdefault" not in text.get_text():  # but that of Matplotlib's own ticks, no text is a formula
            text.set_parse_math(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    with landing(path) as temporary:
        temporary.write_bytes(picture.getvalue())
