"""How much of the dense accuracy a sparse network keeps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_exp.config.runtimes import runs_quantized

_log = logging.getLogger(__name__)


def recovery_metrics(
    baseline: Mapping[str, Any], result: Mapping[str, Any], engines: Sequence[str]
) -> dict[str, float]:
    """Divide the deployed mAP50 by that of the dense counterpart.

    Args:
        baseline: facts of the baseline stage.
        result: metrics with ``deployed/<engine>/map50``.
        engines: engines of the target; one that cannot run the deployed file has no metric in ``result``.

    Returns:
        ``recovery/<engine>/map50`` for each engine, and ``recovery/map50``, which is that of
        `recovery_engine`; 1 means that all of the dense mAP50 is kept. Empty where there is no baseline, or
        its mAP50 is 0.
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
    """The engine whose accuracy stands for the run: DeepSparse if it is there, else the first.

    Sparse files are made for DeepSparse. One that runs no quantized network is taken only where there is no
    other, and torch last, since the deployed file is ONNX.
    """

    def place(name: str) -> tuple[bool, bool]:
        return name == "torch", not runs_quantized(name)

    return "deepsparse" if "deepsparse" in engines else min(engines, key=place)
