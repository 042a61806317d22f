"""How much of the dense detector's accuracy the sparse and quantized one keeps, over several seeds.

For each seed the dense counterpart is trained, then each recipe, from the same weights, on the same data
and for the same number of epochs; the exported files are evaluated in each engine. Runs that are finished
in the output folder are kept, so that a stopped measurement goes on where it was.

    python benchmarks/recovery.py --seeds 0 1 2 --jobs 2 --write docs/results.md

What follows the options are overrides for every run, such as ``recipe.num_epochs=24``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.text import between_marks

MARK = "recovery"
ENGINES = ("deepsparse", "onnxruntime", "openvino")
_TRAINED = ("fetch", "plan", "baseline", "train", "evaluate")
_DEPLOYED = (*_TRAINED, "export", "verify")


class Job(NamedTuple):
    """One run of the table."""

    recipe: str
    seed: int
    directory: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """Its metrics; None when it has not finished."""
        try:
            manifest = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
            result: dict[str, Any] = json.loads((self.directory / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if manifest["status"] == "FINISHED" else None


def main() -> None:
    """Run what is missing, then print the tables or put them into a page."""
    options, overrides = _options()
    dense = [Job("dense", seed, options.out / f"dense-{seed}") for seed in options.seeds]
    sparse = [
        Job(recipe, seed, options.out / f"{recipe.replace('/', '-')}-{seed}")
        for recipe in options.recipes
        for seed in options.seeds
    ]
    for jobs in (dense, sparse) if not options.tables else ():  # the sparse ones are compared with the dense
        _run_all([job for job in jobs if job.result is None], options, overrides)
    text = tables(options.recipes, dense, sparse, overrides)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(between_marks(page, MARK, text), encoding="utf-8")
    else:
        sys.stdout.write(text)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["transfer_quant", "transfer_quant_vnni"])
    parser.add_argument("--tables", action="store_true", help="run nothing: the tables of what is finished")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=Path("outputs/recovery"), help="folder of the runs")
    parser.add_argument("--write", type=Path, help=f"page to put the tables into, between its marks {MARK!r}")
    return parser.parse_known_args()


def _run_all(jobs: Sequence[Job], options: argparse.Namespace, overrides: list[str]) -> None:
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda job: _run(job, options, overrides), jobs))
    if any(codes):
        failed = ", ".join(str(job.directory) for job, code in zip(jobs, codes, strict=True) if code)
        sys.exit(f"Error: these runs failed: {failed}. Look at the log beside each, then start again.")


def _run(job: Job, options: argparse.Namespace, overrides: list[str]) -> int:
    cores = max(1, usable_physical_cores() // options.jobs)
    stages = _TRAINED if job.recipe == "dense" else _DEPLOYED
    words = [
        f"recipe={job.recipe}",
        f"seed={job.seed}",
        f"paths.run={job.directory}",
        "overwrite=true",
        f"stages=[{','.join(stages)}]",
        f"hardware.cores=[{cores}]",
        *overrides,
    ]
    if job.recipe != "dense":
        words.append(f"recovery.baseline={options.out / f'dense-{job.seed}'}")
    log = job.directory.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "sparse_exp", *words]
        return subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode


def tables(
    recipes: Sequence[str], dense: Sequence[Job], sparse: Sequence[Job], overrides: Sequence[str]
) -> str:
    """The measured numbers as Markdown.

    Args:
        recipes: in the order of the tables.
        dense: finished runs of the dense counterpart, one per seed.
        sparse: finished runs of the recipes.
        overrides: what was changed for all runs.
    """
    facts = host_facts()
    lines = [
        f"Made by `python benchmarks/recovery.py --seeds {' '.join(str(job.seed) for job in dense)}"
        f"{''.join(f' {word}' for word in overrides)}` on {facts.cpu}.",
        "",
    ]
    baseline = {job.seed: job.result or {} for job in dense}
    for recipe in recipes:
        runs = [(job.seed, job.result) for job in sparse if job.recipe == recipe and job.result]
        lines += [f"### {recipe}", "", *(_table(runs, baseline) if runs else ["Not measured."]), ""]
    return "\n".join(lines)


def _table(runs: Sequence[tuple[int, dict[str, Any]]], baseline: dict[int, dict[str, Any]]) -> Iterator[str]:
    engines = [name for name in ENGINES if f"deployed/{name}/map50" in runs[0][1]]
    titles = [
        "seed",
        "dense torch",
        "sparse torch",
        *engines,
        f"kept in {engines[0]}",
        "sparsity",
        "ONNX gzip",
    ]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    columns: list[list[float]] = []
    for seed, result in runs:
        numbers = [baseline[seed]["val/map50"], result["val/map50"]]
        numbers += [result[f"deployed/{name}/map50"] for name in engines]
        columns.append(numbers)
        yield _row(str(seed), numbers, result)
    means = [statistics.mean(values) for values in zip(*columns, strict=True)]
    yield _row("**mean**", means, runs[-1][1])
    if len(columns) > 1:
        spreads = [statistics.stdev(values) for values in zip(*columns, strict=True)]
        yield f"| standard deviation | {' | '.join(f'{value:.3f}' for value in spreads)} | | | |"


def _row(label: str, numbers: Sequence[float], result: dict[str, Any]) -> str:
    kept = numbers[2] / numbers[0] if numbers[0] else float("nan")
    cells = [f"{value:.4f}" for value in numbers]
    cells += [f"{kept:.1%}", f"{result['sparsity/onnx']:.2%}", f"{result['size/onnx_gzip_mb']:.2f} MB"]
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
