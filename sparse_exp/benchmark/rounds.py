"""The measurement: all cells in turns, each engine in a process of its own, nothing else on the host.

So that two numbers can be compared:

- only one run of this program measures on a host at a time, and no other run works meanwhile
  (`sparse_exp.locks`);
- every cell is tuned before, the baselines too (`sparse_exp.benchmark.tuning`);
- the repeats of a cell do not follow one another: each turn goes once through all cells, so that a drift of
  the machine hits them all, and begins with another cell;
- each repeat knows how long its threads could have run and had no CPU. One that something else disturbed does
  not count, and is measured anew;
- turns go on until each ratio to the dense network is known well enough, or the time is over; what is not
  known well enough then is marked.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.host_state import (
    HostState,
    Steal,
    Throttling,
    free_cpus,
    free_memory_share,
    look_around,
)
from sparse_exp.benchmark.measurements import Measurement, Round, megabytes, noise_sentence
from sparse_exp.benchmark.ratios import LEAST_TURNS, Speeds, ratio_of
from sparse_exp.benchmark.remembered import file_of, keep, recall
from sparse_exp.benchmark.tuning import Setting, Tuned, tune
from sparse_exp.config.imgsz import Imgsz, imgsz_of
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.engines import IsolatedEngine, search_space
from sparse_exp.errors import EngineError, SparseExpError
from sparse_exp.hardware import host_facts, physical_cpus
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.progress import progress

_log = logging.getLogger(__name__)
_BUSY_CORES = 0.2  # of other programs, from which a warning is due
_MENTIONED = 0.02  # share of the time that something else took, from which a warning is due
_TRIES = 3  # of a repeat that something else disturbs, in one turn
_SPARE_MEMORY = 0.3  # share of the memory; if less is free, engines are loaded anew for each turn
_INT8_NODES = frozenset(("ConvInteger", "QLinearConv", "QuantizeLinear", "MatMulInteger"))

Check = Callable[[Cell, NDArray[np.float32]], Mapping[str, Any]]


def _no_check(_: Cell, __: NDArray[np.float32]) -> Mapping[str, Any]:
    return {}


def benchmark(
    cells: Sequence[Cell],
    images: np.ndarray,
    *,
    hardware: HardwareConfig,
    settings: Path | None = None,
    check: Check = _no_check,
    lock_path: Path | None = None,
) -> list[Measurement]:
    """Measure cells on this host.

    First each cell is tuned (`tune`), or gets the setting that was found before. Then come
    ``hardware.repeats`` turns, in each of which every cell warms up and is timed for ``hardware.duration_s``
    seconds. The first warm-up of a cell goes on until its latencies are stable, later ones take
    ``hardware.warmup_s`` seconds. A repeat of which more than ``hardware.max_disturbance`` was taken by
    something else is dropped, and measured again. Further turns follow, until the ratio of each cell to the
    fastest dense one is known within ``hardware.precision``, or all turns took ``hardware.budget_s`` seconds;
    but none where fewer turns were asked for than an interval needs. A cell of which it is not known then is
    noisy.

    Args:
        cells: what to measure; impossible ones stay impossible.
        images: real photos, uint8 (N, 3, H, W); batches are taken from them in turn.
        hardware: tune, tune_s, pinning, warmup_s, max_warmup_s, duration_s, repeats, precision, budget_s and
            max_disturbance.
        settings: folder in which the settings that tuning finds are kept; None: they are not.
        check: is given each cell and what it puts out for its first batch, in the setting that is measured;
            returns what there is to say of it, for the row. A cell for which it raises an `EngineError` is
            impossible.
        lock_path: file of the host-wide lock; None: `default_lock_path`.

    Returns:
        A measurement for each cell, in their order. A cell that cannot be loaded, or whose process dies,
        is impossible, with the reason.

    Raises:
        MissingDependency: nothing could be measured, and an engine is not installed.
        EngineError: nothing could be measured.
    """
    lock = lock_path or default_lock_path()
    with measuring_alone(lock):
        started = datetime.now(UTC)
        before = look_around()
        most = max((cell.cores for cell in cells), default=1)
        cpus = free_cpus(physical_cpus(), most)
        slots = [_Slot(cell, images, hardware, cpus) for cell in cells]
        if before.busy_cores > _BUSY_CORES:
            message = "Other programs keep %.1f cores busy: close them, or the numbers are too low."
            _log.warning(message, before.busy_cores)
        _log.info("Measuring %d cells alone on this host.", sum(not cell.impossible for cell in cells))
        try:
            _measure(slots, hardware, settings, check)
        finally:
            for slot in slots:
                slot.release()
        after = look_around()
        ended = datetime.now(UTC)
        _log.info("Measured in %.1f s.", (ended - started).total_seconds())
    conditions = {
        **_conditions(before, after, hardware, images),
        "started": started.isoformat(),
        "ended": ended.isoformat(),
        "lock": str(lock),
    }
    unsettled = _unsettled(slots, hardware)
    measurements = [slot.measurement(conditions, settled=slot not in unsettled) for slot in slots]
    _require_any(slots)
    _warn_of_noise(measurements)
    return measurements


class _Slot:
    """A cell, its engine, and its repeats so far."""

    def __init__(self, cell: Cell, images: np.ndarray, hardware: HardwareConfig, cpus: Sequence[int]) -> None:
        self.cell, self._images, self._hardware, self._cpus = cell, images, hardware, cpus
        self.error: SparseExpError | None = None
        self.over = False  # it cannot be measured any more; what was measured counts
        self.tuned = Tuned()
        self.taken: list[Round] = []
        self.dropped: list[Round] = []
        self._peak, self._version = 0.0, ""
        self._outputs: Mapping[str, Any] = {}

    @property
    def alive(self) -> bool:
        """Whether the cell can be measured."""
        return not self.cell.impossible and self.error is None

    @property
    def clean(self) -> list[Round]:
        """The repeats that nothing disturbed."""
        return [one for one in self.taken if self._is_clean(one)]

    @property
    def rounds(self) -> list[Round]:
        """The repeats that count: those that nothing disturbed; of too few, the least disturbed."""
        clean, least = self.clean, self._hardware.repeats
        if len(clean) >= min(least, len(self.taken)):
            return clean
        chosen = sorted(self.taken, key=lambda one: one.disturbance)[:least]
        return sorted(chosen, key=lambda one: one.turn)

    @property
    def speeds(self) -> Speeds:
        """Images per second of the repeats that count, by the number of their turn."""
        return Measurement(self.cell, self.rounds).speeds

    def _is_clean(self, one: Round) -> bool:
        return one.disturbance <= self._hardware.max_disturbance

    def prepare(self, settings: Path | None) -> None:
        """Tune the cell, or take the setting that was found before; its engine is loaded then.

        Args:
            settings: folder in which they are kept; None: they are not.
        """
        if not self.alive:
            return
        file = None
        if settings is not None and self._hardware.tune:
            file = file_of(settings, self.cell, self._hardware, _imgsz(self._images), self._space)
            if not self._hardware.tune_again and self._recalled(file):
                return
        self.tuned = tune(self.cell, self._images, self._hardware, self._opened, self._space)
        if self.tuned.setting is None:
            self.error = self.tuned.error
            _log.warning("%s cannot be measured: %s", self.cell.name, self.error)
        elif file is not None:
            keep(file, self.tuned, self.tuned.engine.version)

    def check(self, check: Check) -> None:
        """Look at what the cell puts out in the setting that is measured."""
        engine = self.tuned.engine
        if not self.alive or engine is None:
            return
        try:
            self._outputs = check(self.cell, engine.run(self._images[: self.cell.batch_size])[0])
        except SparseExpError as error:
            self.error = error
            _log.warning("%s is not measured: %s", self.cell.name, error)
            self.release()

    def _space(self, streams: int) -> Sequence[Mapping[str, Any]]:
        load = self.cell.load
        return search_space(self.cell.engine, batch_size=load.batch_size, cores=load.cores, streams=streams)

    def _recalled(self, file: Path) -> bool:
        """Take the setting that a file holds, if the engine is still the same and loads with it."""
        known = recall(file)
        if known is None:
            return False
        try:
            engine = self._opened(known.setting)
        except SparseExpError as error:
            _log.debug("%s with %s: %s", self.cell.name, known.setting, error)
            return False
        if engine.version != known.version:
            engine.close()
            return False
        self.tuned = Tuned(known.setting, engine, known.tries, searched=known.searched)
        return True

    def release(self) -> None:
        """Free the engine; the next repeat loads it again."""
        if self.tuned.engine is not None:
            self.tuned.engine.close()
            self.tuned.engine = None

    def measure(self, turn: int, until: float) -> None:
        """Take the repeat of a turn; again at once, a few times, while something else disturbs it.

        Args:
            turn: its number.
            until: on the monotonic clock; nothing is measured again after it.
        """
        try:
            tries = [self._round(turn)]
            while not self._is_clean(tries[-1]) and len(tries) < _TRIES and time.monotonic() < until:
                tries.append(self._round(turn))
        except SparseExpError as error:
            self.over = True
            if len(self.taken) < self._hardware.repeats:
                self.error = error
            _log.warning("%s cannot be measured%s: %s", self.cell.name, "" if self.error else " again", error)
            self.release()
        else:
            best = min(tries, key=lambda one: one.disturbance)
            self.taken.append(best)
            self.dropped += [one for one in tries if one is not best]

    def _round(self, turn: int) -> Round:
        setting, hardware = self.tuned.setting or Setting(), self._hardware
        fresh = self.tuned.engine is None or not self.taken
        if self.tuned.engine is None:
            self.tuned.engine = self._opened(setting)
        engine, steal, throttling = self.tuned.engine, Steal(), Throttling()
        timing = engine.measure(
            self._images,
            hardware.duration_s,
            warmup=hardware.warmup_s,
            max_warmup=max(hardware.warmup_s, hardware.max_warmup_s) if fresh else None,
            streams=setting.streams,
        )
        self._peak, self._version = max(self._peak, engine.peak_rss_mb()), engine.version
        stable = timing.stable or not fresh  # later warm-ups have a fixed length
        taken = timing.waited, throttling.share(), steal.share()
        return Round(timing.latencies, timing.wall, timing.warmed, stable, turn, *taken)

    def _opened(self, setting: Setting) -> IsolatedEngine:
        assert self.cell.model is not None
        load = self.cell.load
        engine = IsolatedEngine(self.cell.engine)
        engine.load(
            self.cell.model,
            batch_size=load.batch_size,
            cores=load.cores,
            streams=setting.streams,
            options=dict(setting.options),
            pin=self._cpus[: load.cores] if self._hardware.pinning else None,
        )
        return engine

    def measurement(self, conditions: dict[str, Any], *, settled: bool) -> Measurement:
        """The cell's repeats with their conditions; ``settled``: its ratio is known well enough."""
        if not self.alive:
            cell = replace(self.cell, impossible=self.cell.impossible or str(self.error))
            tries = {"tries": self.tuned.tries} if self.tuned.tries else {}
            return Measurement(cell, conditions={**tries, **conditions})
        setting = self.tuned.setting or Setting()
        own = {
            "version": self._version,
            "precision": precision(self.cell.variant, self.cell.model),
            "streams": setting.streams,
            "options": dict(setting.options),
            "tries": self.tuned.tries,
            **({"searched": self.tuned.searched} if self.tuned.searched else {}),
            **({"outputs": dict(self._outputs)} if self._outputs else {}),
            "size_mb": round(megabytes(self.cell.model or Path()), 3),
        }
        kept = self.rounds
        dropped = [*self.dropped, *(one for one in self.taken if one not in kept)]
        noisy = not settled or not all(map(self._is_clean, kept))
        return Measurement(self.cell, kept, self._peak, noisy, dropped, {**own, **conditions})


