"""What the layers of a model cost in an engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RUNS = 10  # inferences over which times are averaged


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer, or of what the engine made of several.

    Attributes:
        name: as the engine calls it: most often the node of the ONNX file that it began as.
        kind: what it does, in the engine's words, such as ``"Convolution"`` or ``"shuffle"``.
        ms: milliseconds of one inference of a batch, at least 0.
    """

    name: str
    kind: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """The layers of a model with their times, as the engine's own profiler reports them.

    Profiling itself costs time: shares say more than sums, which exceed what a benchmark measures.

    Attributes:
        layers: in the order of execution, where the engine tells.
        supported: share of the operators that the engine has optimized code for, 0..1; None where it does
            not tell.
        note: how the times came about.
    """

    layers: tuple[LayerTime, ...]
    supported: float | None
    note: str


def merged(times: Iterable[tuple[str, str, float]], runs: int = 1) -> tuple[LayerTime, ...]:
    """Add the times of the same layer up, and divide by the number of inferences.

    Args:
        times: name, kind and milliseconds, a layer as often as it was seen.
        runs: inferences that were seen, at least 1.

    Returns:
        One entry for each name and kind, in the order of their first appearance.
    """
    sums: dict[tuple[str, str], float] = {}
    for name, kind, ms in times:
        sums[name, kind] = sums.get((name, kind), 0.0) + ms
    return tuple(LayerTime(name, kind, ms / runs) for (name, kind), ms in sums.items())
