"""Export a finished run again at another image size, with its dense baselines: files for `square.py`.

A run is trained and deployed at the size of its images, but published speeds are those of 640 px. The network
is fully convolutional, and its speed does not depend on its training. So its checkpoints can be exported at
any size.

    python benchmarks/square_files.py outputs/runs/2026-11-23/10-00-00-yolov5s --imgsz 640 --out files/s
    python benchmarks/square_files.py RUN --imgsz 384,640 --out files/wide
    python benchmarks/square_files.py RUN --dense DENSE_RUN --imgsz 640 --out files/s

The script writes `dense.onnx` (of DENSE_RUN, else with initial weights), with `--int8` each engine's
`dense.int8.*` (see `sparse_exp.runs.deployment`), `model.onnx`, and for a quantized run `model.qdq.onnx` and,
where it has zeros, `sparse.fp32.onnx`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.imgsz import parse_imgsz
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.errors import ConfigError, expected
from sparse_exp.export.exporter import export_dense_integer, export_deployment
from sparse_exp.export.networks import Network, initial_network, sparse_network
from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.export.post_training import quantize_onnxruntime, quantize_openvino
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.runs.deployment import DENSE, SPARSE_FP32, dense_int8
from sparse_exp.runs.directory import Run
from sparse_exp.sources.cache import cache_directory
from sparse_exp.training.oneshot import calibration_loader
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.zoo.publish import dataset_of, read_finished

OPSET = 13


def main() -> int:
    """Write the files."""
    options = _options()
    run, file = _read(options.run)
    model, checkpoint = restore(file)
    dense = restore(_read(options.dense)[1])[0] if options.dense else initial_network(model)
    images = _images(options, run) if options.int8 else []
    options.out.mkdir(parents=True, exist_ok=True)
    form = FileForm(options.imgsz, OPSET, checkpoint.names)
    export_deployment(model, options.out, form, dense=dense)
    sparse = sparse_network(model, run.before_quantization(file))
    if isinstance(sparse, Network):
        export_float(sparse.model, options.out / SPARSE_FP32, form)
    if options.int8:
        _write_int8(options.out, dense, images, form)
    for file in sorted(options.out.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}")
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument(
        "--dense", type=Path, metavar="RUN", help="run with the weights of the dense baselines"
    )
    parser.add_argument("--int8", action="store_true", help="quantize the dense baseline for each engine")
    parser.add_argument(
        "--imgsz", type=parse_imgsz, default=640, help="px, multiples of 32: 640, or 384,640 (height, width)"
    )
    parser.add_argument("--images", type=whole, default=32, help="to calibrate with")
    parser.add_argument("--out", type=Path, required=True, help="directory")
    return parser.parse_args()


def _read(path: Path) -> tuple[Run, Path]:
    """A finished run, and the checkpoint that it trained."""
    run = read_finished(path)
    if run.trained_checkpoint is None:
        raise ConfigError(expected("the run", "one that trained", str(path), "Give another."))
    return run, run.trained_checkpoint


def _write_int8(out: Path, dense: YOLOv5, images: list[NDArray[np.uint8]], form: FileForm) -> None:
    export_dense_integer(dense, out / dense_int8("deepsparse"), images, form)
    quantize_onnxruntime(out / DENSE, out / dense_int8("onnxruntime"), images, form.entries)
    quantize_openvino(out / DENSE, out / dense_int8("openvino"), images)


def _images(options: argparse.Namespace, run: Run) -> list[NDArray[np.uint8]]:
    """Batches of the run's own training images, at the size of ``--imgsz``."""
    dataset, batch = dataset_of(run, cache_directory(None)), TrainerConfig().val_batch_size
    if dataset is None:
        raise ConfigError("The run's data set is gone, and nothing else can calibrate. Leave out --int8.")
    loader = calibration_loader(dataset, options.images, imgsz=options.imgsz, batch_size=batch, seed=0)
    return [loaded.images.contiguous().numpy() for loaded in loader]


if __name__ == "__main__":
    run_command(main)
