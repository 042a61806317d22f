"""What to ship: every file that the benchmarks of runs measured, by its accuracy and speed in its engine.

A run is one point in a comparison of runs. It has several files: what it deploys, the dense network, the same
in int8, each in several engines. Here each of them is a point of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_exp.benchmark.gain import load_of
from sparse_exp.benchmark.measurements import Row, fastest, measured
from sparse_exp.benchmark.ratios import Ratio, ratio_of, ratio_of_rows, speeds_of
from sparse_exp.benchmark.speed_table import load_text, ratio
from sparse_exp.compare.comparison import FINISHED
from sparse_exp.config.runtimes import may_be_shipped
from sparse_exp.errors import Impossible
from sparse_exp.files import write_text
from sparse_exp.metrics.pareto import Axis, Point, pareto_front
from sparse_exp.report.answer import NAMES, times
from sparse_exp.runs.directory import Run
from sparse_exp.runs.past import PastRun
from sparse_exp.text import markdown_table

PICTURE, PAGE = "ship.png", "ship.md"
_SAID = 4  # of the files that are as fast


@dataclass(frozen=True)
class ShippingFile:
    """A file that was measured in an engine.

    Attributes:
        number: from 1, the same in table and picture.
        run: that made it.
        label: of the run in the comparison.
        path: where it lies.
        row: of the benchmark.
        rows: all rows of that benchmark under the same load.
        dense_map50: of the run's dense counterpart, 0..1; None where it has none.
        speed: images per second, as if the machine had been as fast in all runs as in the first; see `times`.
        front: whether no other file that may be shipped is as good in both, and better in one.
    """

    number: int
    run: PastRun
    label: str
    path: Path
    row: Row
    rows: tuple[Row, ...]
    dense_map50: float | None
    speed: float = 0.0
    front: bool = False

    @property
    def engine(self) -> str:
        """The engine as people write it."""
        return str(NAMES.get(self.row["engine"], self.row["engine"]))

    @property
    def map50(self) -> float:
        """COCO mAP50 in the engine, 0..1."""
        return float(self.row["map50"])

    @property
    def may_be_shipped(self) -> bool:
        """Whether the engine's licence allows use in production."""
        return may_be_shipped(self.row["engine"])

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense network, in whatever precision."""
        return str(self.row["variant"]).startswith("dense")

    @property
    def name(self) -> str:
        """A few words: its run where that matters, its variant, its engine."""
        variant = {"dense": "dense fp32", "dense_int8": "dense int8", "sparse_fp32": "before int8"}
        what = variant.get(self.row["variant"], "")
        words = [what] if self.is_dense else [self.label, *([what] if what else [])]
        return f"{', '.join(words)} in {self.engine}"

    def times(self, other: ShippingFile) -> Ratio:
        """How many times faster it is than another file.

        Files of two runs were not measured in the same turns. Where both runs measured the same dense network
        in the same engine, each is taken relative to that, so that a machine that became slower between the
        two counts for neither.
        """
        if self.rows == other.rows:
            return ratio_of_rows(self.row, other.row)
        for mine in (row for row in self.rows if row["variant"] == "dense"):
            for its in other.rows:
                same = its["variant"] == "dense" and its["engine"] == mine["engine"]
                if same and self.dense_map50 == other.dense_map50:
                    return ratio_of(_relative(self.row, mine), _relative(other.row, its))
        return ratio_of_rows(self.row, other.row)


def _relative(row: Row, reference: Row) -> dict[int, float]:
    """The speeds of a row in those of another, in the turns that both have."""
    speeds, others = speeds_of(row), speeds_of(reference)
    return {turn: speed / others[turn] for turn, speed in speeds.items() if turn in others}


@dataclass(frozen=True)
class Shipping:
    """All files, and the one to ship.

    Attributes:
        files: the most accurate first.
        dense_map50: of the most accurate dense network, 0..1.
        max_loss: the mAP50 that may be lost against it.
        chosen: of the files that may be shipped and keep that, the fastest; of those that cannot be told
            from it in speed, the most accurate. None where there is none.
        equal: those others.
        ahead: files that may not be shipped, keep it, too, and are faster.
    """

    files: tuple[ShippingFile, ...]
    dense_map50: float
    max_loss: float
    chosen: ShippingFile | None
    equal: tuple[ShippingFile, ...] = ()
    ahead: tuple[ShippingFile, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The answer: one sentence, and what is to be said beside it."""
        if self.chosen is None:
            most = next((file for file in self.files if file.may_be_shipped), None)
            reached = f" The most accurate is {most.path} in {most.engine}: {most.map50:.3f}." if most else ""
            return [
                f"Nothing that may be shipped keeps mAP50 within {self.max_loss:g} of the dense "
                f"{self.dense_map50:.3f}.{reached} Allow more with sweep.max_loss."
            ]
        return [*_sentence(self, self.chosen), *_others(self)]

    def write(self, folder: Path) -> list[Path]:
        """Write `PICTURE` and `PAGE`; returns their paths."""
        from sparse_exp.report.plots import trade_off  # it imports matplotlib

        points = [
            Point(file.number, file.name, file.speed, file.map50, front=file.front,
                  best=file is self.chosen, dense=file.is_dense, hollow=not file.may_be_shipped)
            for file in self.files
        ]  # fmt: skip
        load = load_text(self.files[0].row)
        trade_off(points, Axis(f"images/s, {load}", less=False), Axis("mAP50", less=False), folder / PICTURE,
                  "files")  # fmt: skip
        text = "\n\n".join(["# What to ship", *self.lines, _table(self.files), f"![{load}]({PICTURE})"])
        return [folder / PICTURE, write_text(folder / PAGE, f"{text}\n")]


