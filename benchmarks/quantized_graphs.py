"""Compare the quantized files of one network, each in its engine, with the dense one and with older files.

The network is pruned in one shot and quantized by calibration. Its weights are the published start weights
where they are in the cache, else random; the speed hardly depends on them. What counts is CPU time of one
thread, in turns, which other work on the machine hardly changes.

    python benchmarks/quantized_graphs.py --size s --imgsz 320 --sparsity 0.75
    python benchmarks/quantized_graphs.py --compare openvino=OLD.qdq.onnx deepsparse=OLD.onnx

A file to compare with is one of a network of the same size, image size and sparsity, such as another version
exported. Engines that are not installed are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from blocks import digit_images, start_network
from numpy.typing import NDArray

from sparse_exp.command import Parser, number, run_command, whole
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import ConfigError, MissingDependency, expected
from sparse_exp.export.exporter import export_deployment
from sparse_exp.export.onnx import FileForm
from sparse_exp.export.verification import predict
from sparse_exp.files import write_json
from sparse_exp.hardware import host_facts
from sparse_exp.quantization.reference import as_deployed
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.runs.deployment import Deployment
from sparse_exp.sparsity.prune import prune_by_magnitude

ENGINES = ("onnxruntime", "openvino", "deepsparse")
_OPSET, _WARMUP_S, _TURN_S = 13, 2.0, 1.0


@dataclass
class Cell:
    """A file in an engine.

    Attributes:
        engine: its name.
        what: which file it is.
        file: ONNX.
        milliseconds: CPU time of an image, in each turn.
        off: mean difference of its scores to the quantized network in torch, 0..1.
    """

    engine: str
    what: str
    file: Path
    milliseconds: list[float] = field(default_factory=list)
    off: float = 0.0

    @property
    def name(self) -> str:
        """Engine and file."""
        return f"{self.engine}, {self.what}"


def main() -> int:
    """Build, measure and print two tables."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        images = digit_images(Path(scratch), options.imgsz)
        reference = build(options, images, Path(scratch))
        deployment = Deployment(Path(scratch))
        cells = [
            Cell(engine, what, file)
            for engine in ENGINES
            for what, file in (("dense fp32", deployment.dense), ("quantized", deployment.deployed(engine)))
        ]
        cells += [Cell(engine, f"compared: {file.name}", file) for engine, file in options.compare]
        cells = measure(cells, images, reference, options.turns)
    facts = host_facts()
    print(f"\n{facts.cpu}, {' '.join(facts.isa)}; CPU ms of one thread and image, {options.turns} turns\n")
    print(table(cells))
    if options.json:
        rows = [
            {"cell": cell.name, "cpu_ms": cell.milliseconds, "score_difference": cell.off} for cell in cells
        ]
        write_json(options.json, {"conditions": asdict(facts), "rows": rows})
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="s", choices=list("nsmlx"), help="of YOLOv5")
    parser.add_argument("--imgsz", type=whole, default=320, help="side of the images, px, a multiple of 32")
    parser.add_argument("--sparsity", type=_share, default=0.75, help="share of zeros in each layer")
    parser.add_argument("--compare", nargs="+", type=_named, default=[], metavar="ENGINE=FILE")
    parser.add_argument("--turns", type=whole, default=9, help="of about a second for each file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the measurements here")
    return parser.parse_args()


def _share(text: str) -> float:
    return number(text, lambda value: 0 <= value < 1, "a share of at least 0 and below 1")


def _named(text: str) -> tuple[str, Path]:
    engine, _, file = text.partition("=")
    if engine not in ENGINES or not Path(file).is_file():
        wanted = f"one of {', '.join(ENGINES)}, and a file"
        raise ConfigError(expected("--compare ENGINE=FILE", wanted, text, "Correct it."))
    return engine, Path(file)


def build(options: argparse.Namespace, images: NDArray[np.uint8], folder: Path) -> NDArray[np.float32]:
    """Export the files of all engines; returns what the quantized network predicts of the images in torch."""
    dense = start_network(options.size).eval()
    model = start_network(options.size).eval()
    prune_by_magnitude(model.prunable_convolutions(), options.sparsity)
    recipe = Recipe.from_file(CONF_DIRECTORY / "recipe" / "quant.md")
    recipe.apply_at_once(model, [torch.from_numpy(images).float() / 255])
    export_deployment(model, folder, FileForm(options.imgsz, _OPSET), dense=dense, images=[images])
    predictions: NDArray[np.float32] = predict(as_deployed(model), torch.from_numpy(images)).numpy()
    return predictions


def measure(
    cells: Sequence[Cell], images: NDArray[np.uint8], reference: NDArray[np.float32], turns: int
) -> list[Cell]:
    """Measure in turns; returns those cells whose engine is installed."""
    with ExitStack() as stack:
        running = []
        for cell in cells:
            engine = stack.enter_context(closing(IsolatedEngine(cell.engine)))
            try:
                engine.load(cell.file, batch_size=1, cores=1)
            except MissingDependency as error:
                print(error)
                continue
            predictions = engine.run(images)[0]
            if predictions.shape == reference.shape:
                cell.off = float(np.abs(predictions - reference)[..., 4:].mean())
            engine.measure(images, _WARMUP_S)
            running.append((cell, engine))
        for _ in range(turns):
            for cell, engine in running:
                cell.milliseconds.append(cpu_milliseconds(engine, images))
    return [cell for cell, _ in running]


def cpu_milliseconds(engine: IsolatedEngine, images: NDArray[np.uint8]) -> float:
    """CPU time of an image: that of the engine's process, over about a second."""
    process = psutil.Process(engine.pid)
    before = process.cpu_times()
    timing = engine.measure(images, _TURN_S)
    after = process.cpu_times()
    return 1e3 * (after.user + after.system - before.user - before.system) / len(timing.latencies)


def table(cells: Sequence[Cell]) -> str:
    """Markdown: of each file its time, and how many times as fast it is as others in its engine."""
    lines = [
        "| file | CPU ms: median (least) | x dense fp32 | x quantized | scores off by |",
        "|---|---:|---:|---:|---:|",
    ]
    named: Mapping[tuple[str, str], Cell] = {(cell.engine, cell.what): cell for cell in cells}
    for cell in cells:
        times = f"{statistics.median(cell.milliseconds):.1f} ({min(cell.milliseconds):.1f})"
        ratios = [_ratio(named[cell.engine, what], cell) for what in ("dense fp32", "quantized")]
        lines.append(f"| {cell.name} | {times} | {' | '.join(ratios)} | {cell.off:.5f} |")
    return "\n".join(lines)


def _ratio(first: Cell, second: Cell) -> str:
    """How many times as fast the second is, the median over the turns."""
    pairs = zip(first.milliseconds, second.milliseconds, strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


if __name__ == "__main__":
    run_command(main)
