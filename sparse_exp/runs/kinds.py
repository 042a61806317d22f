"""The kinds of the values in a manifest that commands read: it may be anybody's, so they are checked.

A kind is a type; a tuple of kinds, one of which it is; a list with the kind of its elements; a dictionary
with the kinds of known keys, any of which may be missing, or under `EVERY` of all others; or a function that
tells. What only stages read of each other is not listed: where that is of another kind, the stage fails.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import Any

from sparse_exp.config.imgsz import imgsz_of

EVERY = object()
_TEXT = (str, NoneType)
_SCALAR = (str, int, float, NoneType)


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value of plain data, down to its parts, is of a kind."""
    if isinstance(kind, tuple):
        return any(is_of(value, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        others = kind.get(EVERY, object)
        return isinstance(value, dict) and all(is_of(v, kind.get(key, others)) for key, v in value.items())
    return isinstance(value, kind) if isinstance(kind, type) else bool(kind(value))


def finite(value: Any) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return finite(value) and value > 0


_NUMBER = (finite, NoneType)


def _is_imgsz(value: Any) -> bool:
    try:
        imgsz_of(value)
    except ValueError:
        return False
    return True


def _is_row(row: Any) -> bool:
    """Whether it is a row of the benchmark; of those with numbers each turn has one."""
    if not is_of(
        row, {"engine": str, "variant": str, "key": _SCALAR, "scenario": str, "map50": _NUMBER, "cpu": str}
    ):
        return False
    if not {"engine", "variant"} <= row.keys():
        return False
    if "impossible" in row or not row.get("items_per_s"):
        return True
    if not all(_positive(row.get(name)) for name in ("items_per_s", "batch", "cores")):
        return False
    each, turns = row.get("each") or [], row.get("turns") or []
    return is_of(each, [_positive]) and is_of(turns, [int]) and len(turns) in (0, len(each) or 1)


_CONDITIONS = {
    "code": {EVERY: str}, "host": {EVERY: _SCALAR}, "recipe": _TEXT, "packages": [str],
}  # fmt: skip
_EVENT = {
    "event": str, "values": {EVERY: _SCALAR}, "step": (int, NoneType), "path": str, "folder": str,
    "name": str, "digest": str, "source": str, "split": str, "size": int, "alias": _TEXT,
    "tags": {EVERY: _SCALAR},
}  # fmt: skip
STATE = {
    "status": _TEXT, "stage": _TEXT, "failure": _TEXT, "name": str, "key": _TEXT, "version": _TEXT,
    "tracker_run_id": _TEXT, "tracker_address": _TEXT, "told": (bool, NoneType), "started": _NUMBER,
    "ended": _NUMBER, "job": (int, NoneType), "overrides": [str], "conditions": _CONDITIONS,
    "environments": {EVERY: _CONDITIONS},
    "settled": {"batch_size": (int, NoneType), "num_epochs": _NUMBER, "why": {EVERY: str}},
    "counterpart": {"fingerprint": str, "directory": str},
}  # fmt: skip
"""Of the entries of a manifest beside its stages."""

RECORD = {
    "fingerprint": str, "outputs": {EVERY: str}, "metrics": {EVERY: _SCALAR}, "seconds": finite,
    "facts": dict, "shared_from": _TEXT, "ended": finite, "events": [_EVENT], "conditions": str,
    "parts": {EVERY: str}, "step": (int, NoneType),
}  # fmt: skip
"""Of the entry of a stage."""

FACTS: dict[str, Any] = {
    "fetch": {
        "dataset": _TEXT, "names": [_SCALAR], "origin": _TEXT, "sha256": _TEXT, "path": str,
        "grown_from": _TEXT,
    },
    "baseline": {"checkpoint": _TEXT, "directory": _TEXT, "dense_fingerprint": _TEXT},
    "train": {"checkpoint": _TEXT, "recipe": _TEXT},
    "evaluate": {"dense_fingerprint": _TEXT, "phase": _TEXT},
    "export": {"imgsz": _is_imgsz, "impossible": {EVERY: str}, "dense": (dict, NoneType)},
    "benchmark": {"rows": [_is_row]},
}  # fmt: skip
"""Of the facts of stages, by the name of the stage."""
