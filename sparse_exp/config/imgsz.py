"""The size of images, as ``dataset.imgsz`` and all records have it: a square's side, or height and width.

A square is one number everywhere, so that a record of it does not depend on how it was typed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_exp.command import checked

Imgsz = int | tuple[int, int]
"""Side of a square, or height and width of a rectangle that is no square, px."""
STRIDE = 32
"""Largest stride of a detector, px: sides of its images are multiples of it."""
_TEXT = re.compile(r"(\d+)|[\[(]?\s*(\d+)\s*,\s*(\d+)\s*[\])]?", re.ASCII)


class Sides(NamedTuple):
    """Height and width of an image, px."""

    height: int
    width: int


def sides(imgsz: Imgsz) -> Sides:
    """Height and width of images of a size."""
    return Sides(imgsz, imgsz) if isinstance(imgsz, int) else Sides(*imgsz)


def imgsz_of(value: object) -> Imgsz:
    """The size that a plain value means.

    >>> imgsz_of([384, 640]), imgsz_of([640, 640]), imgsz_of(640)
    ((384, 640), 640, 640)

    Args:
        value: a positive whole number, or a list or tuple of two: height and width.

    Raises:
        ValueError: it is something else.
    """
    pair: Sequence[object] = value if isinstance(value, list | tuple) else (value, value)
    numbers = [number for number in pair if type(number) is int and number > 0]
    if len(pair) != 2 or len(numbers) != 2:
        raise ValueError(f"{value!r} is no size of images")
    height, width = numbers
    return height if height == width else (height, width)


def parse_imgsz(text: str) -> Imgsz:
    """A type of `argparse`: a size as ``640``, ``384,640`` or ``[384,640]``, height first.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = _TEXT.fullmatch(text.strip())
    numbers = [int(number) for number in match.groups() if number] if match else []
    checked(text, bool(numbers) and min(numbers) > 0, "pixels as 640, or HEIGHT,WIDTH as 384,640")
    return imgsz_of(numbers * 2 if len(numbers) == 1 else numbers)


def plain(imgsz: Any) -> Any:
    """A size as files hold it: a number, or a list of height and width."""
    return list(imgsz) if isinstance(imgsz, tuple) else imgsz


def in_words(imgsz: object) -> str:
    """A size as one types it, and as texts show it: ``640``, or ``[384,640]``, height first."""
    return f"[{','.join(map(str, imgsz))}]" if isinstance(imgsz, list | tuple) else str(imgsz)
