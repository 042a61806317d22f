"""The settings with which the benchmark of a model's run found its engine fastest, where they hold here."""

from __future__ import annotations

from typing import Any

from sparse_exp.engines import create_engine
from sparse_exp.files import parse_json
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.predict.models import Model

_BESIDE = ("benchmark.json", "logs/benchmark.json")  # of a run, of a published model


def tuned(model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    """Add the options of the engine, and the number of streams where none is asked for.

    They are taken from a measurement of this file in this engine on such a CPU, with as many images in a
    batch and as many cores. Where there are several, the fastest counts; where there is none, there are no
    options, and one stream.

    Args:
        model: what is about to be loaded.
        settings: ``batch_size``, ``cores`` and ``streams``, of which the last two may be None.

    Returns:
        The settings with ``options`` and ``streams``.
    """
    wanted = {
        "engine": model.engine,
        "model": model.path.name,
        "batch": settings["batch_size"],
        "cores": settings["cores"] or usable_physical_cores(),
        "cpu": host_facts().cpu,
    }
    if settings["streams"] is not None:
        wanted["streams"] = settings["streams"]
    rows = [row for row in _rows(model) if all(row.get(key) == value for key, value in wanted.items())]
    rows = [row for row in rows if isinstance(row.get("items_per_s"), float | int) and _is_known(row)]
    best = max(rows, key=lambda row: float(row["items_per_s"]), default={})
    streams = settings["streams"] or best.get("streams", 1)
    return {**settings, "streams": streams, "options": best.get("options", {})}


def _rows(model: Model) -> list[dict[str, Any]]:
    """The rows of the benchmark that lies beside a model; empty where there is none that can be read."""
    for place in model.path.absolute().parents[:2]:
        for name in _BESIDE:
            try:
                rows = parse_json((place / name).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return []


def _is_known(row: dict[str, Any]) -> bool:
    """Whether streams and options of a row are such as the engine has now."""
    choices, options = create_engine(row["engine"]).choices, row.get("options")
    if not isinstance(options, dict) or not isinstance(row.get("streams"), int) or row["streams"] < 1:
        return False
    return all(name in choices and value in choices[name] for name, value in options.items())
