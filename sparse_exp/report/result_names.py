"""The names that ``result.json`` of a run will have, known before it runs; see docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sparse_exp.compare.names import full_name
from sparse_exp.config.schema import STAGES, Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.report.results import SIZES, SPARSITIES

TEXTS = frozenset(("weights/origin", "zoo/stub"))  # the only ones that are no numbers
_SPEEDS = ("items_per_s", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "spread")
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
        name: in full or short, as `sparse_exp.compare.names.full_name` understands it.
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
    if experiment.recovery.baseline == "none":
        return
    if "baseline" in experiment.stages:  # a dense run has none
        yield "baseline/map50"
    if "verify" in experiment.stages:
        yield "recovery/map50"
        yield from (f"recovery/{engine}/map50" for engine in experiment.hardware.engines)


def _fetch(experiment: Experiment) -> Names:
    if "train" in experiment.stages:
        yield "weights/origin"


def _evaluate(_: Experiment) -> Names:
    yield from ("val/map50", "val/map50_95", "sparsity/prunable", "sparsity/total", "size/checkpoint_mb")


def _verify(experiment: Experiment) -> Names:
    yield from (name for name in SIZES if name != "size/checkpoint_mb")
    yield from (name for name in SPARSITIES if name == "sparsity/onnx")
    yield from ("quantized/convolutions", "quantizable/convolutions")
    for engine in experiment.hardware.engines:
        yield from (f"deployed/{engine}/map50", f"deployed/{engine}/map50_95")
        yield from (f"verify/{engine}/{name}" for name in _DIFFERENCES)


def _benchmark(experiment: Experiment) -> Names:
    for engine in experiment.hardware.engines:
        for variant in ("dense", "sparse"):
            for batch in experiment.hardware.batch_sizes:
                yield from (f"benchmark/{engine}/{variant}/b{batch}/{name}" for name in _SPEEDS)


def _publish(_: Experiment) -> Names:
    yield "zoo/stub"


_CERTAIN: dict[str, Callable[[Experiment], Names]] = {
    "fetch": _fetch,
    "evaluate": _evaluate,
    "verify": _verify,
    "benchmark": _benchmark,
    "publish": _publish,
}
