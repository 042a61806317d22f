r"""Measure model files side by side without an experiment, and print tables of the measurements.

    python benchmarks/square.py --cell s=onnxruntime:dense:dense.onnx \
        --cell s-85=deepsparse:sparse:model.onnx --batch 1 32 --scenario sync throughput --out square.json
    python benchmarks/square.py --table square.json other.json

A cell is NETWORK=ENGINE:VARIANT:FILE. Networks whose names are equal up to the first hyphen are compared:
``s-85`` and ``s-85-block4`` with the baselines of ``s``. Of the project's dependencies the script needs only
numpy, onnx, psutil, rich and the engines of the cells.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from sparse_exp.benchmark import Cell, Row, benchmark, loads_of
from sparse_exp.benchmark.measurements import measured
from sparse_exp.benchmark.speed_table import impossible_lines, options_table, speed_table
from sparse_exp.command import Parser, amount, run_command, whole
from sparse_exp.config.imgsz import Imgsz, imgsz_of, in_words, parse_imgsz, sides
from sparse_exp.config.schema import ENGINES, SCENARIOS, VARIANTS, HardwareConfig
from sparse_exp.engines.base import check_images
from sparse_exp.engines.signature import read_signature
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import write_json, write_text
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.text import between_marks, markdown_table

MARK = "square"


class Spec(NamedTuple):
    """A cell of ``--cell``."""

    network: str
    engine: str
    variant: str
    model: Path


def main() -> int:
    """Measure, or print tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _options()
    _page(options, "")  # fail before the measurement where the page cannot take the tables
    text = tables(_read(options.table) if options.table else _measure(options))
    if options.write:
        write_text(options.write, _page(options, text))
    else:
        sys.stdout.write(text)
    return 0


def _options() -> argparse.Namespace:
    defaults = HardwareConfig(name="square")
    parser = Parser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cell", action="append", type=_spec, help="NETWORK=ENGINE:VARIANT:FILE; repeated")
    what.add_argument("--table", nargs="+", type=Path, help="files of --out, to print and measure nothing")
    parser.add_argument("--batch", nargs="+", type=whole, default=[1])
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["sync"])
    parser.add_argument("--cores", nargs="*", type=whole, default=[], help="default: all physical ones")
    parser.add_argument("--streams", nargs="*", type=whole, default=[], help="default: what tuning finds")
    pixels = parser.add_mutually_exclusive_group()
    pixels.add_argument(
        "--imgsz", type=parse_imgsz, help="640, or 384,640 (height, width); default: of the first ONNX file"
    )
    pixels.add_argument("--images", type=Path, help="uint8 (N, 3, H, W) in a .npy file; default: noise")
    parser.add_argument("--seconds", type=amount, default=defaults.duration_s, help="of one measurement")
    parser.add_argument("--repeats", type=whole, default=defaults.repeats)
    parser.add_argument("--warmup", type=amount, default=defaults.warmup_s, help="seconds at least")
    parser.add_argument("--max-warmup", type=amount, default=defaults.max_warmup_s, help="seconds at most")
    parser.add_argument("--precision", type=amount, default=defaults.precision, help="of ratios, a share")
    parser.add_argument("--budget-s", type=amount, default=defaults.budget_s, help="seconds of all turns")
    parser.add_argument(
        "--tune-s", type=amount, default=defaults.tune_s, help="seconds of each try; 0: no tries"
    )
    parser.add_argument("--no-pinning", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--write", type=Path, help="page to put the tables into, between its marks")
    parser.add_argument("--mark", default=MARK, help="name of the marks")
    return parser.parse_args()


def _spec(text: str) -> Spec:
    network, _, rest = text.partition("=")
    parts = rest.split(":", 2)
    if not network or len(parts) != 3 or parts[0] not in ENGINES or parts[1] not in VARIANTS:
        choices = f"ENGINE one of {', '.join(ENGINES)}; VARIANT one of {', '.join(VARIANTS)}"
        raise argparse.ArgumentTypeError(f"expected NETWORK=ENGINE:VARIANT:FILE ({choices}), got {text!r}")
    return Spec(network, parts[0], parts[1], Path(parts[2]))


def _page(options: argparse.Namespace, text: str) -> str:
    """The page of ``--write`` with the tables; empty without ``--write``."""
    try:
        page = options.write.read_text(encoding="utf-8") if options.write else ""
        return between_marks(page, options.mark, text) if options.write else ""
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{options.write} cannot take the tables: {error}. Correct --write or --mark."
        ) from error


