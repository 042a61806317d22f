"""Print the measured numbers of a run as Markdown, for docs/main-job.md.

    python tools/results_table.py outputs/runs/DATE/TIME-NAME
    python tools/results_table.py outputs/runs/DATE/TIME-NAME --insert docs/main-job.md

With ``--insert`` they replace the text between ``<!-- numbers -->`` and ``<!-- /numbers -->``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_exp.benchmark.measurements import measured
from sparse_exp.benchmark.speed_table import noisy_labels, shown_gains, vague_labels
from sparse_exp.command import Parser, run_command
from sparse_exp.errors import ConfigError
from sparse_exp.metrics.result_rows import SIZES, SPARSITIES, accuracies, number, throughputs
from sparse_exp.report.answer import answer
from sparse_exp.text import between_marks, decimal, markdown_table, percent

MARK = "numbers"
# Overrides that say where this run's files are, which a reader does not need.
_LOCAL = ("paths.", "resume=", "overwrite=", "hydra.", "tracker")


def main() -> int:
    """Print the tables, or put them into a page."""
    parser = Parser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--insert", type=Path, metavar="PAGE", help="page that holds the two markers")
    options = parser.parse_args()
    try:
        text = numbers(options.run)
        if options.insert:
            options.insert.write_text(between_marks(options.insert.read_text("utf-8"), MARK, text), "utf-8")
        else:
            sys.stdout.write(text)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{error}. Give the directory of a finished run with a benchmark.") from error
    return 0


def numbers(run: Path) -> str:
    """The tables of a finished run.

    Args:
        run: directory of a run with ``result.json``, ``benchmark.json`` and ``manifest.json``.

    Raises:
        OSError: a file is missing.
        ValueError: a file cannot be read, or the run did not finish.
    """
    result, rows, manifest = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("result.json", "benchmark.json", "manifest.json")
    )
    if manifest["status"] != "FINISHED":
        raise ValueError(f"The status of {run} is {manifest['status']}")
    facts = {name: stage["facts"] for name, stage in manifest["stages"].items()}
    parts = [
        _introduction(manifest, result, facts),
        "\n".join(f"- {sentence}" for sentence in answer(result, rows)),
        _accuracy(result),
        _zeros_and_sizes(result),
        _throughput(result, rows),
        _conditions(rows),
        _times(result),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _introduction(manifest: dict[str, Any], result: dict[str, Any], facts: dict[str, Any]) -> str:
    words = [word for word in manifest.get("overrides", []) if not word.startswith(_LOCAL)]
    command = " ".join(["python -m sparse_exp", *words])
    plan, boxes = facts.get("plan", {}), facts.get("fetch", {}).get("boxes", {})
    origin = str(result.get("weights/origin", ""))
    origin = f"a file, {Path(origin).name}" if origin.startswith("/") else origin
    data = ", ".join(f"{split} {count}" for split, count in boxes.items())
    sentences = [
        f"`{command}` of version {manifest['version']}." if "version" in manifest else f"`{command}`.",
        f"Start weights: {origin}; {plan.get('transferred', 'none')} taken." if origin else "",
        plan.get("pruning", ""),
        f"Boxes: {data}." if data else "",
    ]
    return " ".join(filter(None, sentences))


def _accuracy(result: dict[str, Any]) -> str:
    rows = [
        (where, decimal(map50, 3), decimal(map50_95, 3), difference)
        for where, map50, map50_95, difference in accuracies(result)
    ]
    return _numbers_table(("validation split, run in", "mAP50", "mAP50-95", "mAP50 against torch"), rows)


def _zeros_and_sizes(result: dict[str, Any]) -> str:
    rows = [
        (f"zeros in {label}", percent(number(result, key), 2))
        for key, label in SPARSITIES.items()
        if key in result
    ]
    counts = [number(result, f"{kind}/convolutions") for kind in ("quantized", "quantizable")]
    if None not in counts:
        rows.append(("quantized convolutions", " of ".join(decimal(count, 0) for count in counts)))
    rows += [
        (label, f"{decimal(number(result, key), 2)} MB") for key, label in SIZES.items() if key in result
    ]
    return _numbers_table(("", "measured"), rows)


def _throughput(result: dict[str, Any], measurements: list[dict[str, Any]]) -> str:
    noisy, vague = noisy_labels(measurements), vague_labels(measurements)
    gains, rows = shown_gains(measurements), []
    for row in throughputs(result):
        spread = percent(row.spread) + " !" * (row.label in noisy)
        times = [decimal(row.p50, 1), decimal(row.p90, 1), decimal(row.p99, 1)]
        named = row.engine, row.variant, row.load, decimal(row.items_per_s, 1), spread
        rows.append((*named, *times, gains.get(row.label) or decimal(row.speedup, 2)))
    columns = (
        "engine",
        "variant",
        "load",
        "items/s",
        "spread",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "x best dense",
    )
    legend = "`!`: noisy. `~`: within noise of the fastest dense network." if noisy or vague else ""
    return "\n\n".join(filter(None, (_numbers_table(columns, rows), legend)))


def _conditions(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    rows = measured(rows)
    one = rows[0]
    busy = one.get("before", one)["busy_cores"]  # in rows of older runs it stands at the top level
    versions = dict.fromkeys(f"{row['engine']} {row['version']}" for row in rows)
    return (
        f"Conditions: {', '.join(versions)}; {one['cpu']} with {', '.join(one['isa']) or 'no vector sets'}, "
        f"{one['cores']} cores; {one['imgsz']} px, uint8, of the validation split; one batch after the other "
        f"({one['scenario']}); median of at least {one['repeats']} repeats of {one['duration_s']:g} s in "
        f"turns, each after {one['warmup_s']:g} s of warm-up; spread = (largest - smallest) / median of the "
        f"repeats; {busy:g} cores busy with other programs just before. `dense` is the fp32 network of "
        "the same architecture, `sparse` what the run deploys. 1 MB = 1e6 bytes; compressed: gzip."
    )


def _times(result: dict[str, Any]) -> str:
    times = {key[5:-2]: float(result[key]) for key in result if key.startswith("time/")}
    if not times:
        return ""
    rows = [tuple(f"{seconds:.0f}" for seconds in (*times.values(), sum(times.values())))]
    return "Seconds of each stage on that machine:\n\n" + _numbers_table((*times, "all"), rows)


def _numbers_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column says what the numbers in the others are."""
    return markdown_table(titles, rows, right=range(1, len(titles)))


if __name__ == "__main__":
    run_command(main)
