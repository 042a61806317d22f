"""Compare the speed of ``python -m sparse_exp.predict`` on a folder of images with that of the bare engine.

The folder holds different JPEGs of the model's size, put together from tiles of the data set trees; they are
the same for any MODEL. *Bare* is the engine with the same file, batch, streams and cores in a process of its
own, fed from memory. *End to end* is the command as users run it, with annotated pictures and without, from
its first file to its last picture on disk; loading the model does not count. All are measured in turns, so
that a drift of the machine affects them alike.

    python benchmarks/predict.py MODEL                        # 1,000 images
    python benchmarks/predict.py RUN --imgsz 640              # the run's checkpoint, exported anew at 640 px
    python benchmarks/predict.py MODEL --streams 1 2 --batch 1 8 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.command import Parser, amount, run_command, whole
from sparse_exp.config.schema import DatasetConfig, SourceConfig
from sparse_exp.data import prepare
from sparse_exp.data.images import IMAGE_SUFFIXES, read_square
from sparse_exp.engines import IsolatedEngine
from sparse_exp.export.exporter import export_deployment
from sparse_exp.export.onnx import FileForm
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.predict.__main__ import default_streams
from sparse_exp.predict.models import Model, find_model
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.sources.cache import cache_directory

_WHEEL = SourceConfig(
    uri="index:deepforest==2.1.0", sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
_VARIANTS = {"no pictures": ["--no-pictures"], "pictures": []}
_QUALITY = 90  # of the JPEGs, as cameras write them
_BARE_IMAGES = 32  # images that the bare engine gets again and again


def main() -> int:
    """Measure every setting and print a table."""
    options = _options()
    print(f"CPU busy with other work before: {psutil.cpu_percent(1.0):.0f} %")
    with tempfile.TemporaryDirectory() as scratch, measuring_alone(default_lock_path()):
        model = find_model(options.model, engine=options.engine)
        if options.imgsz not in (None, model.imgsz):
            model = _exported(options.model, model, options.imgsz, Path(scratch) / "deployment")
        folder = Path(scratch) / "images"
        size = make_images(folder, options.images, model.imgsz)
        facts = host_facts()
        print(
            f"{facts.cpu}, {options.cores} of {facts.physical_cores} cores; {model.engine}, {model.path.name}"
        )
        print(f"{options.images} JPEGs of {model.imgsz} px, {size / 1e3:.0f} KB each on average; ", end="")
        print(f"medians of {options.rounds} rounds in turns (smallest to largest)\n")
        print("| batch | streams | bare items/s | | end to end items/s | share of bare |")
        print("|---|---|---|---|---|---|", flush=True)
        for batch in options.batch:
            for streams in options.streams:
                print(_measure(model, folder, batch, streams, options), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="as of python -m sparse_exp.predict")
    add("--engine", help="default: the run's first")
    add("--imgsz", type=whole, help="export the run's checkpoint anew at this size, px")
    add("--images", type=whole, default=1000)
    add("--cores", type=whole, default=usable_physical_cores())
    add("--batch", type=whole, nargs="+", default=[1])
    add("--streams", type=whole, nargs="+", default=[default_streams(None)])
    add("--rounds", type=whole, default=3)
    add("--seconds", type=amount, default=10.0, help="of each measurement of the bare engine")
    return parser.parse_args()


def _exported(name: str, model: Model, imgsz: int, folder: Path) -> Model:
    """Export the model's checkpoint for images of another size."""
    network, _ = restore(find_model(name, engine="torch").path)
    export_deployment(network, folder, FileForm(imgsz, opset=13))
    return replace(find_model(str(folder), engine=model.engine), names=model.names)


def make_images(folder: Path, count: int, side: int) -> float:
    """Write JPEGs, each of four random tiles of the data set trees, turned at random.

    Args:
        folder: made here.
        count: how many images.
        side: of the images, px.

    Returns:
        Their mean size in bytes.
    """
    dataset = prepare(DatasetConfig("trees", generator="trees", sources=[_WHEEL]), cache_directory())
    samples = [sample.image for split in dataset.splits.values() for sample in split]
    half, random = -(-side // 2), np.random.default_rng(0)
    tiles = [np.asarray(Image.open(path).convert("RGB").resize((half, half))) for path in samples]
    folder.mkdir(parents=True)
    for number in range(count):
        four = [np.rot90(tiles[i], random.integers(4)) for i in random.integers(len(tiles), size=4)]
        square = np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])[:side, :side]
        Image.fromarray(square).save(folder / f"{number:05}.jpg", quality=_QUALITY)
    return statistics.mean(path.stat().st_size for path in folder.iterdir())


def _measure(model: Model, folder: Path, batch: int, streams: int, options: argparse.Namespace) -> str:
    """Measure one setting; returns its rows of the table."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in IMAGE_SUFFIXES)[:_BARE_IMAGES]
    images = np.stack([read_square(path, model.imgsz)[0].transpose(2, 0, 1) for path in paths])
    bare: list[float] = []
    end_to_end: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    for _ in range(options.rounds):
        bare.append(_bare(model, images, batch, streams, options))
        for variant, words in _VARIANTS.items():
            end_to_end[variant].append(_end_to_end(model, folder, batch, streams, words, options))
    rows = []
    for variant, speeds in end_to_end.items():
        share = statistics.median(speeds) / statistics.median(bare)
        row = [batch, streams, _with_spread(bare), variant, _with_spread(speeds), f"{share:.1%}"]
        rows.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(rows)


def _bare(
    model: Model, images: NDArray[np.uint8], batch: int, streams: int, options: argparse.Namespace
) -> float:
    with closing(IsolatedEngine(model.engine)) as engine:
        engine.load(model.path, batch_size=batch, cores=options.cores, streams=streams)
        timing = engine.measure(images, options.seconds, warmup=1.0, max_warmup=10.0, streams=streams)
    return len(timing.latencies) * batch / timing.wall


def _end_to_end(
    model: Model, folder: Path, batch: int, streams: int, words: Sequence[str], options: argparse.Namespace
) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "sparse_exp.predict", str(model.path), str(folder), "--out", out,
            "--engine", model.engine, "--batch", str(batch), "--streams", str(streams),
            "--cores", str(options.cores), *words,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        record = json.loads((Path(out) / "predictions.json").read_text(encoding="utf-8"))
    return len(record["images"]) / float(record["seconds"])


def _with_spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    run_command(main)
