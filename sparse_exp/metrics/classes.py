"""Accuracies by class as plain data and as metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sparse_exp.metrics.detection import ClassAccuracies

CLASSES = "classes.json"  # of a run: accuracies by class of each file
PREFIX = "class/"
NUMBERS = ("map50", "map50_95", "precision", "recall", "f1")
_FIELDS = {"map50": "ap50", "map50_95": "ap50_95"}


def as_plain(found: ClassAccuracies) -> dict[str, Any]:
    """For JSON: lists, and None instead of what is not known of a class without an object."""
    return {name: _listed(value) for name, value in asdict(found).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_listed(one) for one in value]
    number = float(value) if isinstance(value, float | np.floating) else int(value)
    return None if np.isnan(number) else number


def class_metrics(
    names: Sequence[str], found: ClassAccuracies, dense: ClassAccuracies | None
) -> dict[str, float]:
    """The accuracies of each class that has objects, under ``class/<name>/``.

    Args:
        names: of the classes, in order. Characters that trackers do not take become ``_``; of equal names
            each further one gets its number.
        found: of what is deployed, for `NUMBERS`.
        dense: of the dense network, for ``dense_map50``; None where it is not known.

    Returns:
        Numbers from 0 to 1.
    """
    metrics: dict[str, float] = {}
    for number, name in enumerate(_distinct(names)):
        if not found.objects[number]:
            continue
        values = {key: getattr(found, _FIELDS.get(key, key))[number] for key in NUMBERS}
        values |= {"dense_map50": dense.ap50[number]} if dense else {}
        metrics |= {f"{PREFIX}{name}/{key}": float(value) for key, value in values.items()}
    return metrics


def _distinct(names: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for number, name in enumerate(names):
        plain = re.sub(r"[^\w.\- ]", "_", name).strip() or "_"
        plain = f"{plain} {number}" if plain.casefold() in seen else plain
        seen.add(plain.casefold())
        yield plain
