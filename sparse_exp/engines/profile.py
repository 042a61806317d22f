"""The times of a model's layers in an engine, in one form for all engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RUNS = 10  # inferences over which a profile averages


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer, or of several that the engine has fused.

    Attributes:
        name: as the engine calls it: most often the node of the ONNX file that it comes from.
        kind: what it does, in the engine's words: ``"Convolution"``, ``"shuffle"``.
        ms: milliseconds of one inference of a batch, at least 0.
    """

    name: str
    kind: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """The layers of a model with their times, as the engine's own profiler reports them.

    Profiling takes time itself: sums exceed what a benchmark measures, and shares say more.

    Attributes:
        layers: in the order of execution, where the engine tells it.
        supported: share of the operators for which the engine has optimized code, 0..1; None where it does
            not tell.
        note: how the times were measured.
    """

    layers: tuple[LayerTime, ...]
    supported: float | None
    note: str


def merged(times: Iterable[tuple[str, str, float]], runs: int = 1) -> tuple[LayerTime, ...]:
    """Add up the times of each layer, and divide by the number of inferences.

    Args:
        times: name, kind and milliseconds, of a layer as often as it ran.
        runs: inferences that were timed, at least 1.

    Returns:
        One entry for each name and kind, in the order of their first appearance.
    """
    sums: dict[tuple[str, str], float] = {}
    for name, kind, ms in times:
        sums[name, kind] = sums.get((name, kind), 0.0) + ms
    return tuple(LayerTime(name, kind, ms / runs) for (name, kind), ms in sums.items())
