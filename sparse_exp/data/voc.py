"""Annotation files of Pascal VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/htmldoc/."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass


@dataclass(frozen=True)
class VocObject:
    """An object of an image.

    Attributes:
        name: of its class; empty where the file does not say.
        box: x1, y1, x2, y2 as they stand in the file, in pixels; NaN where an edge is missing. In Pascal VOC
            itself pixels count from 1, and the last one is inside.
        difficult: whether it is marked as difficult to recognize.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocAnnotation:
    """The annotation of one image.

    Attributes:
        file_name: of the image; empty where the file does not say.
        size: width and height of the image in pixels; 0 where the file does not say.
        objects: in the order of the file.
    """

    file_name: str
    size: tuple[float, float]
    objects: tuple[VocObject, ...]


def read_annotation(xml: bytes) -> VocAnnotation:
    """Read an annotation file.

    Args:
        xml: its content.

    Raises:
        ValueError: it is no XML, or a size or an edge is no number.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from error
    width, height = (float(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    objects = tuple(map(_object, root.iter("object")))
    return VocAnnotation(root.findtext("filename") or "", (width, height), objects)


def _object(item: ElementTree.Element) -> VocObject:
    edges = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{edge}", "nan")) for edge in edges)
    name = (item.findtext("name") or "").strip()
    return VocObject(name, (x1, y1, x2, y2), (item.findtext("difficult") or "").strip() == "1")
