"""How much of the dense accuracy a sparse network keeps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)


def recovery_metrics(
    baseline: Mapping[str, Any], result: Mapping[str, Any], engines: Sequence[str]
) -> dict[str, float]:
    """Deployed accuracy over that of the dense counterpart.

    Args:
        baseline: facts of the baseline stage.
        result: metrics with ``deployed/<engine>/map50``.
        engines: of the target; those that cannot run what was deployed have no such metric.

    Returns:
        ``recovery/<engine>/map50``, and ``recovery/map50`` of `recovery_engine`: 1 is all of the dense mAP50.
        Empty where there is no baseline, or one that finds nothing at all.
    """
    dense, engines = baseline.get("map50"), [e for e in engines if f"deployed/{e}/map50" in result]
    if dense is None or not engines:
        return {}
    if dense <= 0:
        _log.warning("No recovery: the dense baseline has mAP50 0. Train it for longer (num_epochs).")
        return {}
    shares = {engine: float(result[f"deployed/{engine}/map50"]) / float(dense) for engine in engines}
    each = {f"recovery/{engine}/map50": share for engine, share in shares.items()}
    return {"recovery/map50": shares[recovery_engine(engines)], **each}


def recovery_engine(engines: Sequence[str]) -> str:
    """The engine whose accuracy counts: DeepSparse, which sparse files are made for, or else the first.

    Torch comes last: what is deployed is an ONNX file.
    """
    return "deepsparse" if "deepsparse" in engines else min(engines, key=lambda name: name == "torch")
