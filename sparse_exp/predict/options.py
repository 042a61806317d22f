"""The command-line options that ``predict`` and ``serve`` have in common."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_exp.command import checked, share, whole
from sparse_exp.config.places import add_place_options
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.runs.metadata import CONF, IOU

_SETTINGS = ("batch_size", "cores", "streams", "conf", "iou", "max_det")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the positional ``model``, ``--engine`` and ``--zoo``: the arguments of `find_model`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, stub, directory or file, see below")
    add("--engine", help="deepsparse, onnxruntime, openvino or torch (default: the first that can run here)")
    add_place_options(parser, "zoo")


def add_detector_options(parser: argparse.ArgumentParser, *, streams: str) -> None:
    """Add the options of the detector, which `detector_settings` then returns.

    Args:
        parser: of the command.
        streams: how the command finds the number of streams where ``--streams`` is not given, in words.
    """
    add = parser.add_argument_group("detector").add_argument
    add("--conf", type=share, default=CONF, help="lowest confidence, 0..1 (%(default)s)")
    add("--iou", type=share, default=IOU, help="overlap at which the weaker box goes, 0..1 (%(default)s)")
    add("--max-det", metavar="N", type=whole, default=300, help="detections of an image (%(default)s)")
    images = "images of one inference (%(default)s)"
    add("--batch", metavar="N", dest="batch_size", type=whole, default=1, help=images)
    at_once = f"inferences at once, which share the cores (default: {streams})"
    add("--streams", metavar="N", type=whole, help=at_once)
    add("--cores", metavar="N", type=_cores, help="physical cores for the engine (default: all)")


def detector_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_detector_options` as arguments of `sparse_exp.predict.detector.Detector`."""
    return {name: getattr(options, name) for name in _SETTINGS}


def _cores(text: str) -> int:
    """A type of `argparse`: a number of physical cores that this host has."""
    usable = usable_physical_cores()
    checked(text, whole(text) <= usable, f"at most the {usable} of this host")
    return int(text)
