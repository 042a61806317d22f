"""The short search for the streams and the options that suit an engine, a model and a load best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparse_exp.benchmark.cells import Cell, Load
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import SparseExpError

_log = logging.getLogger(__name__)
_BETTER = 1.02  # than what was found so far: what differs less is noise, and the plainer choice stays
_TURNS = 3  # a program that wakes up spoils one of them, not the choice


@dataclass(frozen=True)
class Setting:
    """How an engine is loaded.

    Attributes:
        streams: inferences at once.
        options: the engine's own; empty: its defaults.
    """

    streams: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


class Ready(Protocol):
    """An engine that is loaded under a setting."""

    def measure(self, images: np.ndarray, seconds: float, *, warmup: float, streams: int) -> Any:
        """See `sparse_exp.engines.IsolatedEngine.measure`."""

    def close(self) -> None:
        """Free it."""


@dataclass
class Tuned:
    """What the search found.

    Attributes:
        setting: the best; None where none works.
        engine: loaded under it; None where none works.
        tries: all that were tried: ``streams``, ``options``, and ``items_per_s`` and ``latency_p50_ms``, or
            ``failed`` with the reason; in the order of the search.
        error: of the last one that did not work.
    """

    setting: Setting | None = None
    engine: Any = None
    tries: list[dict[str, Any]] = field(default_factory=list)
    error: SparseExpError | None = None


Open = Callable[[Setting], Any]
Space = Callable[[int], Sequence[Mapping[str, Any]]]


def tune(cell: Cell, images: np.ndarray, hardware: HardwareConfig, open_engine: Open, space: Space) -> Tuned:
    """Find the setting under which a cell is fastest, first its streams, then its options.

    Each candidate is measured in turns with the best so far, so that a drift of the machine hits both, and
    takes its place where it is clearly faster in most turns. Batch 1 one after the other counts by its median
    latency, all else by items per second. With ``hardware.tune`` off, or where there is one candidate only,
    it is loaded and nothing measured.

    Args:
        cell: whose engine and load it is.
        images: uint8 (N, 3, H, W).
        hardware: tune, tune_s and warmup_s.
        open_engine: loads the cell's model under a setting; raises where that cannot be.
        space: the options worth a try with so many streams; the first are the engine's defaults.
    """
    search = _Search(cell, images, hardware, open_engine)
    streams = stream_counts(cell.load) if hardware.tune else stream_counts(cell.load)[-1:]
    several = hardware.tune and (len(streams) > 1 or len(space(streams[0])) > 1)
    for count in streams:
        search.attempt(Setting(count), timed=several)
    if not hardware.tune:
        return search.found
    chosen = search.found.setting.streams if search.found.setting else streams[0]
    for options in list(space(chosen))[1:]:
        search.attempt(Setting(chosen, options), timed=True)
    return search.found


def stream_counts(load: Load) -> list[int]:
    """Numbers of streams that are worth a try: the one that is asked for, else what divides the cores.

    Powers of two count, too, as engines also cut cores into unequal parts; one per core is the last.

    >>> stream_counts(Load("b1_throughput", "throughput", 1, None, 6))
    [1, 2, 3, 4, 6]
    """
    if load.streams is not None:
        return [load.streams]
    return [n for n in range(1, load.cores + 1) if load.cores % n == 0 or n & (n - 1) == 0]


class _Search:
    """Tries one setting after the other, and keeps the engine of the best."""

    def __init__(self, cell: Cell, images: np.ndarray, hardware: HardwareConfig, open_engine: Open) -> None:
        self.found = Tuned()
        self._cell, self._images, self._hardware, self._open = cell, images, hardware, open_engine

    def attempt(self, setting: Setting, *, timed: bool) -> None:
        note: dict[str, Any] = {"streams": setting.streams, "options": dict(setting.options)}
        self.found.tries.append(note)
        engine = None
        try:
            engine = self._open(setting)
            better = self._is_better(engine, setting, note) if timed else True
        except SparseExpError as error:
            if engine is not None:
                engine.close()
            note["failed"] = str(error)
            self.found.error = error
            _log.debug("%s with %s: %s", self._cell.name, note, error)
            return
        loser = self.found.engine if better else engine
        if loser is not None:
            loser.close()
        if better:
            self.found.setting, self.found.engine = setting, engine

    def _is_better(self, engine: Ready, setting: Setting, note: dict[str, Any]) -> bool:
        """Whether it is clearly faster than the best so far, measured beside it."""
        mine, ratios = [], []
        for turn in range(_TURNS):
            mine.append(self._timing(engine, setting, warm=turn > 0))
            if self.found.setting is not None:
                best = self._timing(self.found.engine, self.found.setting, warm=True)
                ratios.append(self._speed(mine[-1]) / self._speed(best))
            if mine[-1].wall > self._hardware.tune_s:  # one inference is longer than a try should be
                break
        latencies = np.concatenate([timing.latencies for timing in mine])
        items = self._cell.load.batch_size * len(latencies) / sum(timing.wall for timing in mine)
        median = float(np.median(latencies))
        note.update(items_per_s=round(items, 3), latency_p50_ms=round(1e3 * median, 4))
        return not ratios or float(np.median(ratios)) > _BETTER

    def _timing(self, engine: Ready, setting: Setting, *, warm: bool) -> Any:
        seconds = self._hardware.tune_s / _TURNS
        warmup = 0.0 if warm else min(self._hardware.warmup_s, self._hardware.tune_s)
        return engine.measure(self._images, seconds, warmup=warmup, streams=setting.streams)

    def _speed(self, timing: Any) -> float:
        """Of which more is better."""
        load = self._cell.load
        if load.scenario == "sync" and load.batch_size == 1:
            return 1 / float(np.median(timing.latencies))
        return len(timing.latencies) / float(timing.wall)