def _measure(slots: list[_Slot], hardware: HardwareConfig, settings: Path | None, check: Check) -> None:
    with progress("Benchmark", total=len(slots) * (1 + hardware.repeats), unit="measurements") as bar:
        keep = True
        for slot in slots:
            bar.advance(0, note=f"preparing {slot.cell.name}")
            slot.prepare(settings)
            slot.check(check)
            keep = _keep_loaded(slots, keep=keep)
            bar.advance()
        ends = time.monotonic() + hardware.budget_s
        for turn in itertools.count():
            due = [slot for slot in slots if slot.alive]
            if turn >= hardware.repeats:
                vague = [slot for slot in _unsettled(slots, hardware) if not slot.over]
                due = [slot for slot in _with_baselines(slots, vague) if not slot.over]
                if not due or time.monotonic() >= ends or hardware.repeats < LEAST_TURNS:  # a quick look
                    return
            for slot in _rotated(due, turn):
                bar.advance(0, note=slot.cell.name)
                slot.measure(turn, ends)
                keep = _keep_loaded(slots, keep=keep)  # some take most of their memory when they first run
                bar.advance(1 if turn < hardware.repeats else 0)
            for slot in slots:  # an engine that is done would keep memory, and threads that spin
                if turn + 1 >= hardware.repeats and slot not in due:
                    slot.release()


