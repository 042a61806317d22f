"""The names that ``result.json`` of a run will have, known before it runs; see docs/architecture.md."""

from __future__ import annotations

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.metrics.names import full_name
from sparse_exp.stages.registry import STAGES

TEXTS = frozenset(("weights/origin", "zoo/stub"))  # the only ones that are no numbers


def certain_names(experiment: Experiment) -> set[str]:
    """Names that the result of an experiment has for certain, once all its stages are finished.

    Args:
        experiment: checked.
    """
    times = {f"time/{stage}_s" for stage in experiment.stages}
    return times.union(*(STAGES[stage].certain_names(experiment) for stage in experiment.stages))


def expected_names(experiment: Experiment) -> set[str]:
    """Names that the result of an experiment may have: the certain ones, and those that depend on more.

    Where it takes the data set, the baseline or an earlier start of the run to know whether a name will be
    there, it counts as possible.

    Args:
        experiment: checked.
    """
    possible = (STAGES[stage].possible_names(experiment) for stage in experiment.stages)
    names = certain_names(experiment).union(*possible)
    if experiment.resume:  # what its earlier starts measured stays
        names |= {f"time/{stage}_s" for stage in STAGES}
        names = names.union(*(stage.certain_names(experiment) for stage in STAGES.values()))
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
