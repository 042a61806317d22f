"""The flat names of ``result.json`` as rows of tables; see docs/architecture.md for the names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from sparse_exp.config.schema import VARIANTS

Result = Mapping[str, float | str]
SIZES = {
    "size/checkpoint_mb": "checkpoint",
    "size/dense_onnx_mb": "dense ONNX",
    "size/dense_onnx_gzip_mb": "dense ONNX, compressed",
    "size/onnx_mb": "sparse ONNX",
    "size/onnx_gzip_mb": "sparse ONNX, compressed",
}
SPARSITIES = {
    "sparsity/prunable": "prunable weights",
    "sparsity/total": "all weights",
    "sparsity/macs": "multiplications",
    "sparsity/onnx": "prunable weights, exported file",
}
_BENCHMARK = re.compile(
    r"benchmark/(?P<engine>.+)/(?P<variant>[^/]+)/(?P<load>b(?P<batch>\d+)(?P<how>\w*))/items_per_s"
)
_VARIANT_ORDER = {variant: place for place, variant in enumerate(VARIANTS)}
_DEPLOYED = re.compile(r"deployed/(?P<engine>[^/]+)(?:/(?P<variant>[^/]+))?/map50")
_SIZE = re.compile(
    r"size/(?P<network>dense_int8/|sparse_fp32/|qdq/|onnxruntime/|dense_|)(?P<engine>[^/]+/|)"
    r"(?P<kind>checkpoint|onnx|onnx_gzip|nonzero)_mb"
)
_NETWORKS = {
    "dense_": "dense fp32",
    "dense_int8/": "dense int8,",
    "sparse_fp32/": "sparse fp32",
    "": "deployed",
    "qdq/": "deployed, as QDQ graph",
    "onnxruntime/": "deployed, for ONNX Runtime",
}
SIZE_KINDS = ("checkpoint", "onnx", "onnx_gzip", "nonzero")
_RECOVERY = re.compile(r"recovery/(?P<engine>[^/]+)/map50")
_VERIFIED = re.compile(r"verify/(?P<engine>.+)/score_mean")


@dataclass(frozen=True)
class Throughput:
    """One cell of the benchmark; None where the result has no number.

    Args:
        engine: name of the runtime.
        variant: one of `sparse_exp.config.schema.VARIANTS`.
        load: batch size and scenario, as in the name: ``b1``, ``b16_throughput``.
        batch: images in one call.
        items_per_s: images per second.
        p50, p90, p99: latency of one call in milliseconds.
        spread: of the repeats, largest minus smallest over the median.
        speedup: ``items_per_s`` over that of the engine that is fastest with dense fp32 under this load.
    """

    engine: str
    variant: str
    load: str
    batch: int
    items_per_s: float
    p50: float | None
    p90: float | None
    p99: float | None
    spread: float | None
    speedup: float | None

    @property
    def label(self) -> str:
        """As `sparse_exp.benchmark.speed_table.label` calls its row."""
        return f"{self.engine}/{self.variant}/{self.load}"


def number(result: Result, key: str) -> float | None:
    """The number under a name of the result; None where there is none, or a text."""
    value = result.get(key)
    return None if value is None or isinstance(value, str) else float(value)


def throughputs(result: Result) -> list[Throughput]:
    """The rows of the benchmark: scenario by scenario, batch by batch, then by engine, dense first."""

    def place(match: re.Match[str]) -> tuple[str | int, ...]:
        return match["how"], int(match["batch"]), match["engine"], _VARIANT_ORDER.get(match["variant"], -1)

    matches = sorted(filter(None, map(_BENCHMARK.fullmatch, result)), key=place)
    fastest_dense: dict[str, float] = {}
    for match in matches:
        if match["variant"] == "dense":
            rate = float(result[match[0]])
            fastest_dense[match["load"]] = max(rate, fastest_dense.get(match["load"], 0.0))
    return [_throughput(result, match, fastest_dense.get(match["load"])) for match in matches]


def _throughput(result: Result, match: re.Match[str], fastest_dense: float | None) -> Throughput:
    items_per_s = float(result[match[0]])
    cell = match[0].removesuffix("items_per_s")
    p50, p90, p99 = (number(result, f"{cell}latency_{name}_ms") for name in ("p50", "p90", "p99"))
    return Throughput(
        match["engine"],
        match["variant"],
        match["load"],
        int(match["batch"]),
        items_per_s,
        p50,
        p90,
        p99,
        spread=number(result, f"{cell}spread"),
        speedup=items_per_s / fastest_dense if fastest_dense else None,
    )


def sizes(result: Result) -> list[tuple[str, list[float | None]]]:
    """The sizes of each network, in MB (1e6 bytes) and in the order of `SIZE_KINDS`."""
    places, found = list(_NETWORKS), dict[tuple[int, str], dict[str, float]]()
    for match in filter(None, map(_SIZE.fullmatch, result)):
        network = places.index(match["network"]), match["engine"].rstrip("/")
        found.setdefault(network, {})[match["kind"]] = float(result[match[0]])
    return [
        (f"{_NETWORKS[places[place]]} {engine}".strip(), [sizes.get(kind) for kind in SIZE_KINDS])
        for (place, engine), sizes in sorted(found.items())
    ]


def accuracies(result: Result) -> list[tuple[str, float | None, float | None, str]]:
    """The measured accuracies as rows, torch first.

    Returns:
        For each row the runtime, mAP50 and mAP50-95 (0..1), and the difference of mAP50 from torch's. All are
        of the validation split, but for the row "torch, test split". The name of a variant other than the
        deployed one stands after its engine; it is not compared with torch.
    """
    rows: list[tuple[str, float | None, float | None, str]] = []
    reference = number(result, "val/map50")
    if reference is not None:
        rows.append(("torch", reference, number(result, "val/map50_95"), ""))
    if (held_out := number(result, "test/map50")) is not None:
        rows.append(("torch, test split", held_out, number(result, "test/map50_95"), "-"))
    found = [match for key in result if (match := _DEPLOYED.fullmatch(key))]
    for match in sorted(found, key=lambda match: (match["variant"] or "", match["engine"])):
        map50 = number(result, match[0])
        compared = map50 is not None and reference is not None and not match["variant"]
        difference = f"{map50 - reference:+.4f}" if compared else "-"  # type: ignore[operator]
        where = " ".join(filter(None, (match["engine"], match["variant"])))
        rows.append((where, map50, number(result, f"{match[0]}_95"), difference))
    return rows


@dataclass(frozen=True)
class Verification:
    """The differences between an engine and torch on the validation split; None where the result has none.

    Args:
        engine: name of the runtime.
        score_mean, score_max: absolute difference of confident predictions' scores, 0..1.
        box_mean_px, box_max_px: of their boxes, in pixels.
        matched_of_torch, matched_of_engine: share of the one's detections that the other has too, 0..1.
        map50_difference: mAP50 in the engine minus torch's, mean over the views of the split.
        map50_difference_error: its standard error.
    """

    engine: str
    score_mean: float | None
    score_max: float | None
    box_mean_px: float | None
    box_max_px: float | None
    matched_of_torch: float | None
    matched_of_engine: float | None
    map50_difference: float | None
    map50_difference_error: float | None


def verifications(result: Result) -> list[Verification]:
    """The verified engines, by name."""
    engines = sorted(match["engine"] for key in result if (match := _VERIFIED.fullmatch(key)))
    names = [item.name for item in fields(Verification)][1:]
    return [Verification(e, *(number(result, f"verify/{e}/{name}") for name in names)) for e in engines]


def work(result: Result) -> str:
    """A sentence on the multiplications of an image; empty where they were not counted."""
    macs, dense, zeros = (number(result, key) for key in ("size/macs", "size/dense_macs", "sparsity/macs"))
    return "" if macs is None or dense is None or zeros is None else work_sentence(macs, dense, zeros)


def work_sentence(macs: float, dense: float, zeros: float | None) -> str:
    """What a network computes for an image, in words.

    Args:
        macs: its multiplications, in 1e9.
        dense: those of the network with all its channels.
        zeros: share of ``macs`` that meet a zero weight, 0..1; None: not known.
    """
    whole = f" ({macs / dense:.0%} of the {dense:.3g} G of the dense network)" if macs < dense else ""
    met = f"; {zeros:.1%} of them meet a zero" if zeros else ""
    return f"An image takes {macs:.3g} G multiplications{whole}{met}."


def recovery(result: Result) -> str:
    """A sentence on the share of the dense accuracy that is kept, and in which engine.

    It is empty where no baseline was measured.
    """
    share, dense = number(result, "recovery/map50"), number(result, "baseline/map50")
    if dense is None:
        return ""
    if share is None:
        return f"The dense baseline has mAP50 {dense:.3f}."
    found = ((_RECOVERY.fullmatch(name), value) for name, value in result.items())
    where = next((f", in {match['engine']}" for match, value in found if match and value == share), "")
    return f"Keeps {share:.1%} of the dense mAP50 {dense:.3f}{where}."
