"""What a benchmark measures: cells, each an engine with one model under one load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import Impossible

ModelFor = Callable[[str, str], Path]


class Load(NamedTuple):
    """How an engine is used while it is measured.

    Attributes:
        key: its part of a metric's name: ``b1``, ``b16_throughput``, ``b1_async4_c1``.
        scenario: one of `sparse_exp.config.schema.SCENARIOS`.
        batch_size: images of one inference.
        streams: inferences at once; None: tuning finds the number that is fastest.
        cores: physical cores, all streams together.
    """

    key: str
    scenario: str
    batch_size: int
    streams: int | None
    cores: int


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        variant: one of `sparse_exp.config.schema.VARIANTS`.
        model: the file for the engine; None where there is none.
        load: how the engine is used.
        impossible: why the cell cannot be measured, as a sentence; empty where it can.
        network: name of the network, where several are measured together; else empty.
    """

    engine: str
    variant: str
    model: Path | None
    load: Load
    impossible: str = ""
    network: str = ""

    @property
    def name(self) -> str:
        """``<engine>/<variant>/<key>``, as in the names of metrics; after its network, if it has one."""
        return "/".join(filter(None, (self.network, self.engine, self.variant, self.load.key)))

    @property
    def batch_size(self) -> int:
        """Images of one inference."""
        return self.load.batch_size

    @property
    def scenario(self) -> str:
        """One of `sparse_exp.config.schema.SCENARIOS`."""
        return self.load.scenario

    @property
    def cores(self) -> int:
        """Physical cores, all streams together."""
        return self.load.cores


def loads_of(hardware: HardwareConfig, usable: int) -> list[Load]:
    """The loads under which each engine and each variant is measured.

    Sync takes each batch size; throughput each batch size with each number of streams; async one image
    with each number of streams, or with one stream per core.

    Args:
        hardware: scenarios, batch_sizes, streams and cores.
        usable: physical cores that may be used; taken if ``cores`` is empty.
    """
    return [
        _load(scenario, batch, streams, cores, first=position == 0)
        for position, cores in enumerate(hardware.cores or [usable])
        for scenario in hardware.scenarios
        for batch, streams in _batches_and_streams(hardware, scenario, cores)
    ]


def _batches_and_streams(
    hardware: HardwareConfig, scenario: str, cores: int
) -> Iterator[tuple[int, int | None]]:
    if scenario == "async":
        yield from ((1, streams) for streams in hardware.streams or [cores])
    elif scenario == "throughput":
        for batch in hardware.batch_sizes:
            yield from ((batch, streams) for streams in hardware.streams or (None,))
    else:
        yield from ((batch, 1) for batch in hardware.batch_sizes)


def _load(scenario: str, batch: int, streams: int | None, cores: int, *, first: bool) -> Load:
    key = f"b{batch}"
    if scenario == "async":
        key += f"_async{streams}"
    elif scenario == "throughput":
        key += "_throughput" + (f"_s{streams}" if streams else "")
    return Load(key if first else f"{key}_c{cores}", scenario, batch, streams, cores)


def cells_of(hardware: HardwareConfig, usable: int, model_for: ModelFor) -> list[Cell]:
    """Every cell that a target asks for; those with the same load follow one another.

    Args:
        hardware: the target.
        usable: physical cores that may be used.
        model_for: returns the file for an engine and a variant; raises `Impossible` if there is none.
    """
    files = {
        (engine, variant): _file_or_reason(model_for, engine, variant)
        for engine in hardware.engines
        for variant in hardware.variants
    }
    return [
        Cell(engine, variant, model, load, reason)
        for load in loads_of(hardware, usable)
        for (engine, variant), (model, reason) in files.items()
    ]


def _file_or_reason(model_for: ModelFor, engine: str, variant: str) -> tuple[Path | None, str]:
    try:
        return model_for(engine, variant), ""
    except Impossible as error:
        return None, str(error)
