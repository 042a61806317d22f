"""The answer that a run begins with: what to ship, how fast it is against what one has, and what it costs.

Every number stands with what it was measured against. What cannot be told apart is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_exp.benchmark.gain import deployed_row, first_network, load_of
from sparse_exp.benchmark.measurements import Row, fastest, measured
from sparse_exp.benchmark.ratios import Ratio, ratio_of_rows
from sparse_exp.benchmark.speed_table import Table, load_text, ratio, shown_ratio
from sparse_exp.config.runtimes import RUNTIMES, may_be_shipped
from sparse_exp.metrics.result_rows import Result, number
from sparse_exp.text import decimal

NAMES = {
    "deepsparse": "DeepSparse",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "mnn": "MNN",
    "torch": "torch",
}
_VARIANTS = {
    "dense": "dense, fp32",
    "dense_int8": "dense, int8",
    "sparse_fp32": "sparse, fp32",
    "sparse": "deployed",
}


def answer(result: Result, rows: Sequence[Row]) -> list[str]:
    """What a run has found, in a few sentences, the most important first.

    Args:
        result: the flat numbers of ``result.json``.
        rows: of the benchmark; those of the first network under the first load count.

    Returns:
        Sentences on what to ship, its speed and its accuracy; empty where nothing was deployed.
    """
    found = first_network(measured(rows)) if measured(rows) else []
    chosen = deployed_row(found)
    sentences: list[str] = []
    if chosen is not None:
        same = [row for row in found if load_of(row) == load_of(chosen)]
        sentences += [_file(result, chosen), *_speed(same, chosen), *_others(same, chosen)]
    engine = chosen["engine"] if chosen else next(iter(deployed_engines(result)), None)
    return [*sentences, *_accuracy(result, engine)]


def answer_table(rows: Sequence[Row]) -> Table:
    """What the sentences are about: every file that was measured under the first load.

    Returns:
        Titles of the columns, and the cells of each row, of which the third to the sixth are numbers.
    """
    found = first_network(measured(rows)) if measured(rows) else []
    same = [row for row in found if load_text(row) == load_text(found[0])]
    cells = [
        [
            str(NAMES.get(row["engine"], row["engine"])),
            str(_VARIANTS.get(row["variant"], row["variant"])),
            decimal(row.get("map50"), 3),
            decimal(row["items_per_s"], 1),
            shown_ratio(ratio(rows, row, "x best fp32")),
            decimal(row.get("size_mb"), 1),
            "yes" if may_be_shipped(row["engine"]) else "no",
        ]
        for row in same
    ]
    return ["engine", "network", "mAP50", "images/s", "x best fp32", "MB", "may be shipped"], cells


def deployed_engines(result: Result) -> list[str]:
    """The engines in which the accuracy of what is deployed was measured, in the order of the result."""
    names = [name.split("/") for name in result if name.startswith("deployed/")]
    return [parts[1] for parts in names if len(parts) == 3 and parts[2] == "map50"]


def _file(result: Result, row: Row) -> str:
    """What is deployed, where it may run, how fast and how large it is."""
    engine = str(NAMES.get(row["engine"], row["engine"]))
    if runtime := RUNTIMES.get(row["engine"]):
        allowed = "may be shipped" if runtime.production else "for evaluation only, not for production"
        engine += f" ({runtime.licence}: {allowed})"
    dense, dense_gzip = (number(result, f"size/dense_onnx_{kind}mb") for kind in ("", "gzip_"))
    sizes = []
    if row.get("size_mb"):
        sizes.append(f"{row['size_mb']:.1f} MB" + (f" instead of {dense:.1f}" if dense else ""))
    if row.get("gzip_mb"):
        instead = f" instead of {dense_gzip:.1f}" if dense_gzip else ""
        sizes.append(f"compressed {row['gzip_mb']:.1f} MB{instead}")
    speed = f"{row['items_per_s']:.1f} images a second on {_cores(row['cores'])} ({load_text(row)})"
    where = f"{row.get('model') or 'the network'} in {engine}"
    return f"Deployed: {'; '.join(filter(None, (where, speed, ', '.join(sizes))))}."


def _cores(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"


def _speed(rows: Sequence[Row], chosen: Row) -> Iterator[str]:
    """Against the fastest dense network of any engine, in floating point and in 8 bits."""
    compared = []
    for variant, words in (("dense", "dense network in fp32"), ("dense_int8", "dense network in 8 bits")):
        best = fastest(row for row in rows if row["variant"] == variant)
        if best is not None:
            where = f"{NAMES.get(best['engine'], best['engine'])}'s with {best['items_per_s']:.1f}"
            compared.append(f"{times(ratio_of_rows(chosen, best))} the fastest {words} ({where})")
    if compared:
        yield f"It is {', and '.join(compared)}."


def times(ratio: Ratio) -> str:
    """How much faster, with its interval, as the beginning of ``... the other``."""
    if ratio.low == 0:
        return f"about {ratio.value:.2f} times (measured too shortly to be sure) as fast as"
    interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
    if ratio.is_noise:
        return f"as fast, within noise ({ratio.value:.2f}, {interval}), as"
    return f"{ratio.value:.2f} times ({interval}) as fast as"


def _others(rows: Sequence[Row], chosen: Row) -> Iterator[str]:
    """An engine that is faster and may not be shipped."""
    best = fastest(row for row in rows if row["variant"] == "sparse")
    if best is None or best is chosen or may_be_shipped(best["engine"]):
        return
    faster = ratio_of_rows(best, chosen)
    if not faster.is_noise:
        name = NAMES.get(best["engine"], best["engine"])
        yield f"{name}, which may not be used in production, is {times(faster)} that."


def _accuracy(result: Result, engine: str | None) -> Iterator[str]:
    """What is kept of the dense network's mAP50, with its interval."""
    dense, kept = number(result, "baseline/map50"), number(result, f"recovery/{engine}/map50")
    deployed = number(result, f"deployed/{engine}/map50")
    if deployed is None:
        return
    where = NAMES.get(str(engine), str(engine))
    if dense is None or kept is None:
        yield f"Its mAP50 in {where} is {deployed:.3f}; no dense network was trained to compare it with."
        return
    low, high = (number(result, f"recovery/{engine}/map50_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f} %)"
    yield f"It keeps {100 * kept:.1f} %{interval} of the dense mAP50: {deployed:.3f} of {dense:.3f}."
