"""Settings that an earlier search found, so that the same search is not made for every run.

A setting belongs to what it was found for: the host, the engine and its version, the load, the search, and
the kind of file. Networks that differ in their weights alone are of one kind; the variant is a part of it, as
zeros are no part of the graph.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_exp.benchmark.cells import Cell
from sparse_exp.benchmark.tuning import Setting, Space, Tuned, stream_counts
from sparse_exp.config.imgsz import Imgsz
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.files import fingerprint, read_json, remove_left_parts, write_json
from sparse_exp.hardware import host_facts

_log = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Remembered:
    """The result of an earlier search.

    Attributes:
        setting: the fastest.
        version: of the engine that it was found with.
        tries: as `Tuned.tries`.
        searched: when that was, as ISO 8601.
    """

    setting: Setting
    version: str
    tries: list[dict[str, Any]]
    searched: str


def file_of(folder: Path, cell: Cell, hardware: HardwareConfig, imgsz: Imgsz, space: Space) -> Path:
    """The file in which the setting of a cell is kept.

    Args:
        folder: of all such files.
        cell: with its model.
        hardware: how settings are searched for.
        imgsz: size of the images.
        space: returns the options worth a try with a number of streams.
    """
    facts = host_facts()
    candidates = {str(count): space(count) for count in stream_counts(cell.load)}
    search = hardware.tune_s, hardware.warmup_s, hardware.pinning, hardware.max_disturbance, candidates
    load = cell.load._replace(key="")  # a name only
    network = cell.engine, cell.variant, _kind(cell.model), imgsz
    return folder / f"{fingerprint(network, load, search, facts.cpu, facts.isa, _FORMAT)}.json"


def recall(file: Path) -> Remembered | None:
    """What is kept in a file; None where nothing is, or nothing that can be read."""
    kept = read_json(file)
    try:
        setting = Setting(int(kept["streams"]), dict(kept["options"]))
        return Remembered(setting, str(kept["version"]), list(kept["tries"]), str(kept["searched"]))
    except (KeyError, TypeError, ValueError):
        return None


def keep(file: Path, tuned: Tuned, version: str) -> None:
    """Write down what a search found; where that is not possible, the next run searches again."""
    if tuned.setting is None:
        return
    kept = {
        "streams": tuned.setting.streams,
        "options": dict(tuned.setting.options),
        "version": version,
        "tries": tuned.tries,
        "searched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        remove_left_parts(file.parent)
        write_json(file, kept)
    except OSError as error:
        _log.debug("The setting is not kept: %s", error)


def _kind(model: Path | None) -> str:
    """What files have in common that differ in their weights alone."""
    if model is None or model.suffix != ".onnx":
        return "" if model is None else f"{model.suffix} {round(model.stat().st_size, -5)}"
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    weights = [(list(one.dims), one.data_type) for one in graph.initializer]
    return fingerprint([node.op_type for node in graph.node], weights)
