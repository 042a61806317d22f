r"""Hold images of 16:9 at a rectangle against the same images at a square: speed and accuracy in each engine.

A detector of symbols, as a run of `recovery.py` on the set of `symbols.py` trains it, is evaluated on symbols
on pictures of 640 x 360 px, exported at both sizes. Each engine runs its own file. What counts is CPU time of
one thread, in turns, which other work on the machine hardly changes.

    python benchmarks/rectangles.py outputs/recovery-symbols/transfer_quant-0/weights/best_pruned_quant.pt
    python benchmarks/rectangles.py outputs/recovery-symbols/transfer_quant-0/weights/best_pruned.pt \
        --engines mnn --out outputs/rectangles-fp32          # MNN runs no quantized ONNX
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from quantized_graphs import cpu_milliseconds
from series import make_run
from symbols import render

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.imgsz import Imgsz, in_words, sides
from sparse_exp.engines import IsolatedEngine
from sparse_exp.errors import StageFailed
from sparse_exp.files import read_json
from sparse_exp.hardware import host_facts
from sparse_exp.runs.deployment import Deployment

PICTURES, SIZES = (360, 640), (640, (384, 640))
_STAGES = "fetch,plan,evaluate,export,verify"
_WARMUP_S = 2.0


def main() -> int:
    """Make both runs unless they are there, measure, and print a table."""
    options = _options()
    data = render(options.out / "wide", train=10, val=options.images, imgsz=PICTURES)
    runs = [options.out / f"at-{in_words(imgsz).strip('[]').replace(',', '-')}" for imgsz in SIZES]
    for run, imgsz in zip(runs, SIZES, strict=True):
        words = [
            *(f"checkpoint={options.checkpoint.absolute()}", f"stages=[{_STAGES}]", "tracker=none"),
            *("dataset=custom", f"dataset.path={data.absolute()}", f"dataset.imgsz={in_words(imgsz)}"),
            *("hardware.variants=[sparse]", f"hardware.engines=[{','.join(options.engines)}]"),
        ]
        if not (run / "result.json").is_file() and make_run(run, words):
            raise StageFailed(f"{run} failed. Look at the log beside it, then start again.")
    results = [read_json(run / "result.json") for run in runs]
    print(f"\n{host_facts().cpu}; CPU ms of one thread and image, {options.turns} turns\n")
    titles = [f"{what}, {in_words(imgsz)}" for what in ("CPU ms", "mAP50") for imgsz in SIZES]
    print(f"| engine | {' | '.join(titles)} | x speed |")
    print("|---" * 6 + "|")
    for engine in options.engines:
        print(_row(engine, runs, results, options.turns))
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a detector of symbols")
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino", "deepsparse"])
    parser.add_argument("--images", type=whole, default=200, help="pictures to evaluate on")
    parser.add_argument("--turns", type=whole, default=9, help="of about a second for each file")
    parser.add_argument("--out", type=Path, default=Path("outputs/rectangles"), help="folder of set and runs")
    return parser.parse_args()


def _row(engine: str, runs: Sequence[Path], results: Sequence[dict[str, Any]], turns: int) -> str:
    times = _milliseconds(engine, runs, turns)
    accuracies = [result[f"deployed/{engine}/map50"] for result in results]
    cells = [*(f"{statistics.median(each):.1f}" for each in times), *(f"{each:.4f}" for each in accuracies)]
    speed = statistics.median(square / wide for square, wide in zip(*times, strict=True))
    return f"| {engine} | {' | '.join(cells)} | {speed:.2f} |"


def _milliseconds(engine: str, runs: Sequence[Path], turns: int) -> list[list[float]]:
    """CPU time of an image at each size, turn by turn."""
    with ExitStack() as stack:
        running = []
        for run, imgsz in zip(runs, SIZES, strict=True):
            images = _pixels(imgsz)
            loaded = stack.enter_context(closing(IsolatedEngine(engine)))
            loaded.load(Deployment(run / "deployment").file(engine, "sparse"), batch_size=1, cores=1)
            loaded.measure(images, _WARMUP_S)
            running.append((loaded, images, list[float]()))
        for _ in range(turns):
            for loaded, images, milliseconds in running:
                milliseconds.append(cpu_milliseconds(loaded, images))
    return [milliseconds for _, _, milliseconds in running]


def _pixels(imgsz: Imgsz) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (1, 3, *sides(imgsz)), np.uint8)


if __name__ == "__main__":
    run_command(main)
