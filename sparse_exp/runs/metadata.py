"""What an exported file says of itself: its classes, its image size. Reading needs no torch.

It stands in the ONNX file's ``metadata_props`` under the names that Ultralytics' exports use: ``names``
(here a JSON list), ``imgsz`` and ``stride`` in pixels, ``task``. OpenVINO carries such entries on into its
own format, as ``rt_info/framework`` of the ``.xml``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TASK, STRIDE = "detect", 32


def describe(names: Sequence[str], imgsz: int) -> dict[str, str]:
    """The entries of a detector's file.

    Args:
        names: of the classes; empty where they are not known, and left out then.
        imgsz: side of the images in pixels.
    """
    texts = {"imgsz": str(imgsz), "task": TASK, "stride": str(STRIDE)}
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
        As far as they are there and well formed: ``names`` (a tuple of texts), ``imgsz`` and ``stride``
        (in pixels), ``task``. Empty for files of other exporters, and for what cannot be read: that is
        the engine's to report.
    """
    texts = _of_xml(path) if path.suffix == ".xml" else _of_onnx(path)
    found: dict[str, Any] = {"task": texts["task"]} if "task" in texts else {}
    found |= {key: int(texts[key]) for key in ("imgsz", "stride") if texts.get(key, "").isdecimal()}
    names = _names(texts.get("names", ""))
    return found | ({"names": names} if names else {})


def _of_onnx(path: Path) -> dict[str, str]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError):
        return {}
    return {item.key: item.value for item in model.metadata_props}


def _of_xml(path: Path) -> dict[str, str]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return {}
    entries = root.find("rt_info/framework")
    return {} if entries is None else {item.tag: item.get("value", "") for item in entries}


def _names(text: str) -> tuple[str, ...]:
    """Class names of a JSON list; others (Ultralytics writes a Python dict) are not ours to guess."""
    try:
        names = json.loads(text or "null")
    except ValueError:
        return ()
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if good else ()
