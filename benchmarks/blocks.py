"""Compare the speed of zeros in blocks of four input channels with that of zeros anywhere, in DeepSparse.

For each sparsity the same detector is pruned in both patterns: layer-adaptively, as a run prunes its start,
and with the same share in every layer. It is then quantized by calibration and exported, and the files of
each pair are measured in turns. A pair of files can be given instead. The weights are the published start
weights where they are in the cache, else random. The speed of a pattern hardly depends on them.

    python benchmarks/blocks.py --size s --sparsity 0.75 0.85 --batches 1 32
    python benchmarks/blocks.py --files unstructured.onnx block4.onnx
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from sparse_exp.benchmark import Cell, Measurement, benchmark, loads_of
from sparse_exp.command import Parser, amount, number, run_command, whole
from sparse_exp.config.imgsz import STRIDE
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import HardwareConfig, ModelConfig, SourceConfig
from sparse_exp.data import digits, load_dataset
from sparse_exp.data.loader import make_loader
from sparse_exp.engines.signature import read_signature
from sparse_exp.errors import ConfigError, EngineError, expected
from sparse_exp.export.onnx import FileForm, export_integer, trace_quantized
from sparse_exp.files import write_json
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.start import cached_start
from sparse_exp.sparsity.measure import onnx_facts, overall
from sparse_exp.sparsity.prune import BLOCKS, prune_by_magnitude, prune_layer_adaptively
from sparse_exp.yolov5 import YOLOv5, read_checkpoint, transfer_weights

_COCO_CLASSES = 80
_OPSET = 13
_SEED = 0
_HARDWARE = HardwareConfig(name="blocks")
_PATTERNS = {name: BLOCKS[name] for name in ("unstructured", "block4")}

Prune = Callable[[Mapping[str, nn.Conv2d], float, int], None]
SHARES: dict[str, Prune] = {"layer-adaptive": prune_layer_adaptively, "uniform": prune_by_magnitude}


class Pair(NamedTuple):
    """Two files that differ only in the places of their zeros.

    Attributes:
        name: how both were pruned.
        unstructured: ONNX file with zeros anywhere.
        block4: ONNX file with zeros in blocks.
    """

    name: str
    unstructured: Path
    block4: Path


def main() -> int:
    """Build, measure and print a table."""
    options = _options()
    imgsz = _imgsz(options)
    with tempfile.TemporaryDirectory() as scratch:
        images = digit_images(Path(scratch), imgsz)
        given = [Pair("given", *options.files)] if options.files else None
        pairs = given or _build(options, images, Path(scratch))
        rows, conditions = _measure(pairs, images, options)
    print(_table(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in conditions.items()))
    if "vnni" not in conditions["isa"]:
        print("This CPU has no VNNI instructions, for which DeepSparse has its block kernels.")
    if options.json:
        write_json(options.json, {"conditions": conditions, "rows": rows})
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="s", choices=list("nsmlx"), help="of YOLOv5")
    parser.add_argument(
        "--imgsz", type=whole, default=640, help="side of the images, px; with --files that of the first"
    )
    parser.add_argument("--sparsity", nargs="+", type=_share, default=[0.75, 0.85], help="shares of zeros")
    parser.add_argument("--shares", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--batches", nargs="+", type=whole, default=[1, 32], help="batch sizes")
    parser.add_argument("--files", nargs=2, type=Path, metavar=("UNSTRUCTURED", "BLOCK4"), help="ONNX files")
    parser.add_argument("--repeats", type=whole, default=_HARDWARE.repeats, help="of each, in turns")
    parser.add_argument("--seconds", type=amount, default=_HARDWARE.duration_s, help="of one measurement")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the measurements here")
    return parser.parse_args()


def _share(text: str) -> float:
    return number(text, lambda value: 0 <= value < 1, "a share of at least 0 and below 1")


def _imgsz(options: argparse.Namespace) -> int:
    given = read_signature(options.files[0]).size if options.files else None
    size: int = given[0] if given else options.imgsz
    if size < STRIDE * 2 or size % STRIDE:
        raise ConfigError(expected("--imgsz", f"a multiple of {STRIDE} from 64 on", size, "Correct it."))
    return size


def digit_images(scratch: Path, imgsz: int) -> NDArray[np.uint8]:
    """Eight images of the digits: uint8 (8, 3, imgsz, imgsz)."""
    dataset = load_dataset(
        digits.materialize(scratch / "digits", imgsz=imgsz, train=1, val=8, test=1), "digits"
    )
    loader = make_loader(dataset.splits["val"], len(dataset.names), imgsz=imgsz, batch_size=8, train=False)
    images: NDArray[np.uint8] = next(iter(loader)).images.numpy()
    return images


def _build(options: argparse.Namespace, images: NDArray[np.uint8], folder: Path) -> list[Pair]:
    """Prune, quantize by calibration and export a pair for each sparsity and each way to share it out."""
    dense, pairs = start_network(options.size), []
    batches = [torch.from_numpy(images).float() / 255]
    recipe = CONF_DIRECTORY / "recipe" / "quant.md"
    for sparsity in options.sparsity:
        for share in options.shares:
            name = f"{share}, {100 * sparsity:g} %"
            files = [folder / f"{share}-{sparsity}-{pattern}.onnx" for pattern in _PATTERNS]
            for path, block in zip(files, _PATTERNS.values(), strict=True):
                model = copy.deepcopy(dense)
                SHARES[share](model.prunable_convolutions(), sparsity, block)
                Recipe.from_file(recipe).apply_at_once(model, batches)
                export_integer(trace_quantized(model, FileForm(images.shape[-1], _OPSET)), path)
            pairs.append(Pair(name, *files))
    return pairs


def start_network(size: str) -> YOLOv5:
    """The detector with its start weights if they are in the cache, else with random ones."""
    torch.manual_seed(_SEED)
    model = YOLOv5(size, _COCO_CLASSES)
    values = yaml.safe_load((CONF_DIRECTORY / "model" / f"yolov5{size}.yaml").read_text(encoding="utf-8"))
    sources = [SourceConfig(**source) for source in values["sources"]]
    wanted, cache = ModelConfig(name=values["name"], size=size, sources=sources), cache_directory(None)
    start = cached_start(wanted, cache, cache / "zoo")
    if start:
        transfer_weights(model, read_checkpoint(start.file.path))
    print(f"YOLOv5{size}, {start.name if start else 'random weights'}", flush=True)
    return model


def _measure(
    pairs: Sequence[Pair], images: NDArray[np.uint8], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure pair by pair, since each loaded model is a process and many at once would fill the memory.

    Returns:
        A row for each pair and batch size, and the conditions, which are the same for all.
    """
    hardware = HardwareConfig(
        name="blocks", batch_sizes=options.batches, repeats=options.repeats, duration_s=options.seconds
    )
    rows = []
    for pair in pairs:
        cells = [
            Cell("deepsparse", "sparse", getattr(pair, pattern), load, network=pattern)
            for load in loads_of(hardware, usable_physical_cores())
            for pattern in _PATTERNS
        ]
        measured = benchmark(cells, images, hardware=hardware)
        if failed := next((one.cell for one in measured if one.cell.impossible), None):
            raise EngineError(f"{failed.name} could not be measured: {failed.impossible}")
        zeros = [overall(onnx_facts(getattr(pair, pattern)).layers) for pattern in _PATTERNS]
        rows += [_row(pair.name, zeros, *measured[i : i + 2]) for i in range(0, len(measured), 2)]
    names = ("version", "cpu", "isa", "imgsz", "duration_s", "repeats", "before")
    return rows, {name: measured[0].conditions[name] for name in names}


def _row(name: str, zeros: Sequence[float], unstructured: Measurement, block4: Measurement) -> dict[str, Any]:
    return {
        "model": name,
        "batch": block4.cell.batch_size,
        "zeros": list(zeros),
        "unstructured": unstructured.each,
        "block4": block4.each,
        "ratio": float(np.median(block4.each) / np.median(unstructured.each)),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of items per second: the median, and in brackets smallest and largest repeat."""
    lines = [
        "",
        "| pruned | zeros in the files, % | batch | unstructured items/s | block4 items/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        zeros = " and ".join(f"{100 * share:.1f}" for share in row["zeros"])
        speeds = (_spread(row[pattern]) for pattern in _PATTERNS)
        lines.append(
            f"| {row['model']} | {zeros} | {row['batch']} | {' | '.join(speeds)} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def _spread(rates: Sequence[float]) -> str:
    return f"{np.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


if __name__ == "__main__":
    run_command(main)
