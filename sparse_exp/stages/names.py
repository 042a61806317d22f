"""The names that ``result.json`` of a run will have, known before it runs; see docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sparse_exp.benchmark import NUMBERS, loads_of
from sparse_exp.config.schema import STAGES, Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.export.square import DENSE, MODEL, QDQ, TORCH, accuracy_prefix, file_name, size_prefix
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.metrics.names import full_name
from sparse_exp.metrics.result_rows import SPARSITIES

TEXTS = frozenset(("weights/origin", "zoo/stub"))  # the only ones that are no numbers
_SIZES = ("onnx_mb", "onnx_gzip_mb", "nonzero_mb")
_MAPS = ("map50", "map50_95")
_DIFFERENCES = (
    "score_mean",
    "score_max",
    "box_mean_px",
    "box_max_px",
    "matched_of_torch",
    "matched_of_engine",
    "map50_difference",
    "map50_difference_error",
)

Names = Iterator[str]


def certain_names(experiment: Experiment) -> set[str]:
    """Names that the result of an experiment has for certain, once all its stages are finished.

    Args:
        experiment: checked.
    """
    each = {f"time/{stage}_s" for stage in experiment.stages}
    return each.union(*(_CERTAIN[stage](experiment) for stage in experiment.stages if stage in _CERTAIN))


def expected_names(experiment: Experiment) -> set[str]:
    """Names that the result of an experiment may have: the certain ones, and those that depend on more.

    Where it takes the data set, the baseline or an earlier start of the run to know whether a name will be
    there, it counts as possible.

    Args:
        experiment: checked.
    """
    names = certain_names(experiment).union(_possible(experiment))
    if experiment.resume:  # what its earlier starts measured stays
        names |= {f"time/{stage}_s" for stage in STAGES}
        names = names.union(*(find(experiment) for find in _CERTAIN.values()))
    return names


def resolve_objective(name: str, experiment: Experiment) -> str:
    """The metric of ``result.json`` that one of ``sweep.objectives`` means.

    Args:
        name: in full or short, as `sparse_exp.metrics.names.full_name` understands it.
        experiment: checked; its stages, engines and batch sizes say which metrics there will be.

    Returns:
        The full name of a number.

    Raises:
        ConfigError: none of them, or several; names the closest.
    """
    try:
        return full_name(name, expected_names(experiment) - TEXTS)
    except ConfigError as error:
        raise ConfigError(f"sweep.objectives: {error}") from error


def _possible(experiment: Experiment) -> Names:
    if "evaluate" in experiment.stages:  # where the data set has that split
        yield from ("test/map50", "test/map50_95")
    if "verify" in experiment.stages:
        yield from _square(experiment)
    if "benchmark" in experiment.stages:  # where cells turn out to be possible
        yield from _speeds(experiment, experiment.hardware.engines, experiment.hardware.variants)
    if experiment.recovery.baseline == "none":
        return
    if "baseline" in experiment.stages:  # a dense run has none
        yield "baseline/map50"
    if "verify" in experiment.stages:
        yield "recovery/map50"
        yield from (f"recovery/{engine}/map50" for engine in experiment.hardware.engines)


def _square(experiment: Experiment) -> Names:
    """Of cells that may turn out to be impossible, or whose weights may be initial ones."""
    hardware = experiment.hardware
    others = [variant for variant in hardware.variants if variant != "sparse"]
    yield "size/dense_checkpoint_mb"
    yield from (f"size/{size_prefix(QDQ)}{name}" for name in _SIZES)  # of a quantized network
    if "sparse_fp32" in others:
        yield "size/sparse_fp32/checkpoint_mb"
    for engine in hardware.engines:
        yield from (accuracy_prefix(engine, variant) + name for variant in others for name in _MAPS)
        prefixes = {size_prefix(file_name(engine, variant)) for variant in others if engine != TORCH}
        yield from (f"size/{prefix}{name}" for prefix in prefixes for name in _SIZES)
    if TORCH in hardware.engines:  # which cannot run a quantized network
        yield from (f"deployed/{TORCH}/{name}" for name in _MAPS)


def _fetch(experiment: Experiment) -> Names:
    if "train" in experiment.stages:
        yield "weights/origin"


def _evaluate(_: Experiment) -> Names:
    yield from ("val/map50", "val/map50_95", "sparsity/prunable", "sparsity/total", "size/checkpoint_mb")


def _verify(experiment: Experiment) -> Names:
    yield from (f"size/{size_prefix(file)}{name}" for file in (MODEL, DENSE) for name in _SIZES)
    yield from (name for name in SPARSITIES if name == "sparsity/onnx")
    yield from ("quantized/convolutions", "quantizable/convolutions")
    for engine in [name for name in experiment.hardware.engines if name != TORCH]:
        yield from (f"deployed/{engine}/{name}" for name in _MAPS)
        yield from (f"verify/{engine}/{name}" for name in _DIFFERENCES)


def _benchmark(experiment: Experiment) -> Names:
    variants = [name for name in experiment.hardware.variants if name in ("dense", "sparse")]
    yield from _speeds(experiment, [name for name in experiment.hardware.engines if name != TORCH], variants)


def _speeds(experiment: Experiment, engines: Sequence[str], variants: Sequence[str]) -> Names:
    for load in loads_of(experiment.hardware, usable_physical_cores()):
        for engine in engines:
            for variant in variants:
                yield from (f"benchmark/{engine}/{variant}/{load.key}/{name}" for name in NUMBERS)


def _publish(_: Experiment) -> Names:
    yield "zoo/stub"


_CERTAIN: dict[str, Callable[[Experiment], Names]] = {
    "fetch": _fetch,
    "evaluate": _evaluate,
    "verify": _verify,
    "benchmark": _benchmark,
    "publish": _publish,
}
