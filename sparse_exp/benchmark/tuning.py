"""A short search for the number of streams and the options with which an engine is fastest under a load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparse_exp.benchmark.cells import Cell, Load
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import SparseExpError

_log = logging.getLogger(__name__)
_BETTER = 1.02  # mean ratio from which a candidate is faster; less is noise, and the plainer setting stays
_TURNS, _LAST_TURNS = 3, 5  # all of which a candidate must win: of each try, and against the defaults at last
_TRIES = 3  # of a turn that something else disturbs
_INFERENCES = 20  # in each turn, as far as four times its seconds suffice


@dataclass(frozen=True)
class Setting:
    """How an engine is loaded.

    Attributes:
        streams: inferences at once.
        options: of the engine; empty: its defaults.
    """

    streams: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


class Ready(Protocol):
    """An engine that is loaded with a setting."""

    def measure(self, images: np.ndarray, seconds: float, *, warmup: float, streams: int) -> Any:
        """See `sparse_exp.engines.IsolatedEngine.measure`."""

    def close(self) -> None:
        """Free it."""


@dataclass
class Tuned:
    """The result of the search.

    Attributes:
        setting: the fastest; None if none works.
        engine: loaded with that setting; None if none works.
        tries: every setting that was tried, in the order of the search: ``streams`` and ``options``, then
            ``items_per_s`` and ``latency_p50_ms``, or ``failed`` with the reason; of a winner other than the
            defaults also ``gain``, how many times faster it was than these in the last turns.
        error: of the last setting that did not work.
        searched: when the search was made, as ISO 8601; empty: just now, or not at all.
    """

    setting: Setting | None = None
    engine: Any = None
    tries: list[dict[str, Any]] = field(default_factory=list)
    error: SparseExpError | None = None
    searched: str = ""


Open = Callable[[Setting], Any]
Space = Callable[[int], Sequence[Mapping[str, Any]]]


def tune(cell: Cell, images: np.ndarray, hardware: HardwareConfig, open_engine: Open, space: Space) -> Tuned:
    """Find the setting with which a cell is fastest: first its streams, then its options.

    Each candidate is measured in turns with the fastest so far, so that a drift of the machine hits both. It
    takes that one's place if it is faster in every turn, and clearly so in the mean; after a turn that it
    loses it is given up. Options are added to those that have won. At last the winner must beat the first
    setting that works, the engine's defaults, in every one of some more turns; else that one is chosen. Batch
    1 in the scenario sync counts by its median latency, any other load by items per second. If
    ``hardware.tune`` is off, or there is a single candidate, the engine is loaded and nothing is measured.

    Args:
        cell: engine, model and load.
        images: uint8 (N, 3, H, W).
        hardware: tune, tune_s and warmup_s.
        open_engine: loads the cell's model with a setting; raises a `SparseExpError` if that fails.
        space: returns the options worth a try with a number of streams, the engine's defaults first.
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
        won = search.found.setting.options if search.found.setting else {}
        search.attempt(Setting(chosen, {**won, **options}), timed=True)
    search.confirm()
    return search.found


def stream_counts(load: Load) -> list[int]:
    """Numbers of streams worth a try: the one that the load asks for, else the divisors of its cores.

    Powers of two are tried as well, since engines can also divide cores unequally. One stream per core is the
    last.

    >>> stream_counts(Load("b1_throughput", "throughput", 1, None, 6))
    [1, 2, 3, 4, 6]
    """
    if load.streams is not None:
        return [load.streams]
    return [n for n in range(1, load.cores + 1) if load.cores % n == 0 or n & (n - 1) == 0]


class _Search:
    """Tries one setting after the other, and keeps the engine of the fastest."""

    def __init__(self, cell: Cell, images: np.ndarray, hardware: HardwareConfig, open_engine: Open) -> None:
        self.found = Tuned()
        self._first: Setting | None = None
        self._latency = 0.0
        self._cell, self._images, self._hardware, self._open = cell, images, hardware, open_engine

    def attempt(self, setting: Setting, *, timed: bool) -> None:
        """Load the engine with a setting; keep it if it is the first, or if it is ``timed`` and faster."""
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
            self._first = self._first or setting
            self.found.setting, self.found.engine = setting, engine

    def confirm(self) -> None:
        """Go back to the first setting that worked, unless the winner beats it in every one of some turns."""
        winner, first = self.found.setting, self._first
        if winner is None or first is None or winner == first:
            return
        try:
            engine = self._open(first)
        except SparseExpError as error:  # it worked before; memory may be short now
            _log.debug("%s with %s: %s", self._cell.name, first, error)
            return
        try:
            gain = _gain(1 / self._pair(engine, first, warm=turn > 0)[1] for turn in range(_LAST_TURNS))
        except BaseException:
            engine.close()
            raise
        if gain > _BETTER:
            engine.close()
            self._note_of(winner)["gain"] = round(gain, 4)
            return
        _log.debug("%s: %s was no faster than %s after all.", self._cell.name, winner, first)
        self.found.engine.close()
        self.found.setting, self.found.engine = first, engine

    def _note_of(self, setting: Setting) -> dict[str, Any]:
        wanted = setting.streams, dict(setting.options)
        return next(one for one in self.found.tries if (one["streams"], one["options"]) == wanted)

    def _pair(self, engine: Ready, setting: Setting, *, warm: bool) -> tuple[Any, float]:
        """Times of an engine, and how many times faster it is than the fastest so far."""
        assert self.found.setting is not None
        mine = self._timing(engine, setting, warm=warm)
        best = self._timing(self.found.engine, self.found.setting, warm=True)
        return mine, self._speed(mine) / self._speed(best)

    def _is_better(self, engine: Ready, setting: Setting, note: dict[str, Any]) -> bool:
        """Whether an engine is clearly faster than the fastest so far, measured in turns with it."""
        mine: list[Any] = []

        def ratios() -> Iterator[float]:
            for turn in range(_TURNS):
                timing, ratio = self._pair(engine, setting, warm=turn > 0)
                mine.append(timing)
                yield ratio

        if self.found.setting is None:
            mine, better = [self._timing(engine, setting, warm=False)], True
        else:
            better = _gain(ratios()) > _BETTER
        latencies = np.concatenate([timing.latencies for timing in mine])
        items = self._cell.load.batch_size * len(latencies) / sum(timing.wall for timing in mine)
        median = float(np.median(latencies))
        note.update(items_per_s=round(items, 3), latency_p50_ms=round(1e3 * median, 4))
        return better

    def _timing(self, engine: Ready, setting: Setting, *, warm: bool) -> Any:
        least = self._hardware.tune_s / _TURNS
        seconds = min(max(least, _INFERENCES * self._latency / setting.streams), 4 * least)
        warmup = 0.0 if warm else min(self._hardware.warmup_s, self._hardware.tune_s)
        for _ in range(_TRIES):
            timing = engine.measure(self._images, seconds, warmup=warmup, streams=setting.streams)
            if timing.waited <= self._hardware.max_disturbance:
                break
        self._latency = float(np.median(timing.latencies))
        return timing

    def _speed(self, timing: Any) -> float:
        """A number of which more is better."""
        load = self._cell.load
        if load.scenario == "sync" and load.batch_size == 1:
            return 1 / float(np.median(timing.latencies))
        return len(timing.latencies) / float(timing.wall)


def _gain(ratios: Iterable[float]) -> float:
    """The geometric mean of ratios that are all above 1; 1 where one is not, and none is taken then."""
    logs = []
    for ratio in ratios:
        if ratio <= 1:
            return 1.0
        logs.append(np.log(ratio))
    return float(np.exp(np.mean(logs)))
