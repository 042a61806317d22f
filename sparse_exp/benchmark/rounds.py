"""The measurement: all cells in turns, each engine in a process of its own, nothing else on the host.

So that two numbers can be compared:

- only one run of this program measures on a host at a time, and no other run works meanwhile
  (`sparse_exp.locks`);
- every cell is tuned before, the baselines too (`sparse_exp.benchmark.tuning`);
- the repeats of a cell do not follow one another: each round goes once through all cells, so that a drift of
  the machine hits them all;
- a cell whose repeats spread too much is measured again, and marked if they still do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.host_state import HostState, Steal, free_memory_share, look_around
from sparse_exp.benchmark.measurements import Measurement, Round, megabytes, spread
from sparse_exp.benchmark.tuning import Setting, Tuned, tune
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.engines import IsolatedEngine, search_space
from sparse_exp.errors import EngineError, SparseExpError
from sparse_exp.hardware import host_facts, physical_cpus
from sparse_exp.locks import default_lock_path, measuring_alone
from sparse_exp.progress import progress

_log = logging.getLogger(__name__)
_BUSY_CORES = 0.2  # of other programs, from which a warning is due
_STOLEN = 0.02  # share of the time that a hypervisor took, likewise
_SPARE_MEMORY = 0.3  # share of the memory; if less is free, engines are loaded anew for each turn
_INT8_NODES = frozenset(("ConvInteger", "QLinearConv", "QuantizeLinear", "MatMulInteger"))


def benchmark(
    cells: Sequence[Cell],
    images: np.ndarray,
    *,
    hardware: HardwareConfig,
    lock_path: Path | None = None,
) -> list[Measurement]:
    """Measure cells on this host.

    First each cell is tuned (`tune`). Then come ``hardware.repeats`` rounds, in each of which every cell
    warms up and is timed for ``hardware.duration_s`` seconds. The first warm-up of a cell goes on until its
    latencies are stable, later ones take ``hardware.warmup_s`` seconds. Cells whose repeats spread more than
    ``hardware.max_spread`` are measured once more; if they still do, they are noisy.

    Args:
        cells: what to measure; impossible ones stay impossible.
        images: real photos, uint8 (N, 3, H, W); batches are taken from them in turn.
        hardware: tune, tune_s, pinning, warmup_s, max_warmup_s, duration_s, repeats and max_spread.
        lock_path: file of the host-wide lock; None: `default_lock_path`.

    Returns:
        A measurement for each cell, in their order. A cell that cannot be loaded, or whose process dies,
        is impossible, with the reason.

    Raises:
        MissingDependency: nothing could be measured, and an engine is not installed.
        EngineError: nothing could be measured.
    """
    slots = [_Slot(cell, images, hardware) for cell in cells]
    with measuring_alone(lock_path or default_lock_path()):
        started = datetime.now(UTC)
        before = look_around()
        if before.busy_cores > _BUSY_CORES:
            message = "Other programs keep %.1f cores busy: close them, or the numbers are too low."
            _log.warning(message, before.busy_cores)
        _log.info("Measuring %d cells alone on this host.", sum(not cell.impossible for cell in cells))
        try:
            _measure(slots, hardware)
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
    }
    measurements = [slot.measurement(conditions) for slot in slots]
    _require_any(slots)
    _warn_of_noise(measurements)
    return measurements


class _Slot:
    """A cell, its engine, and its repeats so far."""

    def __init__(self, cell: Cell, images: np.ndarray, hardware: HardwareConfig) -> None:
        self.cell, self._images, self._hardware = cell, images, hardware
        self.error: SparseExpError | None = None
        self.tuned = Tuned()
        self.rounds: list[Round] = []
        self.discarded: list[float] = []
        self._peak, self._version = 0.0, ""

    @property
    def alive(self) -> bool:
        """Whether the cell can be measured."""
        return not self.cell.impossible and self.error is None

    @property
    def spreads_too_much(self) -> bool:
        return self.alive and self._spread(self.rounds) > self._hardware.max_spread

    def _spread(self, rounds: list[Round]) -> float:
        return spread(Measurement(self.cell, rounds).each)

    def prepare(self) -> None:
        """Tune the cell; its engine is loaded then."""
        if not self.alive:
            return
        load = self.cell.load
        self.tuned = tune(
            self.cell,
            self._images,
            self._hardware,
            self._opened,
            lambda streams: search_space(
                self.cell.engine, batch_size=load.batch_size, cores=load.cores, streams=streams
            ),
        )
        if self.tuned.setting is None:
            self.error = self.tuned.error
            _log.warning("%s cannot be measured: %s", self.cell.name, self.error)

    def release(self) -> None:
        """Free the engine; the next repeat loads it again."""
        if self.tuned.engine is not None:
            self.tuned.engine.close()
            self.tuned.engine = None

    def measure(self) -> None:
        """Take one repeat."""
        try:
            self.rounds.append(self._round())
        except SparseExpError as error:
            self.error = error
            _log.warning("%s cannot be measured: %s", self.cell.name, error)
            self.release()

    def settle(self, earlier: list[Round]) -> None:
        """Keep the steadier set of repeats, and the speeds of the other; the earlier set if the cell died."""
        later, self.rounds = self.rounds, earlier
        if self.error is not None:
            self.error = None
            return
        self.rounds, other = sorted((earlier, later), key=self._spread)
        self.discarded = Measurement(self.cell, other).each

    def _round(self) -> Round:
        setting, hardware = self.tuned.setting or Setting(), self._hardware
        fresh = self.tuned.engine is None or not self.rounds
        if self.tuned.engine is None:
            self.tuned.engine = self._opened(setting)
        engine, steal = self.tuned.engine, Steal()
        timing = engine.measure(
            self._images,
            hardware.duration_s,
            warmup=hardware.warmup_s,
            max_warmup=max(hardware.warmup_s, hardware.max_warmup_s) if fresh else None,
            streams=setting.streams,
        )
        self._peak, self._version = max(self._peak, engine.peak_rss_mb()), engine.version
        stable = timing.stable or not fresh  # later warm-ups have a fixed length
        return Round(timing.latencies, timing.wall, timing.warmed, stable, steal.share())

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
            pin=physical_cpus()[: load.cores] if self._hardware.pinning else None,
        )
        return engine

    def measurement(self, conditions: dict[str, Any]) -> Measurement:
        """The cell's repeats with their conditions."""
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
            "discarded": self.discarded,
            "size_mb": round(megabytes(self.cell.model or Path()), 3),
        }
        return Measurement(
            self.cell, self.rounds, self._peak, self.spreads_too_much, conditions={**own, **conditions}
        )