def _rotated(slots: Sequence[_Slot], turn: int) -> Iterable[_Slot]:
    first = turn % max(1, len(slots))
    return [*slots[first:], *slots[:first]]


def _unsettled(slots: Sequence[_Slot], hardware: HardwareConfig) -> list[_Slot]:
    """Cells that need further turns: with too few clean repeats, or a ratio that is not known well enough."""
    found = []
    for slot in [slot for slot in slots if slot.alive]:
        baseline = _baseline_of(slot, slots)
        ratio = ratio_of(slot.speeds, baseline.speeds)
        is_vague = baseline is not slot and ratio.error > hardware.precision
        if is_vague or len(slot.clean) < hardware.repeats:
            found.append(slot)
    return found


def _baseline_of(slot: _Slot, slots: Iterable[_Slot]) -> _Slot:
    """The fastest dense cell under the load of another; that itself where there is none."""

    def alike(other: _Slot) -> bool:
        return (other.cell.network, other.cell.load) == (slot.cell.network, slot.cell.load)

    dense = [other for other in slots if other.alive and other.cell.variant == "dense" and alike(other)]
    return max(dense, key=lambda one: float(np.median([*one.speeds.values()])), default=slot)


def _with_baselines(slots: Sequence[_Slot], some: Sequence[_Slot]) -> list[_Slot]:
    """Some of the cells and the baselines that they are compared with, in the order of all."""
    wanted = {id(one) for slot in some for one in (slot, _baseline_of(slot, slots))}
    return [slot for slot in slots if id(slot) in wanted]


