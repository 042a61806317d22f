"""What to try next after a benchmark: each rule looks at measured numbers, and quotes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_exp.benchmark.gain import CORES, INT8, ZEROS, Gain, load_of
from sparse_exp.benchmark.layers import Costs
from sparse_exp.benchmark.measurements import Row, fastest, noise_sentence
from sparse_exp.benchmark.ratios import SAME, Ratio, ratio_of_rows
from sparse_exp.config.runtimes import may_be_shipped

# Shares of the time from which a kind of layer is worth a sentence.
_LAYOUT = 0.15
_DENSE = 0.15
_DECODING = 0.10
_LITTLE = 1.15  # a factor below this is hardly a gain
_EFFICIENT = 0.75  # share of the ideal gain that several cores should reach


def advise(
    rows: Sequence[Row], deployed: Row, gains: Sequence[Gain], costs: Sequence[Costs]
) -> Iterator[str]:
    """One or two sentences for each rule that applies, the most telling first.

    Args:
        rows: with numbers, of one network.
        deployed: that of them that is shipped; see `sparse_exp.benchmark.gain.deployed_row`.
        gains: one for each load.
        costs: of the networks that were profiled.
    """
    engine = str(deployed["engine"])
    yield from _faster_network(rows, deployed)
    yield from _quantization(deployed, gains)
    yield from _sparsity(gains)
    yield from _layers(engine, costs)
    yield from _batches(rows, engine)
    yield from _cores(gains)
    yield from _int8_elsewhere(rows, deployed)
    yield from _noise(rows)


def _faster_network(rows: Sequence[Row], deployed: Row) -> Iterator[str]:
    """A dense network is faster than what is deployed, in an engine that may be shipped as well."""
    allowed = may_be_shipped(deployed["engine"])
    same = [row for row in rows if load_of(row) == load_of(deployed) and row["variant"] != "sparse"]
    best = fastest(row for row in same if may_be_shipped(row["engine"]) or not allowed)
    times = ratio_of_rows(best, deployed) if best else SAME
    if best and times.value > _LITTLE and times.low > 1:
        yield (
            f"{best['engine']} runs {best['variant']} {times} times as fast as {deployed['engine']} runs "
            f"what is deployed: deploy {best.get('model')} with {best['engine']} instead, if its accuracy "
            "suffices."
        )


def _quantization(row: Row, gains: Sequence[Gain]) -> Iterator[str]:
    """8 bits gain little."""
    factor = _factor(gains, INT8)
    if row.get("precision") == "fp32" or factor is None or factor.high >= _LITTLE:
        return
    lacks = "" if "vnni" in row.get("isa", ()) else ", on a CPU without 8-bit dot products (VNNI)"
    yield (
        f"8 bits make it only {factor} times as fast{lacks}: recipe=transfer stays in floating point and "
        "keeps its accuracy."
    )


def _sparsity(gains: Sequence[Gain]) -> Iterator[str]:
    """Zeros gain little."""
    factor = _factor(gains, ZEROS)
    if factor is not None and factor.high < _LITTLE:
        yield (
            f"Zeros make it only {factor} times as fast: raise model.sparsity, and look at sparsity.csv "
            "for large layers with few of them."
        )


def _layers(engine: str, costs: Sequence[Costs]) -> Iterator[str]:
    """Kinds of layers that take time and gain nothing from zeros."""
    found = next((each for each in costs if each.cell == f"{engine}/sparse"), None)
    if found is None:
        return
    share = found.kinds.get
    dense = share("dense convolution", 0.0)
    if engine == "deepsparse" and dense >= _DENSE:
        yield (
            f"{dense:.0%} of the time goes into convolutions that run densely: {engine} takes its sparse "
            "code only where a layer has enough zeros. Raise model.sparsity, or give those layers more of "
            "them; the first convolution and those of the head are never pruned."
        )
    layout, decoding = share("layout changes", 0.0), share("decoding", 0.0)
    if layout >= _LAYOUT:
        yield (
            f"{layout:.0%} of the time goes into layout changes between layers that run sparsely and layers "
            "that do not: with more zeros in the latter there are fewer of them."
        )
    if decoding >= _DECODING:
        yield (
            f"{decoding:.0%} of the time goes into decoding boxes, which neither zeros nor 8 bits make "
            "faster; it grows with the image size and the number of classes."
        )
    if found.supported is not None and found.supported < 1:
        yield (
            f"{1 - found.supported:.0%} of the operators have no code of their own in {engine} and run "
            "slowly: see which of the slowest layers are not convolutions."
        )


def _batches(rows: Sequence[Row], engine: str) -> Iterator[str]:
    """Larger batches gain nothing for each image, where zeros in blocks would."""
    mine = [
        row for row in rows if (row["engine"], row["variant"], row["scenario"]) == (engine, "sparse", "sync")
    ]
    single = next((row for row in mine if row["batch"] == 1), None)
    large = max(mine, key=lambda row: int(row["batch"]), default=None)
    if single is None or large is None or large["batch"] == 1 or engine != "deepsparse":
        return
    gain = ratio_of_rows(large, single)
    if gain.high < _LITTLE and single.get("precision") == "int8":
        yield (
            f"Batch {large['batch']} gives {gain} times the images per second of batch 1: batches gain "
            "from zeros in blocks of 4, recipe=transfer_quant_vnni (most where the CPU has VNNI)."
        )


def _cores(gains: Sequence[Gain]) -> Iterator[str]:
    """More cores gain little; said of the first load for which that is so."""
    for gain in gains:
        few, many = gain.cores
        factor = _factor([gain], CORES)
        if factor is not None and factor.high < _EFFICIENT * many / few:
            yield (
                f"{many} cores are {factor} times as fast as {few} ({gain.load}): for throughput let "
                "several inferences run at once, hardware=throughput."
            )
            return


def _int8_elsewhere(rows: Sequence[Row], deployed: Row) -> Iterator[str]:
    """Another engine runs the quantized network slower than the dense one in floating point."""
    for row in [row for row in rows if load_of(row) == load_of(deployed) and row is not deployed]:
        if row["variant"] != "sparse" or row.get("precision") != "int8":
            continue
        dense = next((r for r in rows if _is_dense_beside(r, row)), None)
        if dense and (share := ratio_of_rows(row, dense)).high < 1:
            yield (
                f"{row['engine']} runs the quantized network at {share} of the speed of its dense fp32: "
                "there deploy a network in floating point, or one that it quantized itself."
            )


def _noise(rows: Sequence[Row]) -> Iterator[str]:
    if sentence := noise_sentence(rows):
        yield sentence


def _is_dense_beside(other: Row, row: Row) -> bool:
    """Whether a row is the dense network in the same engine under the same load."""
    same_engine, is_dense = other["engine"] == row["engine"], other["variant"] == "dense"
    return same_engine and is_dense and load_of(other) == load_of(row)


def _factor(gains: Sequence[Gain], cause: str) -> Ratio | None:
    """The factor of a cause under the first load for which it is known; None where it is for none."""
    return next((step.factor for gain in gains for step in gain.steps if step.cause == cause), None)
