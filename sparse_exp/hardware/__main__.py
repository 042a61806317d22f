"""``python -m sparse_exp.hardware``: facts about this host, and which hardware targets fit it."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console

from sparse_exp.command import Parser, run_command
from sparse_exp.config.imgsz import in_words
from sparse_exp.config.plain import options
from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.hardware import HostFacts, host_facts, usable_physical_cores
from sparse_exp.hardware.cgroups import cpu_quota
from sparse_exp.hardware.deepsparse import find_deepsparse
from sparse_exp.hardware.targets import NOT_INSTALLED, compare, prefers, unusable
from sparse_exp.text import console_table

if TYPE_CHECKING:
    from rich.table import Table

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_TEXT = """
A target is chosen with hardware=NAME, for example:

  python -m sparse_exp hardware=latency dry_run=true
  python -m sparse_exp hardware=avx512_vnni hardware.strict=false    measured although it does not fit here
"""


def main() -> int:
    """Print what `facts_of_host`, `engines_here` and `targets_here` find."""
    parser = Parser(
        prog="python -m sparse_exp.hardware",
        description="Facts of this host, the engines that run on it, and the hardware targets that fit it.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    as_json = parser.parse_args().json
    host = host_facts()
    facts, engines, targets = facts_of_host(host), engines_here(host), targets_here(host)
    if as_json:
        print(json.dumps({"host": facts, "engines": engines, "targets": targets}, indent=2))
    else:
        _show(facts, engines, targets)
    return 0


def facts_of_host(host: HostFacts) -> dict[str, Any]:
    """The facts about this host that a measured number depends on.

    Args:
        host: the facts that every run records; those that may change by the minute are added.

    Returns:
        Those of `HostFacts`; ``logical_cores`` of the machine; ``usable_physical_cores``, which engines run
        on; ``quota_cores`` of a container, None without one; ``memory_available_gb``;
        ``frequency_mhz`` and ``max_frequency_mhz``, None where the system does not tell; ``governor``;
        ``load_average`` of the last minute.
    """
    frequency = psutil.cpu_freq()
    return {
        **asdict(host),
        "isa": list(host.isa),
        "logical_cores": psutil.cpu_count() or 1,
        "usable_physical_cores": usable_physical_cores(),
        "quota_cores": cpu_quota(),
        "memory_available_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "frequency_mhz": round(frequency.current) if frequency else None,
        "max_frequency_mhz": round(frequency.max) or None if frequency else None,
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        "load_average": round(os.getloadavg()[0], 2),
    }


def engines_here(host: HostFacts) -> list[dict[str, Any]]:
    """The engines, each with its version and licence, why it cannot run here, and how to get it."""
    return [_engine(engine, unusable(engine, host)) for engine in RUNTIMES]


def _engine(name: str, problem: str | None) -> dict[str, Any]:
    runtime, found = RUNTIMES[name], find_deepsparse() if name == "deepsparse" else None
    install = f"Run: pip install '{runtime.requirement}'." if problem == NOT_INSTALLED else ""
    return {
        "engine": name,
        "version": (found.version or None) if found else _version(name),
        "licence": runtime.licence,
        "production": runtime.production,
        "problem": problem,
        "install": found.do if found else install,
    }


def targets_here(host: HostFacts) -> list[dict[str, Any]]:
    """The shipped targets, each with what does not fit and the recipes that suit it."""
    return [_target(name, target, host) for name, target in options("hardware", HardwareConfig).items()]


def _target(name: str, target: HardwareConfig, host: HostFacts) -> dict[str, Any]:
    found, preference = compare(target, host), prefers(target, host)
    return {
        "target": name,
        "fits": not any(mismatch.refused for mismatch in found),
        "mismatch": [mismatch.clause for mismatch in found],
        "engines": target.engines,
        "scenarios": target.scenarios,
        "batch_sizes": target.batch_sizes,
        "cores": target.cores,
        "imgsz": target.imgsz,
        "isa": target.isa,
        "production": target.production,
        "recipes": list(preference.recipes),
        "why": preference.why,
    }


def _version(engine: str) -> str | None:
    try:
        return version(engine)
    except PackageNotFoundError:
        return None


def _show(facts: dict[str, Any], engines: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    for part in (_host_table(facts), _engine_table(engines), _target_table(targets)):
        console.print(part)
    print("\n".join([*_missing_lines(engines), *_unfit_lines(targets), "", *_reasons(targets)]))


def _missing_lines(engines: list[dict[str, Any]]) -> list[str]:
    return [f"{row['engine']}: {row['problem']}. {row['install']}" for row in engines if row["install"]]


def _unfit_lines(targets: list[dict[str, Any]]) -> list[str]:
    unfit = [row for row in targets if not row["fits"]]
    return [f"{row['target']} does not fit: {'; '.join(row['mismatch'])}." for row in unfit]


def _reasons(targets: list[dict[str, Any]]) -> list[str]:
    """Why these recipes suit: a reason that several targets share is given once."""
    reasons: dict[str, list[str]] = {}
    for row in targets:
        reasons.setdefault(row["why"], []).append(row["target"])
    return [
        "Why these recipes:",
        *(f"{', '.join(names)}: {why}." for why, names in reasons.items()),
    ]


def _host_table(facts: dict[str, Any]) -> Table:
    quota = facts["quota_cores"]
    cores = (
        f"{facts['physical_cores']} physical, {facts['logical_cores']} logical; {facts['usable_cores']} "
        f"logical for this process, {'no quota' if quota is None else f'quota of {quota:g}'}"
    )
    frequency = f"{facts['frequency_mhz']} MHz now" if facts["frequency_mhz"] else "unknown"
    frequency += f", at most {facts['max_frequency_mhz']} MHz" if facts["max_frequency_mhz"] else ""
    frequency += f", governor {facts['governor']}" if facts["governor"] else ""
    rows = {
        "CPU": facts["cpu"],
        "instruction sets": ", ".join(facts["isa"]) or "none of those that count",
        "cores": cores,
        "engines run on": f"{facts['usable_physical_cores']} cores",
        "frequency": frequency,
        "memory": f"{facts['memory_gb']:g} GB, {facts['memory_available_gb']:g} GB available",
        "load average": f"{facts['load_average']:g} in the last minute",
        "system": f"{facts['os']}, Python {facts['python']}",
    }
    return console_table(("This host", ""), rows.items())


def _engine_table(engines: list[dict[str, Any]]) -> Table:
    rows = [
        (
            row["engine"],
            row["version"] or "-",
            row["licence"],
            "yes" if row["production"] else "no",
            _runs(row),
        )
        for row in engines
    ]
    return console_table(("Engine", "version", "licence", "in production", "runs here"), rows)


def _runs(engine: dict[str, Any]) -> str:
    """Whether an engine runs here; the lines below the tables say why one cannot be used."""
    short = not engine["install"] or engine["problem"] == NOT_INSTALLED
    return (engine["problem"] or "yes") if short else "no"


def _target_table(targets: list[dict[str, Any]]) -> Table:
    rows = [
        (
            row["target"],
            "yes" if row["fits"] else "no",
            _needs(row),
            f"{', '.join(row['scenarios'])}\nbatch {', '.join(map(str, row['batch_sizes']))}",
            "\n".join(row["recipes"][:2]),
        )
        for row in targets
    ]
    return console_table(("Target", "fits", "needs", "measures", "recipes, best first"), rows)


def _needs(target: dict[str, Any]) -> str:
    """What a target asks of the host, the data and the licences, besides its engines."""
    cores = [f"{max(target['cores'])} cores"] if target["cores"] else []
    size = [f"{in_words(target['imgsz'])} px"] if target["imgsz"] else []
    licence = ["production use"] if target["production"] else []
    return ", ".join([*target["isa"], *cores, *size, *licence])


if __name__ == "__main__":
    run_command(main)