def _keep_loaded(slots: Sequence[_Slot], *, keep: bool) -> bool:
    """Whether engines stay loaded between repeats; as soon as memory is short, all are released."""
    keep = keep and free_memory_share() >= _SPARE_MEMORY
    if not keep:
        for slot in slots:
            slot.release()
    return keep


def precision(variant: str, model: Path | None) -> str:
    """``int8`` or ``fp32``: the numbers that the convolutions of a cell's file compute with."""
    if variant != "sparse":
        return "int8" if variant == "dense_int8" else "fp32"
    return "int8" if model is not None and _is_quantized(model) else "fp32"


def _is_quantized(model: Path) -> bool:
    if model.suffix != ".onnx":
        return False
    import onnx

    nodes = onnx.load(str(model), load_external_data=False).graph.node
    return any(node.op_type in _INT8_NODES for node in nodes)


def _imgsz(images: np.ndarray) -> Imgsz:
    """The size of images (N, 3, H, W)."""
    return imgsz_of(images.shape[-2:])


def _require_any(slots: Sequence[_Slot]) -> None:
    if any(slot.alive for slot in slots):
        return
    for slot in slots:
        if slot.error is not None:
            raise slot.error
    reasons = dict.fromkeys(slot.cell.impossible for slot in slots)
    raise EngineError(
        f"There is nothing to measure: {' '.join(reasons)} Change hardware.variants or .engines."
    )


def _conditions(
    before: HostState, after: HostState, hardware: HardwareConfig, images: np.ndarray
) -> dict[str, Any]:
    """The host and the protocol, which are the same for all cells."""
    facts = host_facts()
    return {
        "cpu": facts.cpu,
        "isa": facts.isa,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "imgsz": _imgsz(images),
        "pinning": hardware.pinning,
        "warmup_s": hardware.warmup_s,
        "max_warmup_s": hardware.max_warmup_s,
        "duration_s": hardware.duration_s,
        "repeats": hardware.repeats,
        "precision_of_ratios": hardware.precision,
        "budget_s": hardware.budget_s,
        "max_disturbance": hardware.max_disturbance,
    }


def _warn_of_noise(measurements: Sequence[Measurement]) -> None:
    noisy = [one.cell.name for one in measurements if one.noisy]
    if noisy:
        _log.warning("Noisy: %s. %s", ", ".join(noisy), noise_sentence([one.row() for one in measurements]))
    for cause, share in _disturbances(measurements):
        _log.warning("%s up to %.0f %% of the time.", cause, 100 * share)


def _disturbances(measurements: Sequence[Measurement]) -> Iterator[tuple[str, float]]:
    """What took more time from repeats that count than it may, in words, and the largest share."""
    words = {
        "waited": "Other programs kept engines from running",
        "throttled": "A quota kept engines from running",
        "steal": "A hypervisor gave the CPUs to other machines",
    }
    for name, said in words.items():
        share = max((getattr(one, name) for each in measurements for one in each.rounds), default=0.0)
        if share > _MENTIONED:
            yield said, share
