"""``python -m sparse_exp.predict``: what a model sees in images and videos."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_exp.command import Parser, run_command
from sparse_exp.errors import ConfigError, DataError, SparseExpError, expected
from sparse_exp.predict.options import add_detector_options, add_model_options, detector_settings

if TYPE_CHECKING:
    from sparse_exp.data.detection import Listing
    from sparse_exp.predict.detector import Detector
    from sparse_exp.predict.models import Model
    from sparse_exp.predict.outputs import Results
    from sparse_exp.predict.sources import Sources

_log = logging.getLogger(__name__)
_MOST_STREAMS = 8
_STRIDE = 32  # px
_TEXT = """
MODEL is a run's directory, the end of its path below outputs or its MLflow id, a stub of the local zoo, a
directory with model.onnx, an ONNX file that this project exported, or for --engine torch a checkpoint.

  python -m sparse_exp.predict outputs/runs/DATE/TIME-NAME photo.jpg
  python -m sparse_exp.predict zoo:yolov5-s-trees-pruned75_quant photos 'more/**/*.png' clip.mp4
  python -m sparse_exp.predict model.onnx val --data trees.yaml --conf 0.001 --iou 0.6 --no-pictures
"""


def main() -> int:
    """Predict, write what was found, and say where."""
    options = _options()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    data, model, sources = _asked_for(options)
    from sparse_exp.predict.outputs import check_formats, new_directory, require_replaceable

    formats = check_formats(options.formats)
    if not formats and not options.pictures:
        raise ConfigError("Nothing would be written. Leave out --no-pictures, or name --formats.")
    out = options.out and options.out.expanduser()
    files = [*sources.images, *sources.videos]
    require_replaceable(out, overwrite=options.overwrite, sources=files)
    with closing(_load(options, model, sources)) as detector:
        folder = new_directory(out, overwrite=options.overwrite, sources=files)
        try:
            results = _predict(options, detector, sources, folder)
            _write(results, folder, formats, data)
        finally:
            with suppress(OSError):  # it holds something
                folder.rmdir()
    return _say(results, folder)


def _asked_for(options: argparse.Namespace) -> tuple[Listing | None, Model, Sources]:
    from sparse_exp.data.detection import list_dataset
    from sparse_exp.predict.models import find_model
    from sparse_exp.predict.sources import find_sources

    data = list_dataset(options.data.expanduser()) if options.data else None
    model = find_model(options.model, engine=options.engine, zoo=options.zoo)
    model = _of_size(model, options.imgsz)
    if data is not None:
        if model.names and len(model.names) != len(data.names):
            do = "Give the data set that it was trained on."
            what = f"the classes of {options.data}"
            raise ConfigError(expected(what, f"the {len(model.names)} of the model", len(data.names), do))
        if model.names and model.names != data.names:
            _log.warning("The classes of %s are named otherwise than those of the model.", options.data)
        model = replace(model, names=data.names)
    return data, model, find_sources(options.sources, data)


def _of_size(model: Model, imgsz: int | None) -> Model:
    """The model for images of a size: torch takes any, an exported one its own."""
    if imgsz in (None, model.imgsz):
        return model
    assert imgsz is not None
    if model.engine == "torch" and imgsz > 0 and imgsz % _STRIDE == 0:
        return replace(model, imgsz=imgsz)
    if model.engine == "torch":
        raise ConfigError(expected("--imgsz", f"a multiple of {_STRIDE}", imgsz, "Change it."))
    do = "Leave it out, or export at that size: dataset.imgsz=N stages=[export] checkpoint=PATH."
    raise ConfigError(expected("--imgsz", f"{model.imgsz}, which {model.path} was exported for", imgsz, do))


def _load(options: argparse.Namespace, model: Model, sources: Sources) -> Detector:
    from sparse_exp.predict.detector import Detector, make_room

    make_room()
    settings = detector_settings(options)
    if settings["streams"] is None:
        many = len(sources.images) > 1 or bool(sources.videos)
        settings["streams"] = default_streams(options.cores) if many else 1
    return Detector(model, **settings, multi_label=options.multi_label)


def _predict(options: argparse.Namespace, detector: Detector, sources: Sources, folder: Path) -> Results:
    """What was found; where it ended early, so far."""
    from sparse_exp.predict.outputs import Results
    from sparse_exp.predict.run import Prediction

    results = Results(detector, _settings(detector))
    prediction = Prediction(detector, folder, options.pictures, results, threads=detector.cores)
    started = time.monotonic()
    try:
        prediction.run(sources)
    except (KeyboardInterrupt, SparseExpError) as error:
        results.ended_by = error
    results.seconds = time.monotonic() - started
    return results


def default_streams(cores: int | None) -> int:
    """Inferences at once for many images: one for each core, up to 8; where there are more, some share one.

    What decodes and draws takes turns with them on the same cores, and one stream that waits for its turn
    holds up one core, not all.

    Args:
        cores: physical cores; None: all that this process may use.
    """
    from sparse_exp.hardware import usable_physical_cores

    usable = cores or usable_physical_cores()
    return max(number for number in range(1, _MOST_STREAMS + 1) if usable % number == 0)


def _settings(detector: Detector) -> dict[str, Any]:
    names = ("conf", "iou", "max_det", "multi_label", "batch_size", "cores", "streams")
    return {name: getattr(detector, name) for name in names}


def _write(results: Results, folder: Path, formats: tuple[str, ...], data: Listing | None) -> None:
    try:
        results.write(folder, formats, data)
    except OSError as error:
        do = "Free or allow the space, or choose another directory with --out."
        raise DataError(f"Cannot write into {folder}: {error.strerror or error}. {do}") from error


def _say(results: Results, folder: Path) -> int:
    images, skipped, seconds = len(results.images), results.skipped, results.seconds
    counts = Counter(found["class"] for image in results.images for found in image["detections"])
    classes = ", ".join(f"{count} {name}" for name, count in counts.most_common(10))
    print(f"{images} images in {seconds:.1f} s: {results.detections} detections", end="")
    print(f" ({classes})" if classes else "")
    if results.ended_by is not None:
        what = "Interrupted" if isinstance(results.ended_by, KeyboardInterrupt) else "Incomplete"
        print(f"{what}: {folder} holds what was complete.")
        raise results.ended_by
    print(f"Written: {folder}")
    if skipped:
        first = f"The first: {skipped[0]['reason']}"
        raise DataError(f"{len(skipped)} of {images + len(skipped)} images cannot be used. {first}")
    return 0


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m sparse_exp.predict",
        description="What a model sees in images and videos: annotated copies, JSON, CSV and COCO results.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("sources", metavar="SOURCE", nargs="+", help="image, video, folder, pattern; with --data a split")
    add("--out", metavar="DIR", type=Path, help="where to write (default: outputs/predict/1, 2, ...)")
    add("--overwrite", action="store_true", help="replace an earlier prediction in --out")
    add("--no-pictures", dest="pictures", action="store_false", help="no annotated pictures and videos")
    add("--formats", default="json,csv,coco", help="of predictions (%(default)s); none: pictures alone")
    add("--data", metavar="YAML", type=Path, help="data set: its class names, splits, and labels for COCO")
    add(
        "--imgsz",
        metavar="PX",
        type=int,
        help="of an exported model: refuse another size; of torch: the size to take",
    )
    several = "a box may have several classes, as when mAP is measured"
    add("--multi-label", action="store_true", help=several)
    add_detector_options(parser, streams=None)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
