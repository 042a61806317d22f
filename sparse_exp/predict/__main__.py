"""``python -m sparse_exp.predict``: detect objects in images and videos."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_exp.command import Parser, run_command
from sparse_exp.config.imgsz import STRIDE, Imgsz, in_words, parse_imgsz, plain, sides
from sparse_exp.config.places import Places, chosen_places
from sparse_exp.data.detection import Listing, list_dataset
from sparse_exp.errors import ConfigError, DataError, SparseExpError, expected
from sparse_exp.files import expanded
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.predict.media import Media, find_media
from sparse_exp.predict.models import Model, find_model
from sparse_exp.predict.options import add_detector_options, add_model_options, detector_settings
from sparse_exp.predict.outputs import (
    LINES,
    Results,
    alone,
    check_formats,
    new_directory,
    require_replaceable,
)
from sparse_exp.predict.video import opencv

if TYPE_CHECKING:  # it imports the engines
    from sparse_exp.predict.detector import Detector

_log = logging.getLogger(__name__)
_MOST_STREAMS = 8
_SETTINGS = ("conf", "iou", "max_det", "multi_label", "batch_size", "cores", "streams")
_TEXT = """
MODEL is a run's directory, the end of its path below outputs or its MLflow id, a stub of the local zoo, a
directory with model.onnx, an ONNX file that this project exported, or for --engine torch a checkpoint.

  python -m sparse_exp.predict outputs/runs/DATE/TIME-NAME photo.jpg
  python -m sparse_exp.predict zoo:yolov5-s-trees-pruned75_quant photos 'more/**/*.png' clip.mp4
  python -m sparse_exp.predict model.onnx val --data trees.yaml --conf 0.001 --iou 0.6 --no-pictures
"""


def main() -> int:
    """Predict, write the outputs, print where they are."""
    options = _options()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    data = list_dataset(expanded(options.data)) if options.data else None
    places = chosen_places(options)
    model = _find_model(options, data, places)
    media = find_media(options.sources, data)
    if media.videos:
        opencv()  # where it is missing, that is said before the model is loaded
    formats = check_formats(options.formats)
    if not formats and not options.pictures:
        raise ConfigError("Nothing would be written. Leave out --no-pictures, or name --formats.")
    out = options.out and expanded(options.out)
    sources = [*media.images, *media.videos]
    require_replaceable(out, overwrite=options.overwrite, sources=sources)
    with closing(_load(options, model, media)) as detector, alone(out):
        folder = new_directory(out, places.output, overwrite=options.overwrite, sources=sources)
        try:
            results = _predict(options, detector, media, folder)
            _write(results, formats, data)
        finally:
            with suppress(OSError):  # of a directory that holds files
                folder.rmdir()
    return _print_summary(results, folder)


def _find_model(options: argparse.Namespace, data: Listing | None, places: Places) -> Model:
    """The model at the size of ``--imgsz``, with the class names of ``--data``."""
    model = find_model(options.model, engine=options.engine, places=places)
    model = _at_size(model, options.imgsz or model.imgsz)
    if data is None:
        return model
    if model.names and len(model.names) != len(data.names):
        do = "Give the data set that it was trained on."
        what = f"the classes of {options.data}"
        raise ConfigError(expected(what, f"the {len(model.names)} of the model", len(data.names), do))
    if model.names and model.names != data.names:
        _log.warning("The classes of %s are named otherwise than those of the model.", options.data)
    return replace(model, names=data.names)


def _at_size(model: Model, imgsz: Imgsz) -> Model:
    """The model for images of a size: torch takes any size, an exported model only its own."""
    if imgsz == model.imgsz:
        return model
    if model.engine == "torch" and not any(side % STRIDE for side in sides(imgsz)):
        return replace(model, imgsz=imgsz)
    if model.engine == "torch":
        raise ConfigError(expected("--imgsz", f"a multiple of {STRIDE}", plain(imgsz), "Change it."))
    words = f"dataset.imgsz={in_words(imgsz)} stages=[export] checkpoint=PATH"
    do = f"Leave it out, or export at that size: {words}."
    own = f"{in_words(model.imgsz)}, which {model.path} was exported for"
    raise ConfigError(expected("--imgsz", own, plain(imgsz), do))


def _load(options: argparse.Namespace, model: Model, media: Media) -> Detector:
    from sparse_exp.predict.detector import Detector, prepare_process
    from sparse_exp.predict.tuned import tuned

    prepare_process()
    settings = detector_settings(options)
    if settings["streams"] is None:
        many = len(media.images) > 1 or bool(media.videos)
        settings["streams"] = default_streams(options.cores) if many else 1
    return Detector(model, **tuned(model, settings), multi_label=options.multi_label)


def _predict(options: argparse.Namespace, detector: Detector, media: Media, folder: Path) -> Results:
    """Predict on all files. After an error or Ctrl-C the results so far are returned."""
    from sparse_exp.predict.predictor import Predictor

    results = Results(detector, {name: getattr(detector, name) for name in _SETTINGS}, folder)
    predictor = Predictor(detector, folder, options.pictures, results, threads=detector.cores)
    started = time.monotonic()
    try:
        predictor.run(media)
    except (KeyboardInterrupt, SparseExpError) as error:
        results.ended_by = error
    results.seconds = time.monotonic() - started
    return results


def default_streams(cores: int | None) -> int:
    """Streams for many images: the largest number up to 8 that divides the number of cores.

    The threads that decode and draw run on the same cores. With one stream for each core, a stream that waits
    for its core holds up this one only.

    Args:
        cores: physical cores; None: all that this process may use.
    """
    usable = cores or usable_physical_cores()
    return max(number for number in range(1, _MOST_STREAMS + 1) if usable % number == 0)


def _write(results: Results, formats: tuple[str, ...], data: Listing | None) -> None:
    try:
        results.write(formats, data)
    except OSError as error:
        do = f"Free or allow the space. What was found is in {LINES}, where that is."
        raise DataError(f"Cannot write into {results.folder}: {error.strerror or error}. {do}") from error


def _print_summary(results: Results, folder: Path) -> int:
    """Print counts and the directory; returns the exit code.

    Raises:
        BaseException: what ended the prediction early.
        DataError: some images cannot be used.
    """
    images, skipped, seconds = results.images, results.skipped, results.seconds
    classes = ", ".join(f"{count} {name}" for name, count in results.classes.most_common(10))
    print(f"{images} images in {seconds:.1f} s: {results.classes.total()} detections", end="")
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
        description="Detect objects in images and videos: annotated copies, JSON, CSV and COCO results.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("sources", metavar="SOURCE", nargs="+", help="image, video, folder, pattern; with --data a split")
    add("--out", metavar="DIR", type=Path, help="where to write (default: outputs/predict/1, 2, ...)")
    add("--overwrite", action="store_true", help="replace an earlier prediction in --out")
    add("--no-pictures", dest="pictures", action="store_false", help="no annotated pictures and videos")
    add(
        "--formats",
        default="json,csv,coco",
        help="of predictions, jsonl too (%(default)s); none: pictures alone",
    )
    add("--data", metavar="YAML", type=Path, help="data set: its class names, splits, and labels for COCO")
    add(
        "--imgsz",
        metavar="PX",
        type=parse_imgsz,
        help="640, or 384,640 (height, width); of an exported model: refuse another size; of torch: the size "
        "to take",
    )
    several = "a box may have several classes, as when mAP is measured"
    add("--multi-label", action="store_true", help=several)
    add_detector_options(parser, streams="one for each core, at most 8")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
