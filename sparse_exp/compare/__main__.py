"""``python -m sparse_exp.compare``: runs side by side, and the one to ship."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.compare.comparison import Comparison, compare
from sparse_exp.compare.files import write_files
from sparse_exp.compare.table import as_data, remarks, shown_rows, terminal_table
from sparse_exp.config.places import add_place_options, chosen_places
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import as_json, remove_parts
from sparse_exp.locks import alone_in
from sparse_exp.runs.past import select_runs

_ROWS = 40
_TEXT = """
METRIC is a name of result.json, or a part of one: train_s, openvino/items_per_s. Where several metrics fit,
the one of the validation split, of the deployed variant, of DeepSparse, of batch 1 is taken; size is that of
the compressed ONNX file. The lines below the table give the full names.

  python -m sparse_exp.compare                                             all runs below outputs
  python -m sparse_exp.compare outputs/sweeps/model-recipe-1f09c3 --out outputs/compare
  python -m sparse_exp.compare --experiment sparse_exp --x size --y map50
  python -m sparse_exp.compare --experiment sparse_exp --newest 200 --filter "tags.model = 'yolov5s'"
  python -m sparse_exp.compare --best "map50>=0.6, size<=4" --by items_per_s
"""


def main() -> int:
    """Read the runs, write the comparison's files, print the comparison."""
    options = _options()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    if (options.only or options.newest) and not options.experiment:
        raise ConfigError("--filter and --newest choose runs of an MLflow experiment. Add --experiment NAME.")
    runs = select_runs(
        options.runs,
        chosen_places(options),
        experiment=options.experiment,
        only=options.only,
        newest=options.newest,
    )
    comparison = compare(runs, options.x, options.y, limits=options.best, by=options.by)
    written: list[Path] = []
    try:
        if options.out:
            with alone_in(options.out, f"A comparison is being written into {options.out}"):
                remove_parts(options.out, below=False)  # of a killed process
                written = write_files(comparison, options.out)
    except OSError as error:
        do = "Name another directory."
        raise ConfigError(expected("--out", "a directory to write into", str(options.out), do)) from error
    if options.json:
        print(as_json(as_data(comparison)))
    else:
        _print_table(comparison, options.rows, written)
    return 0


def _print_table(comparison: Comparison, limit: int, written: list[Path]) -> None:
    rows = shown_rows(comparison, limit)
    left = len(comparison.rows) - len(rows)
    Console(highlight=False).print(terminal_table(comparison, rows))
    more = [f"{left} more runs are not shown; --rows {len(comparison.rows)} shows all."] if left else []
    # Not through the console, which would break a command where the window ends.
    print("\n".join([*more, *remarks(comparison), *(f"Written: {path}" for path in written)]))


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m sparse_exp.compare",
        description="Runs side by side: a table, the Pareto front, pictures, and the one to ship.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="directory of a run or a sweep, or an MLflow id of one")
    add("--experiment", metavar="NAME", help="all runs of an MLflow experiment")
    add(
        "--filter",
        metavar="TEXT",
        dest="only",
        default="",
        help="of these, as MLflow filters: \"tags.model = 'yolov5s'\"",
    )
    add("--newest", metavar="N", type=whole, help="of these, so many that started last")
    add("--x", metavar="METRIC", default="items_per_s", help="horizontal axis (default: %(default)s)")
    add("--y", metavar="METRIC", default="map50", help="vertical axis (default: %(default)s)")
    add("--best", metavar="LIMITS", help="name the best run within limits: 'map50>=0.6, size<=4'")
    add("--by", metavar="METRIC", help="the metric that the best run is chosen by (default: --y)")
    add("--out", metavar="DIR", type=Path, help="write compare.csv, .md, .png and .html there")
    add("--json", action="store_true", help="print the comparison as JSON instead of a table")
    add("--rows", metavar="N", type=int, default=_ROWS, help="rows to print besides the front (%(default)s)")
    add_place_options(parser, "uri", "store")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
