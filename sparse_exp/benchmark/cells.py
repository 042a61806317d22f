"""What is to be measured: an engine with one model, under one load, on so many cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import Impossible

ModelFor = Callable[[str, str], Path]


class Load(NamedTuple):
    """How an engine is asked: a row of the benchmark but for its engine and its variant.

    Attributes:
        key: its part of a metric's name: ``b1``, ``b16_throughput``, ``b1_async4_c1``.
        scenario: one of `sparse_exp.config.schema.SCENARIOS`.
        batch_size: images of one inference.
        streams: inferences at once; None: as many as serve best, which tuning finds.
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
        model: the file that suits the engine; None where it is impossible.
        load: how the engine is asked.
        impossible: why there is nothing to measure, as a sentence; empty where there is.
        network: which network it is, where several are measured together; else empty.
    """

    engine: str
    variant: str
    model: Path | None
    load: Load
    impossible: str = ""
    network: str = ""

    @property
    def name(self) -> str:
        """``<engine>/<variant>/<key>``, as in the names of metrics; after its network, where it has one."""
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
    """What each engine and each variant is asked for.

    Sync takes each batch size; throughput each batch size with each number of streams; async one image
    with each number of streams, or one stream per core.

    Args:
        hardware: scenarios, batch_sizes, streams and cores.
        usable: physical cores that may be used; taken where ``cores`` is empty.
    """
    return [
        _named(scenario, batch, streams, cores, first=position == 0)
        for position, cores in enumerate(hardware.cores or [usable])
        for scenario in hardware.scenarios
        for batch, streams in _asked(hardware, scenario, cores)
    ]


def _asked(hardware: HardwareConfig, scenario: str, cores: int) -> Iterator[tuple[int, int | None]]:
    if scenario == "async":
        yield from ((1, streams) for streams in hardware.streams or [cores])
    elif scenario == "throughput":
        for batch in hardware.batch_sizes:
            yield from ((batch, streams) for streams in hardware.streams or (None,))
    else:
        yield from ((batch, 1) for batch in hardware.batch_sizes)


def _named(scenario: str, batch: int, streams: int | None, cores: int, *, first: bool) -> Load:
    key = f"b{batch}"
    if scenario == "async":
        key += f"_async{streams}"
    elif scenario == "throughput":
        key += "_throughput" + (f"_s{streams}" if streams else "")
    return Load(key if first else f"{key}_c{cores}", scenario, batch, streams, cores)


def cells_of(hardware: HardwareConfig, usable: int, model_for: ModelFor) -> list[Cell]:
    """Every cell that a target asks for, those that can be compared beside each other.

    Args:
        hardware: the target.
        usable: physical cores that may be used.
        model_for: the file for an engine and a variant; raises `Impossible` where there is none.
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
