import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sparse_exp.benchmark.measurements import PERCENTILES
from sparse_exp.config.schema import ENGINES, VARIANTS
from sparse_exp.report import plots

HISTORY = [
    {
        "epoch": 1.0,
        "phase": "pruned",
        "loss/box": 0.1,
        "val/map50": 0.2,
        "sparsity/prunable": 0.75,
        "lr": 1e-3,
    },
    {"epoch": 2.0, "phase": "pruned", "loss/box": 0.08, "loss/obj": 0.2, "sparsity/prunable": 0.75},
    {"epoch": 3.0, "phase": "pruned_quant", "val/map50": 0.3, "val/map50_95": 0.1, "lr": 1e-5},
]
CURVE = (np.linspace(0, 0.8, 50), np.linspace(1, 0.5, 50), 0.61)
IMAGE = np.full((3, 64, 96), 128, np.uint8)
BOXES = np.array([[4.0, 4.0, 40.0, 40.0]])
NO_BOXES = np.zeros((0, 4))
FOUND = np.array([[5.0, 5.0, 41.0, 41.0, 0.9, 0.0], [50.0, 10.0, 90.0, 60.0, 0.1, 1.0]])
THROUGHPUT = [
    {"engine": "deepsparse", "variant": "dense", "batch": 1, "items_per_s": 13.0, "each": [12.5, 13.2]},
    {
        "engine": "deepsparse",
        "variant": "sparse",
        "batch": 1,
        "items_per_s": 39.8,
        "each": [38.0, 39.8, 41.0],
    },
    {"engine": "openvino", "variant": "dense", "batch": 16, "items_per_s": 17.7},
]
SQUARE = [
    {
        "engine": engine, "variant": variant, "batch": 16 if key == "b16" else 1, "key": key, "streams": 2,
        "noisy": engine == "torch",
        "scenario": "async" if key == "b1_async2" else "sync", "map50": 0.5 + 0.01 * i, "cores": 2,
        "items_per_s": 20.0 + 5 * i, **{name: 40.0 + 9 * place for place, name in enumerate(PERCENTILES)},
    }
    for key in ("b1", "b1_async2", "b16")
    for i, variant in enumerate(VARIANTS)
    for engine in ENGINES
]  # fmt: skip
DRAWINGS = {
    "curves": lambda path: plots.training_curves(HISTORY, path),
    "one epoch": lambda path: plots.training_curves([{"epoch": 0.5, "phase": "dense"}], path),
    "precision-recall": lambda path: plots.precision_recall({"torch": CURVE, "deepsparse": CURVE}, path),
    "layers": lambda path: plots.layer_sparsity(
        [(f"model.{i}.conv", 0.75, 1000, 10**6 * (104 - i)) for i in range(104)], path
    ),
    "one layer": lambda path: plots.layer_sparsity([("model.24.m.0", 0.0, 0, None)], path),
    "sizes": lambda path: plots.size_bars({"dense ONNX": 28.2, "sparse ONNX": 7.6, "nothing": 0.0}, path),
    "throughput": lambda path: plots.throughput_bars(THROUGHPUT, path),
    "square": lambda path: plots.throughput_bars(SQUARE, path),
    "latencies": lambda path: plots.latencies(SQUARE, path),
    "accuracy": lambda path: plots.accuracy_and_speed(SQUARE, path),
    "detections": lambda path: plots.detection_sheet(
        [(IMAGE, BOXES, FOUND), (IMAGE, NO_BOXES, FOUND[:0])] * 3, ["tree", "car"], path
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_picture_is_a_png_of_sane_size_with_something_on_it(name, tmp_path):
    path = tmp_path / "plots" / "ü.png"
    DRAWINGS[name](path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert all(200 <= side <= 4000 for side in picture.size)
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels != 255).any(axis=2).mean() > 0.01
    assert (pixels[[0, -1]] == 255).all()  # a margin all around
    assert (pixels[:, [0, -1]] == 255).all()
    assert [p.name for p in path.parent.iterdir()] == ["ü.png"]


def figure_of(draw, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    draw(None)
    [figure] = figures
    return figure


def drawn_ticks(axes):
    x_limits, y_limits = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    for axis, place, limits in ((axes.xaxis, 0, x_limits), (axes.yaxis, 1, y_limits)):
        labels = axis.get_ticklabels() if axis.get_visible() else []
        yield from (t for t in labels if limits[0] <= t.get_position()[place] <= limits[1])


@pytest.mark.parametrize(
    "name", ["curves", "precision-recall", "layers", "sizes", "throughput", "square", "latencies", "accuracy"]
)
def test_no_texts_overlap(name, monkeypatch):
    figure = figure_of(DRAWINGS[name], monkeypatch)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    labels = [axes.xaxis.label for axes in figure.axes] + [axes.yaxis.label for axes in figure.axes]
    ticks = [t for axes in figure.axes for t in drawn_ticks(axes)]
    texts = [t for a in figure.axes for t in a.texts] + titles + labels + ticks
    boxes = [t.get_window_extent(renderer) for t in texts if t.get_text() and t.get_visible()]
    assert len(boxes) > 10
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.7).overlaps(b)]


def test_phases_are_shaded_from_where_the_one_before_ended():
    spans = [(name, start, end) for name, start, end, _ in plots._phase_spans(HISTORY)]
    assert spans == [("pruned", 0.0, 2.0), ("pruned_quant", 2.0, 3.0)]


def test_curves_show_the_given_numbers_and_skip_missing_ones(monkeypatch):
    figure = figure_of(DRAWINGS["curves"], monkeypatch)
    accuracy = {line.get_label(): line for line in figure.axes[1].lines}
    assert accuracy["mAP50"].get_xydata().tolist() == [[1.0, 0.2], [3.0, 0.3]]
    assert accuracy["mAP50-95"].get_xydata().tolist() == [[3.0, 0.1]]


def test_bars_are_as_long_as_the_numbers_and_errors_reach_from_low_to_high(monkeypatch):
    axes = figure_of(DRAWINGS["throughput"], monkeypatch).axes
    assert [patch.get_height() for patch in axes[0].patches] == [13.0, 39.8]
    segments = [c.get_segments()[0][:, 1].tolist() for c in axes[0].collections]
    assert np.allclose(segments, [[12.5, 13.2], [38.0, 41.0]])
    assert [text.get_text() for text in axes[0].texts] == ["13.0", "39.8"]
    assert [patch.get_height() for patch in axes[1].patches] == [17.7]


@pytest.mark.parametrize(("accuracies", "least"), [((0.600, 0.605), 0.05), ((0.4, 0.7), 0.3)])
def test_accuracies_that_are_nearly_equal_are_drawn_near_each_other(accuracies, least, monkeypatch):
    rows = [{**row, "map50": accuracy} for row, accuracy in zip(SQUARE, accuracies, strict=False)]
    (axes,) = figure_of(lambda path: plots.accuracy_and_speed(rows, path), monkeypatch).axes
    low, high = axes.get_ylim()
    assert least - 1e-9 <= high - low <= 1.5 * least
    assert low < min(accuracies) < max(accuracies) < high


def test_layers_are_marked_by_the_target_and_weighed_by_their_size(monkeypatch):
    layers = [("model.0.conv.weight", 0.0, 100, 3000), ("model.1.conv.weight", 0.7499, 300, 1000)]
    figure = figure_of(lambda path: plots.layer_sparsity(layers, path), monkeypatch)
    axes, work = figure.axes
    from matplotlib.colors import to_hex

    colours = [to_hex(patch.get_facecolor()).upper() for patch in axes.patches]
    assert colours == [plots.SKY, plots.BLUE]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.conv", "1.conv"]
    assert figure.get_suptitle() == "56.2% of 400 weights are zero, and 18.7% of 4k multiplications meet one"
    assert work.lines[0].get_xydata().tolist() == [[0.75, 0.0], [0.25, 1.0]]
    assert work.get_xlim()[1] > 0.75
    earlier = [(*layer[:3], None) for layer in layers]  # a run that did not count them
    figure = figure_of(lambda path: plots.layer_sparsity(earlier, path), monkeypatch)
    assert (len(figure.axes), figure.get_suptitle()) == (1, "56.2% of 400 weights are zero")


def test_detections_below_the_threshold_are_not_drawn(monkeypatch):
    figure = figure_of(
        lambda path: plots.detection_sheet([(IMAGE, BOXES, FOUND)], ["tree"], path), monkeypatch
    )
    [axes] = figure.axes
    boxes = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
    assert boxes == [((5.0, 5.0), 36.0, 36.0), ((4.0, 4.0), 36.0, 36.0)]
    assert [patch.get_linestyle() == "solid" for patch in axes.patches] == [True, False]
    assert [text.get_text() for text in axes.texts] == ["0.90"]


def test_a_failure_leaves_the_old_picture_and_nothing_half_written(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "size.png"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        plots.size_bars({"a": 1.0}, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_never_loaded(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sparse_exp.report import plots;"
        "plots.size_bars({'a': 1.0}, Path(sys.argv[1]));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=False).returncode == 0