def _measure(slots: list[_Slot], hardware: HardwareConfig) -> None:
    with progress("Benchmark", total=len(slots) * (1 + hardware.repeats), unit="measurements") as bar:
        keep = True
        for slot in slots:
            bar.advance(0, note=f"preparing {slot.cell.name}")
            slot.prepare()
            keep = _keep_loaded(slots, keep=keep)
            bar.advance()
        keep = _in_turns(slots, hardware.repeats, keep=keep, bar=bar)
    _repeat_noisy(slots, hardware.repeats, keep=keep)


def _keep_loaded(slots: Sequence[_Slot], *, keep: bool) -> bool:
    """Whether engines stay loaded between repeats; as soon as memory is short, all are released."""
    keep = keep and free_memory_share() >= _SPARE_MEMORY
    if not keep:
        for slot in slots:
            slot.release()
    return keep


def _in_turns(slots: Sequence[_Slot], repeats: int, *, keep: bool, bar: Any) -> bool:
    """Measure each cell ``repeats`` times; returns whether engines still stay loaded."""
    for _ in range(repeats):
        for slot in slots:
            bar.advance(0, note=slot.cell.name)
            if slot.alive:
                slot.measure()
                keep = _keep_loaded(slots, keep=keep)  # some take most of their memory when they first run
            bar.advance()
    return keep


def _repeat_noisy(all_slots: Sequence[_Slot], repeats: int, *, keep: bool) -> None:
    """Measure cells again that spread too much, and keep what spreads less, whether it is faster or not."""
    slots = [slot for slot in all_slots if slot.spreads_too_much]
    for done in (slot for slot in all_slots if slot not in slots):
        done.release()
    if not slots:
        return
    _log.info("Measuring again what spread too much: %s.", ", ".join(slot.cell.name for slot in slots))
    before = [slot.rounds for slot in slots]
    for slot in slots:
        slot.rounds = []
    with progress("Again", total=len(slots) * repeats, unit="measurements") as bar:
        _in_turns(slots, repeats, keep=keep, bar=bar)
    for slot, rounds in zip(slots, before, strict=True):
        slot.settle(rounds)


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
        "imgsz": int(images.shape[-1]),
        "pinning": hardware.pinning,
        "warmup_s": hardware.warmup_s,
        "max_warmup_s": hardware.max_warmup_s,
        "duration_s": hardware.duration_s,
        "repeats": hardware.repeats,
        "max_spread": hardware.max_spread,
    }


def _warn_of_noise(measurements: Sequence[Measurement]) -> None:
    noisy = [one.cell.name for one in measurements if one.noisy]
    if noisy:
        _log.warning("Noisy, though measured again: %s. Let nothing else run.", ", ".join(noisy))
    stolen = max((one.steal for each in measurements for one in each.rounds), default=0.0)
    if stolen > _STOLEN:
        _log.warning("A hypervisor took up to %.0f %% of the time: this host is shared.", 100 * stolen)
