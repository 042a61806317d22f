r"""Measure the share of the dense detector's accuracy that sparse and quantized detectors keep, over seeds.

For each seed the dense counterpart is trained, then each recipe, from the same weights, on the same data and
for the same number of epochs. The exported files are evaluated in each engine. Finished runs in the output
folder are kept, so that a measurement that was stopped goes on.

    python benchmarks/recovery.py --seeds 0 1 2 --jobs 2 --write docs/results.md

With ``--published`` the dense counterpart is trained a second time, with the hyper-parameters that YOLOv5
publishes for fine-tuning, for as many epochs. The second data set of docs/results.md:

    python benchmarks/symbols.py outputs/symbols
    python benchmarks/recovery.py --recipes transfer_quant --published --out outputs/recovery-symbols \
        dataset=custom dataset.path=outputs/symbols/data.yaml dataset.imgsz=192

Words of the form KEY=VALUE are overrides of every run, for example ``recipe.num_epochs=24``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from series import make_run, parse

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.errors import StageFailed
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.text import between_marks

ENGINES = ("deepsparse", "onnxruntime", "openvino")
# Upstream's hyp.scratch-low: SGD at 0.01 down to a hundredth, warm-up of three epochs, steps of 16 images.
PUBLISHED = [
    *("recipe=dense", "recipe.optimizer=sgd", "trainer=small", "trainer.batch_size=16"),
    *("recipe.variables.init_lr=0.01", "recipe.variables.final_lr=0.0001"),
    *("recipe.variables.warmup_lr=0", "recipe.variables.warmup_epochs=3"),
]
_TRAINED = ("fetch", "plan", "baseline", "train", "evaluate")
_DEPLOYED = (*_TRAINED, "export", "verify")


class SeedRun(NamedTuple):
    """The run of a recipe with a seed."""

    recipe: str
    seed: int
    directory: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """The metrics of the run; None where it has not finished."""
        try:
            manifest = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
            result: dict[str, Any] = json.loads((self.directory / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if manifest["status"] == "FINISHED" else None


def main() -> int:
    """Make the runs that are missing, then print the tables or put them into a page."""
    options, overrides = _options()
    dense = [SeedRun("dense", seed, options.out / f"dense-{seed}") for seed in options.seeds]
    sparse = [
        SeedRun(recipe, seed, options.out / f"{recipe.replace('/', '-')}-{seed}")
        for recipe in options.recipes
        for seed in options.seeds
    ]
    published = [SeedRun("published", seed, options.out / f"published-{seed}") for seed in options.seeds]
    published = published if options.published else []
    for runs in (
        (dense, sparse, published) if not options.tables else ()
    ):  # a sparse run needs its dense counterpart
        _make_all([run for run in runs if run.result is None], options, overrides)
    text = tables(options.recipes, dense, sparse, published, overrides)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(between_marks(page, options.mark, text), encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["transfer_quant", "transfer_quant_vnni"])
    parser.add_argument("--tables", action="store_true", help="make no runs: the tables of finished ones")
    parser.add_argument("--jobs", type=whole, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=Path("outputs/recovery"), help="folder of the runs")
    parser.add_argument("--write", type=Path, help="page to put the tables into, between its marks")
    parser.add_argument("--mark", default="recovery", help="name of these marks, recovery")
    parser.add_argument("--published", action="store_true", help="also train dense as YOLOv5 publishes it")
    return parse(parser)


def _make_all(runs: Sequence[SeedRun], options: argparse.Namespace, overrides: list[str]) -> None:
    """Make runs, some at a time.

    Raises:
        StageFailed: some have failed; the others have run.
    """
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda run: _make(run, options, overrides), runs))
    if any(codes):
        failed = ", ".join(str(run.directory) for run, code in zip(runs, codes, strict=True) if code)
        do = "Look at the log beside each, then start again."
        raise StageFailed(f"These runs failed: {failed}. {do}")


def _make(run: SeedRun, options: argparse.Namespace, overrides: list[str]) -> int:
    """Make a run in a process of its own; returns its exit code."""
    cores = max(1, usable_physical_cores() // options.jobs)
    deployed = run.recipe not in ("dense", "published")
    stages = _DEPLOYED if deployed else _TRAINED
    words = [
        *(PUBLISHED if run.recipe == "published" else [f"recipe={run.recipe}"]),
        f"seed={run.seed}",
        f"stages=[{','.join(stages)}]",
        f"hardware.cores=[{cores}]",
        *overrides,
    ]
    if deployed:
        words.append(f"recovery.baseline={options.out / f'dense-{run.seed}'}")
    threads = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    return make_run(run.directory, words, threads)


def tables(
    recipes: Sequence[str],
    dense: Sequence[SeedRun],
    sparse: Sequence[SeedRun],
    published: Sequence[SeedRun],
    overrides: Sequence[str],
) -> str:
    """The measured numbers as Markdown.

    Args:
        recipes: in the order of the tables.
        dense: runs of the dense counterpart, one for each seed.
        sparse: runs of the recipes.
        published: runs of the dense counterpart with published hyper-parameters; empty: not asked for.
        overrides: overrides of all runs.
    """
    facts = host_facts()
    made_by = ["python benchmarks/recovery.py --recipes", *recipes]
    made_by += ["--seeds", *(str(run.seed) for run in dense), *(["--published"] if published else [])]
    lines = [
        f"Made by `{' '.join([*made_by, *overrides])}` on {facts.cpu}.",
        "",
    ]
    baseline = {run.seed: run.result or {} for run in dense}
    for recipe in recipes:
        finished = [(run.seed, run.result) for run in sparse if run.recipe == recipe and run.result]
        table = _table(finished, baseline) if finished else ["Not measured."]
        lines += [f"### {recipe}", "", *table, ""]
    if published:
        lines += [f"### dense, by `{' '.join(PUBLISHED)}`", ""]
        lines += [*_trainings(dense, published), ""]
    return "\n".join(lines)


def _trainings(own: Sequence[SeedRun], published: Sequence[SeedRun]) -> Iterator[str]:
    """The table that holds two ways to train the dense network against each other."""
    yield "| seed | mAP50-95, defaults | published | mAP50, defaults | published |"
    yield "|---" * 5 + "|"
    rows, names = [], ("val/map50_95", "val/map50")
    for run, other in zip(own, published, strict=True):
        results = run.result or {}, other.result or {}
        rows.append([result.get(name, math.nan) for name in names for result in results])
        yield f"| {run.seed} | {' | '.join(f'{value:.4f}' for value in rows[-1])} |"
    means = (statistics.mean(values) for values in zip(*rows, strict=True))
    yield f"| **mean** | {' | '.join(f'{value:.4f}' for value in means)} |"


def _table(runs: Sequence[tuple[int, dict[str, Any]]], baseline: dict[int, dict[str, Any]]) -> Iterator[str]:
    engines = [name for name in ENGINES if f"deployed/{name}/map50" in runs[0][1]]
    titles = [
        "seed",
        "dense torch",
        "sparse torch",
        *engines,
        *(f"kept in {name}" for name in engines),
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
        rest = " |" * (len(engines) + 3)
        yield f"| standard deviation | {' | '.join(f'{value:.3f}' for value in spreads)}{rest}"
    dense, sparse = (
        statistics.mean(result["val/map50_95"] for result in results)
        for results in ([baseline[seed] for seed, _ in runs], [result for _, result in runs])
    )
    yield ""
    kept = f"{sparse / dense:.1%} kept"
    yield f"Mean mAP50-95 in torch: {sparse:.4f}, the dense network's {dense:.4f} ({kept})."


def _row(label: str, numbers: Sequence[float], result: dict[str, Any]) -> str:
    dense, _, *deployed = numbers
    cells = [f"{value:.4f}" for value in numbers]
    cells += [f"{value / dense if dense else float('nan'):.1%}" for value in deployed]
    cells += [f"{result['sparsity/onnx']:.2%}", f"{result['size/onnx_gzip_mb']:.2f} MB"]
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(main)