def _read(files: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows += [row for row in found if row["engine"] in ENGINES]
        except (OSError, ValueError, KeyError, TypeError) as error:
            do = "Give what --out, or a run as benchmark.json, has written."
            raise ConfigError(expected("a file of --table", "rows of a benchmark", str(file), do)) from error
    return rows


def _measure(options: argparse.Namespace) -> list[Row]:
    hardware = _hardware(options)
    cells = [
        Cell(spec.engine, spec.variant, spec.model, load, network=spec.network)
        for load in loads_of(hardware, usable_physical_cores())
        for spec in options.cell
    ]
    images = _images(options, max(32, *options.batch))
    rows = [one.row() for one in benchmark(cells, images, hardware=hardware)]
    if options.out:
        write_json(options.out, rows)
    return rows


def _hardware(options: argparse.Namespace) -> HardwareConfig:
    usable = usable_physical_cores()
    if max(options.cores, default=1) > usable:
        raise ConfigError(
            expected("--cores", f"at most the {usable} of this host", options.cores, "Correct it.")
        )
    if absent := next((spec.model for spec in options.cell if not spec.model.is_file()), None):
        raise ConfigError(expected("the file of --cell", "there", str(absent), "Correct its path."))
    return HardwareConfig(
        name="square",
        scenarios=options.scenario,
        cores=options.cores,
        batch_sizes=options.batch,
        streams=options.streams,
        tune=options.tune_s > 0,
        tune_s=options.tune_s or 1.0,
        pinning=not options.no_pinning,
        warmup_s=options.warmup,
        max_warmup_s=options.max_warmup,
        duration_s=options.seconds,
        repeats=options.repeats,
        precision=options.precision,
        budget_s=options.budget_s,
    )


def _images(options: argparse.Namespace, count: int) -> np.ndarray:
    if options.images:
        try:
            loaded: np.ndarray = np.load(options.images)
        except (OSError, ValueError) as error:
            do = "Write them with numpy.save."
            raise ConfigError(expected("--images", "a .npy file", str(options.images), do)) from error
        check_images(loaded)
        return loaded
    size = options.imgsz or _size_of([spec.model for spec in options.cell])
    return np.random.default_rng(0).integers(0, 256, (count, 3, *sides(size)), np.uint8)


def _size_of(models: Sequence[Path]) -> Imgsz:
    for model in models:
        if model.suffix == ".onnx" and (size := read_signature(model).size):
            return imgsz_of(size)
    do = "Give --imgsz, or correct the paths of the cells."
    raise ConfigError(expected("a cell's file", "an ONNX file, which tells its image size", models[0], do))


def tables(rows: Sequence[Row]) -> str:
    """The speeds, the settings, the cells that could not be measured, and the conditions, as Markdown."""
    parts = [
        markdown_table(*speed_table(rows)),
        markdown_table(*options_table(rows)),
        "\n".join(f"- {line}" for line in impossible_lines(rows)),
        *_conditions(measured(rows)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _conditions(rows: Sequence[Row]) -> list[str]:
    """A sentence on engines, host and protocol for each measurement that the rows come from."""
    engines: dict[str, dict[str, None]] = {}
    for row in rows:
        before: dict[str, Any] = row["before"]
        sentence = (
            f"{row['cpu']} ({', '.join(row['isa'])}), {in_words(row['imgsz'])} px, median of at "
            f"least {row['repeats']} repeats in turns of {row['duration_s']:g} s; before: load average "
            f"{before['load_average']}, other programs on {before['busy_cores']} cores; "
            f"{row['started'][:16]} to {row['ended'][:16]} UTC."
        )
        engines.setdefault(sentence, {})[f"{row['engine']} {row['version']}"] = None
    return [f"{', '.join(names)}; {sentence}" for sentence, names in engines.items()]


if __name__ == "__main__":
    run_command(main)
