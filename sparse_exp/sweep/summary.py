"""What a sweep ends with: a table of its jobs, the Pareto front, pictures, and why jobs failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_exp.compare.comparison import FINISHED, Comparison, compare
from sparse_exp.compare.files import write_files
from sparse_exp.compare.table import as_markdown, said, terminal_table
from sparse_exp.errors import ConfigError
from sparse_exp.files import read_json
from sparse_exp.runs.directory import MANIFEST, find_directories
from sparse_exp.runs.past import PastRun, read_run
from sparse_exp.text import plain_text

FOLDER = "compare"
# What is laid against each other where no objectives are given: the first that the jobs have.
_ACROSS = ("items_per_s", "size/onnx_gzip_mb", "sparsity/prunable", "time/train_s")
_UP = ("map50", "val/map50_95", "sparsity/total")


@dataclass(frozen=True)
class Summary:
    """The jobs of a sweep beside each other.

    Attributes:
        jobs: that were started, by number.
        failures: a line for each that did not finish: which, and why.
        comparison: None where no job has anything to compare.
    """

    jobs: tuple[PastRun, ...]
    failures: tuple[str, ...]
    comparison: Comparison | None

    @property
    def text(self) -> str:
        """For the terminal, in plain text of 100 columns."""
        table = _as_text(self.comparison) if self.comparison else ""
        return "\n".join([f"\n{self.headline}", *([table] if table else []), *self.failures])

    @property
    def markdown(self) -> str:
        """For the note of the sweep's run in the tracker."""
        table = as_markdown(self.comparison).partition("\n")[2].strip() if self.comparison else ""
        gaps = "\n".join(f"- {line}" for line in self.failures)
        return "\n\n".join(part for part in (f"**{self.headline}**", table, gaps) if part) + "\n"

    @property
    def headline(self) -> str:
        """How many jobs finished."""
        finished = sum(job.status == FINISHED for job in self.jobs)
        return f"{finished} of {len(self.jobs)} jobs finished"

    def write(self, sweep: Path) -> None:
        """Write the comparison's files into `FOLDER` of the sweep's directory."""
        if self.comparison:
            write_files(self.comparison, sweep / FOLDER)


def summarize(sweep: Path, objectives: Sequence[str] = ()) -> Summary:
    """Read the jobs of a sweep.

    Args:
        sweep: its directory.
        objectives: metrics to lay against each other, in full or short: first that of the vertical axis.
    """
    manifests = {path: read_json(path / MANIFEST) for path in find_directories(sweep)}
    jobs = sorted((m["job"], path) for path, m in manifests.items() if m.get("job") is not None)
    read = [(path, read_run(path)) for _, path in jobs]
    runs = [(path, run) for path, run in read if run is not None]
    failures = [
        f"{path.name} {run.status}: {manifests[path].get('failure') or 'its process is gone'}"
        for path, run in runs
        if run.status != FINISHED
    ]
    found = tuple(run for _, run in runs)
    return Summary(found, tuple(failures), _comparison(found, objectives))


def _comparison(runs: Sequence[PastRun], objectives: Sequence[str]) -> Comparison | None:
    for x, y in _axes(objectives):
        try:
            return compare(runs, x, y)
        except ConfigError:  # the jobs do not have one of these; without jobs there is nothing at all
            continue
    return None


def _axes(objectives: Sequence[str]) -> Iterator[tuple[str, str]]:
    for y in (*objectives[:1], *_UP):
        for x in (*objectives[1:2], *_ACROSS):
            yield x, y


def _as_text(comparison: Comparison) -> str:
    table = plain_text(terminal_table(comparison, comparison.rows), width=100)
    return "\n".join([table, *said(comparison)])
