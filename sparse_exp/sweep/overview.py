"""The overview that a sweep ends with: a table of its jobs, Pareto front, pictures, and why jobs failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from sparse_exp.compare.comparison import FINISHED, Comparison, compare
from sparse_exp.compare.files import write_files
from sparse_exp.compare.shipping import Shipping, shipping
from sparse_exp.compare.table import as_markdown, remarks, terminal_table
from sparse_exp.errors import ConfigError
from sparse_exp.files import read_json
from sparse_exp.runs.directory import Run, find_directories
from sparse_exp.runs.past import DIED, PastRun, read_run
from sparse_exp.sweep.parent import read_state
from sparse_exp.text import plain_text

FOLDER = "compare"
REFUSED = "refused.json"
"""In the directory of a job that finished before, and was refused the last time: the reason."""
# The axes without objectives: the first of each that the jobs have.
_X_METRICS = ("items_per_s", "size/onnx_gzip_mb", "sparsity/prunable", "time/train_s")
_Y_METRICS = ("map50", "val/map50_95", "sparsity/total")


@dataclass(frozen=True)
class Overview:
    """The jobs of a sweep side by side.

    Attributes:
        jobs: the runs of the jobs that were started, by number.
        failures: for each job that did not finish a line with its name and the reason.
        comparison: None where the jobs have no two metrics to compare.
        shipping: the files that the jobs measured, and the one to ship; None where that was not asked for, or
            nothing was measured.
        others: jobs in the directory that another command has left there, and this one does not have.
    """

    jobs: tuple[PastRun, ...]
    failures: tuple[str, ...]
    comparison: Comparison | None
    shipping: Shipping | None = None
    others: int = 0

    @property
    def text(self) -> str:
        """The overview for the terminal, as plain text of 100 columns."""
        table = _as_text(self.comparison) if self.comparison else ""
        ship = self.shipping.lines if self.shipping else []
        return "\n".join([f"\n{self.headline}", *([table] if table else []), *self.failures, *ship])

    @property
    def markdown(self) -> str:
        """The overview for the note of the sweep's run in the tracker, as Markdown."""
        table = as_markdown(self.comparison).partition("\n")[2].strip() if self.comparison else ""
        failures = "\n".join(f"- {line}" for line in self.failures)
        ship = self.shipping.lines if self.shipping else []
        return "\n\n".join(part for part in (f"**{self.headline}**", *ship, table, failures) if part) + "\n"

    @property
    def headline(self) -> str:
        """How many jobs finished."""
        finished = sum(job.status == FINISHED for job in self.jobs)
        others = f"; {self.others} more in its directory are of another command" if self.others else ""
        return f"{finished} of {len(self.jobs)} jobs finished{others}"

    def write(self, sweep: Path) -> None:
        """Write the files of the comparison, and of what to ship, into `FOLDER` of the sweep's directory."""
        if self.comparison:
            write_files(self.comparison, sweep / FOLDER)
        if self.shipping:
            self.shipping.write(sweep / FOLDER)


def read_overview(sweep: Path, objectives: Sequence[str] = (), max_loss: float | None = None) -> Overview:
    """Read the jobs of a sweep.

    Args:
        sweep: its directory.
        objectives: the metrics of the vertical and of the horizontal axis, in full or short.
        max_loss: see `sparse_exp.compare.shipping.shipping`; None: nothing is chosen.
    """
    runs = [run for path in find_directories(sweep) if (run := Run.find(path))]
    all_jobs = [run for run in runs if run.state.get("job") is not None]
    refused = {run.path: str(read_json(run.path / REFUSED).get("reason", "")) for run in all_jobs}
    known = (None, "", read_state(sweep).get("jobs_of"))  # those before 0.2 do not say whose job they are
    jobs = [run for run in all_jobs if refused[run.path] or run.state.get("sweep_command") in known]
    jobs.sort(key=lambda run: run.state["job"])
    failures = [
        f"{run.path.name} refused: {refused[run.path]}"
        if refused[run.path]
        else f"{run.path.name} {run.status}: {run.state.get('failure') or _without_reason(run)}"
        for run in jobs
        if run.status != FINISHED or refused[run.path]
    ]
    found = tuple(
        replace(past, status="FAILED") if refused[run.path] else past
        for run in jobs
        if (past := read_run(run.path))
    )
    ship = None if max_loss is None else shipping(found, max_loss)
    return Overview(found, tuple(failures), _comparison(found, objectives), ship, len(all_jobs) - len(jobs))


def _without_reason(run: Run) -> str:
    return "its process goes on" if run.status == "RUNNING" else DIED


def _comparison(runs: Sequence[PastRun], objectives: Sequence[str]) -> Comparison | None:
    """Compare the jobs by the first pair of metrics that they have."""
    for y, x in product((*objectives[:1], *_Y_METRICS), (*objectives[1:2], *_X_METRICS)):
        try:
            return compare(runs, x, y)
        except ConfigError:  # no job has one of the two
            continue
    return None


def _as_text(comparison: Comparison) -> str:
    table = plain_text(terminal_table(comparison, comparison.rows), width=100)
    return "\n".join([table, *remarks(comparison)])