def shipping(runs: Sequence[PastRun], max_loss: float) -> Shipping | None:
    """Choose among the files of runs.

    Args:
        runs: those count that finished, lie on this machine and have a benchmark.
        max_loss: mAP50 that the file may lose against the most accurate dense network.

    Returns:
        None where no file has a speed and an accuracy, or no dense network is known.
    """
    found: dict[tuple[object, ...], ShippingFile] = {}
    common = set.intersection(*(set(run.words) for run in runs)) if runs else set()
    for run in [run for run in runs if run.status == FINISHED]:
        own = " ".join(word for word in run.words if word not in common)
        for file in _files_of(run, own or run.name):
            # The dense network of all runs is one, and is measured in each.
            whose = file.dense_map50 if file.is_dense else run.place
            found.setdefault((file.row["engine"], file.row["variant"], whose), file)
    known = [file.dense_map50 for file in found.values() if file.dense_map50 is not None]
    if not known:
        return None
    files, dense = _numbered(list(found.values())), max(known)
    kept = [file for file in files if file.map50 >= dense - max_loss]
    allowed = [file for file in kept if file.may_be_shipped]
    if not allowed:
        return Shipping(files, dense, max_loss, None)
    first = max(allowed, key=lambda file: file.speed)
    equal = [file for file in allowed if file is first or file.times(first).is_noise]
    chosen = max(equal, key=lambda file: (file.map50, file.speed))
    ahead = [
        file
        for file in kept
        if not file.may_be_shipped and file.speed > chosen.speed and not file.times(chosen).is_noise
    ]
    others = tuple(file for file in equal if file is not chosen)
    return Shipping(files, dense, max_loss, chosen, others, tuple(ahead))


def _files_of(run: PastRun, label: str) -> Iterator[ShippingFile]:
    there = Run.find(Path(run.place))
    rows = measured(there.facts("benchmark").get("rows", [])) if there else []
    if there is None or not rows:
        return
    same = tuple(row for row in rows if load_of(row) == load_of(rows[0]))
    dense = there.result().get("baseline/map50")
    if dense is None:  # a dense run is its own counterpart
        known = [row["map50"] for row in same if row["variant"] == "dense" and row.get("map50") is not None]
        dense = max(known, default=None)
    for row in same:
        if row.get("map50") is None:
            continue
        try:
            path = there.deployment.file(row["engine"], row["variant"])
        except Impossible:  # removed since
            continue
        yield ShippingFile(0, run, label, path, row, same, dense)


def _numbered(files: Sequence[ShippingFile]) -> tuple[ShippingFile, ...]:
    speeds = [file.times(files[0]).value * float(files[0].row["items_per_s"]) for file in files]
    shippable = [speed if file.may_be_shipped else None for file, speed in zip(files, speeds, strict=True)]
    front = pareto_front(shippable, [file.map50 for file in files], x_less=False, y_less=False)
    marked = [
        replace(file, speed=speed, front=on) for file, speed, on in zip(files, speeds, front, strict=True)
    ]
    ordered = sorted(marked, key=lambda file: (-file.map50, -file.speed))
    return tuple(replace(file, number=number) for number, file in enumerate(ordered, 1))


def _sentence(shipping: Shipping, chosen: ShippingFile) -> Iterator[str]:
    gain = ratio(chosen.rows, chosen.row, "x best fp32")
    best = fastest(row for row in chosen.rows if row["variant"] == "dense")
    faster = ""
    if gain is not None and best is not None and best is not chosen.row:
        engine = NAMES.get(best["engine"], best["engine"])
        faster = f", {times(gain)} the fastest dense network in fp32 ({engine})"
    yield (
        f"Ship {chosen.path} in {chosen.engine}: {chosen.speed:.1f} images/s{faster}, with mAP50 "
        f"{chosen.map50:.3f} where the dense network has {shipping.dense_map50:.3f}; made by: "
        f"{chosen.run.command}"
    )


def _others(shipping: Shipping) -> Iterator[str]:
    if shipping.equal:
        names = [file.name for file in shipping.equal]
        more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
        yield (
            f"The measurements do not tell it from {'; '.join(names[:_SAID])}{more} in speed: of these it is "
            "the most accurate."
        )
    if shipping.ahead:
        best = max(shipping.ahead, key=lambda file: file.speed)
        assert shipping.chosen is not None
        yield f"Faster, but not for production: {best.name}, {times(best.times(shipping.chosen))} that."


def _table(files: Sequence[ShippingFile]) -> str:
    cells = [
        [
            "*" if file.front else "",
            str(file.number),
            file.label if not file.is_dense else "dense",
            str(file.row["variant"]),
            file.engine,
            f"{file.map50:.3f}",
            f"{file.speed:.1f}",
            "yes" if file.may_be_shipped else "no",
            file.path.name,
        ]
        for file in files
    ]
    titles = ["", "#", "run", "network", "engine", "mAP50", "images/s", "may be shipped", "file"]
    return markdown_table(titles, cells, right=[1, 5, 6])
