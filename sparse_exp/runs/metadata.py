"""What an exported file says of itself: classes, image size, where it comes from. Reading needs no torch.

It stands in the ONNX file's ``metadata_props``, in part under the names that Ultralytics' exports use.
OpenVINO carries such entries on into its own format, as ``rt_info/framework`` of the ``.xml``.

=====================  ==========================================================================
entry                  what it says
=====================  ==========================================================================
``names``              the classes, a JSON list
``imgsz``              of the images in pixels: the side of squares, or ``[height, width]``
``stride``             largest stride of the network, in pixels
``task``               ``detect``
``conf``, ``iou``      thresholds of detections that are shown: the least confidence, and the overlap
                       at which the weaker of two boxes goes, 0..1
``version``            of this program
``run``                name of the run, and of its directory
``recipe``             that it was trained with; not of a dense network
``checkpoint_sha256``  of the checkpoint that it was exported from; not of initial weights
``sparsity``           share of zeros in its prunable convolutions, 0..1
``licence``            what is owed for its weights and data; empty where nothing is known
=====================  ==========================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sparse_exp.config.imgsz import STRIDE, Imgsz, imgsz_of
from sparse_exp.files import parse_json

TASK = "detect"
CONF, IOU = 0.25, 0.45
"""Least confidence and overlap with which a detector is used, unless others are given."""
_WHOLE, _SHARES = ("stride",), ("conf", "iou", "sparsity")
_PIXELS = re.compile("[0-9]{1,9}")
_TEXTS = ("task", "version", "run", "recipe", "checkpoint_sha256", "licence")


def describe(names: Sequence[str], imgsz: Imgsz, facts: Mapping[str, object]) -> dict[str, str]:
    """The entries of a detector's file.

    Args:
        names: of the classes; empty where they are not known, and left out then.
        imgsz: size of the images.
        facts: further entries, of those that this module's table names.
    """
    known = {"imgsz": json.dumps(imgsz), "task": TASK, "stride": STRIDE, "conf": CONF, "iou": IOU, **facts}
    texts = {key: str(value) for key, value in known.items()}
    return texts | ({"names": json.dumps(list(names))} if names else {})


def write_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Set entries of an ONNX file, in place; others stay."""
    import onnx

    model = onnx.load(str(path))
    texts = {**{item.key: item.value for item in model.metadata_props}, **entries}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, str(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself.

    Args:
        path: an ONNX file, or the ``.xml`` of OpenVINO's format.

    Returns:
        The entries as far as they are there and well formed: ``names`` a tuple of texts, ``imgsz`` as
        `sparse_exp.config.imgsz.Imgsz`, ``stride`` int, shares float. Empty for files of other exporters, and
        for what cannot be read: that is the engine's to report.
    """
    texts = _of_xml(path) if path.suffix == ".xml" else _of_onnx(path)
    found: dict[str, Any] = {key: texts[key] for key in _TEXTS if key in texts}
    found |= {key: int(texts[key]) for key in _WHOLE if _PIXELS.fullmatch(texts.get(key, ""))}
    found |= {key: float(texts[key]) for key in _SHARES if _is_share(texts.get(key, ""))}
    found |= {"imgsz": size} if (size := _imgsz(texts.get("imgsz", ""))) else {}
    names = _names(texts.get("names", ""))
    return found | ({"names": names} if names else {})


def _of_onnx(path: Path) -> dict[str, str]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
        return {item.key: item.value for item in model.metadata_props}
    except (OSError, DecodeError, UnicodeDecodeError):
        return {}


def _of_xml(path: Path) -> dict[str, str]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError):  # the last two of unknown encodings
        return {}
    entries = root.find("rt_info/framework")
    return {} if entries is None else {item.tag: item.get("value", "") for item in entries}


def _names(text: str) -> tuple[str, ...]:
    """Class names of a JSON list; others (Ultralytics writes a Python dict) are not ours to guess."""
    try:
        names = parse_json(text or "null")
    except ValueError:
        return ()
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if good else ()


def _imgsz(text: str) -> Imgsz | None:
    try:
        return imgsz_of(parse_json(text or "null"))
    except ValueError:
        return None


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
