"""Prepare a search: read its space, check configurations at its edges, open its study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, open_dict

from hydra_plugins.sparse_exp_search._space import parse_space
from hydra_plugins.sparse_exp_search._study import Objective, Search, open_study
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.metrics.pareto import less_is_better
from sparse_exp.resolve import resolve
from sparse_exp.stages.names import resolve_objective


def prepare_search(
    config: DictConfig, loader: ConfigLoader, words: Sequence[str]
) -> tuple[Search, Experiment]:
    """Check a search as far as possible, and open its study.

    Args:
        config: as Hydra composed it for the sweep.
        loader: composes the configuration of a job.
        words: overrides that say what varies, in Hydra's grammar.

    Returns:
        The search, and the checked configuration at one point of its space.

    Raises:
        ConfigError: nothing varies, an objective is not known, the configuration of a job is refused, or the
            study is that of another search.
        HydraException: a word is no override.
    """
    space = parse_space(words, loader)
    experiments = [_experiment(config, loader, point) for point in space.corners()]
    objectives, first = _objectives(experiments), experiments[0]
    directory = None if first.dry_run else Path(config.hydra.sweep.dir)
    study = open_study(directory, space, objectives, anew=first.sweep.rerun == "all")
    return Search(study, space, objectives, first.seed), first


def _experiment(config: DictConfig, loader: ConfigLoader, words: Sequence[str]) -> Experiment:
    """The checked configuration of a job."""
    composed = loader.load_sweep_config(config, list(words))
    with open_dict(composed):
        del composed["hydra"]
    return resolve(composed)


def _objectives(experiments: Sequence[Experiment]) -> list[Objective]:
    """The objectives under their full names; every experiment must have them.

    Raises:
        ConfigError: there are none, or one is not known.
    """
    short = experiments[0].sweep.objectives
    if not short:
        raise ConfigError("A search needs something to improve. Add sweep.objectives=[map50], for example.")
    named = [[resolve_objective(name, experiment) for name in short] for experiment in experiments]
    return [Objective(name, less=less_is_better(name)) for name in named[0]]
