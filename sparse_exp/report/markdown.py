"""Write ``report.md``: one page with a run's numbers and pictures, the answer first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sparse_exp.benchmark.measurements import Row
from sparse_exp.benchmark.speed_table import impossible_lines, options_table, speed_table
from sparse_exp.files import write_text
from sparse_exp.metrics.result_rows import (
    SPARSITIES,
    Result,
    accuracies,
    number,
    sizes,
    verifications,
    work,
)
from sparse_exp.report.answer import answer_table
from sparse_exp.text import decimal, in_one_line, markdown_table, percent

_HOW_VERIFIED = (
    "Against torch on the whole validation split. Scores and boxes: absolute differences of the predictions "
    "to which either gives an objectness of 0.1 or more. Matched: share of the detections with a confidence "
    "of 0.25 or more that the other side has too (same class, IoU of 0.9 or more, confidence within 0.1). "
    "mAP50 difference: on a small split the mean over several passes, each a grey level brighter or darker, "
    "and its standard error; rounding to 8 bits alone moves one pass by some thousandths."
)
_HOW_BY_CLASS = (
    "Of the deployed network on the validation split. Precision, recall and F1 at IoU 0.5 and at the "
    "confidence that is best for the mean F1. Change: of mAP50 against the dense network in the same engine. "
    "classes.json has the same for every file, with confusion matrices."
)
_HOW_MEASURED = (
    "A row's accuracy, size and speed are those of one file in one engine. x ORT fp32: times as many items "
    "per second as ONNX Runtime has with the dense network in fp32 under the same load; x best fp32, x best "
    "int8: than the fastest of the engines with the dense network in fp32, in 8 bits. What stands after a "
    "tilde cannot be told from 1. All percentiles are in benchmark.csv."
)


@dataclass(frozen=True)
class ReportData:
    """The contents of a report; empty parts are left out.

    Args:
        title: headline.
        answer: what the run has found, in sentences.
        first: the picture that belongs to the answer: its caption and file; None for none.
        command: the command that makes this run again.
        result: the flat numbers and texts of ``result.json``.
        summary: facts for the top of the page, by label.
        origin: sentence on the origin of the start weights.
        pruning: sentence on the pruning step; empty when there was none.
        phases: a row for each phase of the training, all with the same columns.
        recovery: sentence on the share of the dense accuracy that is kept; empty without a baseline.
        classes: a row for each class, all with the same columns.
        layers: file with the zeros of each layer, linked to; None for none.
        speeds: rows of the benchmark, see docs/benchmark.md.
        conditions: conditions of the benchmark, by label (engine versions, cores, image size, ISA ...).
        why: the factors of the gain and what to try next, as Markdown; empty without a benchmark.
        warnings: sentences.
        pictures: file of each picture by its caption, in order; files that do not exist are left out.
        attributions: licences and attributions of the weights and data that were fetched.
        environment: facts by label (Python, packages, host).
    """

    title: str
    command: str
    answer: Sequence[str] = ()
    first: tuple[str, Path] | None = None
    result: Result = field(default_factory=dict)
    summary: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    pruning: str = ""
    phases: Sequence[Mapping[str, object]] = ()
    recovery: str = ""
    classes: Sequence[Mapping[str, object]] = ()
    layers: Path | None = None
    speeds: Sequence[Row] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    warnings: Sequence[str] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    attributions: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, report: ReportData) -> str:
    """Write the report, whole or not at all; returns its text.

    Args:
        path: file to write; links to pictures start from its directory.
        report: its contents.

    Raises:
        OSError: the file cannot be written.
    """
    parts = [
        f"# {in_one_line(report.title)}\n",
        *_answer(report, path.parent),
        _section("Warnings", _bullets(report.warnings)),
        _section("Summary", _facts(report.summary)),
        _section("How to reproduce", _code(report.command)),
        _section("Start weights", "\n\n".join(filter(None, (report.origin, report.pruning)))),
        _section("Phases", _rows(report.phases)),
        _section("Accuracy", _accuracy(report.result), in_one_line(report.recovery)),
        _section("Accuracy by class", _rows(report.classes), _HOW_BY_CLASS if report.classes else ""),
        _section("Verification", *_verification(report.result)),
        _section(
            "Sparsity", _sparsity(report.result), work(report.result), _layers(report.layers, path.parent)
        ),
        _section("Sizes", _sizes(report.result)),
        _section("Benchmark", *_benchmark(report.speeds), _facts(report.conditions)),
        _section("Why is it (not) faster?", report.why),
        _section("Pictures", _pictures(report.pictures, path.parent)),
        _section("Licences and attribution", _bullets(report.attributions)),
        _section("Environment", _facts(report.environment)),
    ]
    text = "\n".join(filter(None, parts))
    write_text(path, text)
    return text


def _answer(report: ReportData, start: Path) -> Iterator[str]:
    """The sentences, the picture, and the table of what they are about."""
    if report.answer:
        yield f"{_bullets(report.answer)}\n"
    if report.first and report.first[1].is_file():
        caption, picture = report.first
        yield f"![{in_one_line(caption)}]({_link(picture, start)})\n"
    if table := markdown_table(*answer_table(report.speeds), right=range(2, 6)):
        yield f"{table}\n"


def _section(title: str, *bodies: str) -> str:
    body = "\n\n".join(filter(None, bodies))
    return f"## {title}\n\n{body}\n" if body else ""


def _accuracy(result: Result) -> str:
    rows = [
        (where, decimal(map50, 4), decimal(map50_95, 4), difference)
        for where, map50, map50_95, difference in accuracies(result)
    ]
    return markdown_table(("run in", "mAP50", "mAP50-95", "mAP50 against torch"), rows)


def _verification(result: Result) -> tuple[str, str]:
    """The table of differences, and how they were measured."""
    rows = []
    for row in verifications(result):
        scores = f"{decimal(row.score_mean, 4)} / {decimal(row.score_max, 3)}"
        boxes = f"{decimal(row.box_mean_px, 2)} / {decimal(row.box_max_px, 1)}"
        matched = f"{percent(row.matched_of_torch)} / {percent(row.matched_of_engine)}"
        gain = "-" if row.map50_difference is None else f"{row.map50_difference:+.4f}"
        error = f" ± {row.map50_difference_error:.4f}" if row.map50_difference_error else ""
        rows.append((row.engine, scores, boxes, matched, gain + error))
    columns = (
        "exported file in",
        "scores, mean / max",
        "boxes px, mean / max",
        "matched, torch's / engine's",
        "mAP50 difference",
    )
    return markdown_table(columns, rows), _HOW_VERIFIED if rows else ""


def _layers(table: Path | None, start: Path) -> str:
    if table is None or not table.is_file():
        return ""
    return f"Zeros and multiplications of each layer: [{table.name}]({_link(table, start)})."


def _sparsity(result: Result) -> str:
    rows = [(label, percent(number(result, key), 2)) for key, label in SPARSITIES.items() if key in result]
    return markdown_table(("measured in", "zeros"), rows)


def _sizes(result: Result) -> str:
    rows = [(label, *(decimal(size, 2) for size in megabytes)) for label, megabytes in sizes(result)]
    return markdown_table(("MB (1e6 bytes)", "checkpoint", "file", "file, gzip", "weights not zero"), rows)


def _benchmark(rows: Sequence[Row]) -> list[str]:
    """The tables of speeds and of the engines' settings, and the cells that could not be measured."""
    settings, missing = markdown_table(*options_table(rows)), _bullets(impossible_lines(rows))
    return [
        markdown_table(*speed_table(rows)),
        _HOW_MEASURED if rows else "",
        f"Settings that the search before the measurement chose:\n\n{settings}" if settings else "",
        f"Not measured:\n\n{missing}" if missing else "",
    ]


def _rows(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows that have the same columns."""
    if not rows:
        return ""
    return markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])


def _pictures(pictures: Mapping[str, Path], start: Path) -> str:
    lines = []
    for caption, picture in pictures.items():
        if picture.is_file():
            text = in_one_line(caption)
            lines.append(f"### {text}\n\n![{text}]({_link(picture, start)})")
    return "\n\n".join(lines)


def _link(file: Path, start: Path) -> str:
    """The address of a file in a page of the directory ``start``."""
    return quote(Path(os.path.relpath(file, start)).as_posix())


def _facts(facts: Mapping[str, str]) -> str:
    return markdown_table(("", ""), facts.items(), right=())


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {in_one_line(line)}" for line in lines)


def _code(command: str) -> str:
    return f"```sh\n{command.strip()}\n```" if command.strip() else ""
