"""Measure which learning rate and length suit a recipe, on several data sets and seeds.

A dense network that was trained badly flatters the sparse one, so its recipe is chosen as carefully. Runs
share everything but the rate, the length, the data and the seed. Finished runs in the output folder are kept,
so that a measurement that was stopped goes on.

    python benchmarks/rates.py --recipe dense --rates 0.0003 0.001 0.003 --write docs/results.md

Words of the form KEY=VALUE are overrides of every run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from series import log_of, make_run, parse

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.errors import StageFailed
from sparse_exp.files import read_json
from sparse_exp.hardware import host_facts
from sparse_exp.text import between_marks, markdown_table

_STAGES = "stages=[fetch,plan,train,evaluate]"


class Trial(NamedTuple):
    """A training: its data set, recipe, rate, length in epochs and seed."""

    dataset: str
    recipe: str
    rate: float
    epochs: int
    seed: int

    def map50(self, out: Path) -> float | None:
        """Of the best checkpoint on the validation split; None where the run has not finished."""
        directory = out / self.name
        if read_json(directory / "manifest.json").get("status") != "FINISHED":
            return None
        return float(read_json(directory / "result.json")["val/map50"])

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.dataset}-{self.recipe}-{self.rate:g}-{self.epochs}-{self.seed}"


def main() -> int:
    """Make the runs that are missing, then print the table or put it into a page."""
    options, overrides = _options()
    trials = [
        Trial(*values)
        for values in itertools.product(
            options.datasets, [options.recipe], options.rates, options.epochs, options.seeds
        )
    ]
    for trial in () if options.tables else trials:
        if trial.map50(options.out) is None:
            _make(trial, options.out, overrides)
    text = table(trials, options.out, overrides)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        mark = f"rates of {options.recipe}"
        options.write.write_text(between_marks(page, mark, text), encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="dense")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0003, 0.001, 0.003], help="init_lr")
    parser.add_argument("--epochs", nargs="+", type=whole, default=[12])
    parser.add_argument("--datasets", nargs="+", default=["trees", "digits"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="make no runs: the table of finished ones")
    parser.add_argument("--out", type=Path, default=Path("outputs/rates"), help="folder of the runs")
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    return parse(parser)


def _make(trial: Trial, out: Path, overrides: Sequence[str]) -> None:
    """Make a run in a process of its own.

    Raises:
        StageFailed: it has failed.
    """
    directory = out / trial.name
    words = [
        f"recipe={trial.recipe}",
        f"dataset={trial.dataset}",
        f"recipe.variables.init_lr={trial.rate:g}",
        f"recipe.variables.num_epochs={trial.epochs}",
        f"seed={trial.seed}",
        "recovery.baseline=none",
        _STAGES,
        *overrides,
    ]
    if make_run(directory, words):
        raise StageFailed(f"The run {directory} failed. Look at {log_of(directory)}, then start again.")


def table(trials: Sequence[Trial], out: Path, overrides: Sequence[str]) -> str:
    """The mean mAP50 of each data set, rate and length over the seeds, as Markdown."""
    rows = list(_rows(trials, out))
    seeds = ", ".join(dict.fromkeys(str(trial.seed) for trial in trials))
    how = f"recipe={trials[0].recipe} {' '.join(overrides)}".strip()
    titles = ("data set", "epochs", "init_lr", "mAP50, mean", "standard deviation", "each")
    page = markdown_table(titles, rows)
    return f"`{how}`, seeds {seeds}, on {host_facts().cpu}:\n\n{page}\n"


def _rows(trials: Sequence[Trial], out: Path) -> Iterator[tuple[str, ...]]:
    groups = itertools.groupby(trials, lambda trial: (trial.dataset, trial.epochs, trial.rate))
    for (dataset, epochs, rate), group in groups:
        each = [found for trial in group if (found := trial.map50(out)) is not None]
        if not each:
            continue
        spread = f"{statistics.stdev(each):.3f}" if len(each) > 1 else "-"
        shown = ", ".join(f"{value:.3f}" for value in each)
        yield dataset, str(epochs), f"{rate:g}", f"{statistics.fmean(each):.3f}", spread, shown


if __name__ == "__main__":
    run_command(main)
