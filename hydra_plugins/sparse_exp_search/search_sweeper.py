"""The sweeper: what Hydra calls, and the loop from proposals over jobs to their values."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from hydra_plugins.sparse_exp_search._study import Job, Objective, Search
    from sparse_exp.config.schema import Experiment

_log = logging.getLogger("sparse_exp.search")  # of this name the command line shows everything


# The keys below hydra.sweeper. A plain dict: Hydra runs plugins before it lists them as modules, and until
# then no dataclass can be made of annotations that are texts.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="search",
    node={"_target_": "hydra_plugins.sparse_exp_search.search_sweeper.SearchSweeper", "params": None},
    provider="sparse_exp",
)


class SearchSweeper(Sweeper):
    """Launches jobs that Optuna proposes, ``launcher.jobs`` at once, until there are ``sweep.trials``.

    The study lies in ``study.db`` in the sweep's directory, so that the same command goes on with it. A
    job's task function returns the values of ``sweep.objectives``: a number, or several in a sequence.

    Args:
        params: what varies, in the grammar of Hydra's sweeps; the command line adds to it and replaces it.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over, and make the launcher; see Hydra's ``Sweeper``."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search, and say what was found.

        Args:
            arguments: the command line's words that do not set up Hydra.

        Raises:
            ConfigError: nothing varies, an objective is not known, a job could not be composed, or the study
                is of another search.
            MissingDependency: Optuna is not installed.
            Exception: what the first job that failed raised; the others have run.
        """
        assert self.config is not None
        search, first = self._prepare(arguments)
        if first.dry_run:  # of one job, and nothing is kept
            for _, returned in self._launch(search.propose(1)):
                _ = returned.return_value  # raises what stopped it
            return
        directory = Path(self.config.hydra.sweep.dir)
        OmegaConf.save(self.config, directory / "multirun.yaml")  # as Hydra's own sweeper does
        again = search.unfinished(failed=first.sweep.rerun == "failed")
        failures: list[Exception] = []
        at_once = first.launcher.jobs
        while batch := again[:at_once] or search.propose(min(at_once, first.sweep.trials - search.ended)):
            again = again[at_once:]
            for job, returned in self._launch(batch):
                failures += search.tell(job, returned)
        search.write(directory / "search.json")
        _log.info("%s", search.summary())
        if failures:
            raise failures[0]

    def _prepare(self, arguments: list[str]) -> tuple[Search, Experiment]:
        """The study, and the experiment at one point of its space."""
        from sparse_exp.errors import MissingDependency

        try:
            from hydra_plugins.sparse_exp_search._space import parse_space
            from hydra_plugins.sparse_exp_search._study import Search, open_study
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            do = "Install it with: pip install 'sparse-exp[search]'"
            raise MissingDependency(f"A search needs Optuna, which is not installed. {do}") from error
        assert self.config is not None
        assert self.hydra_context is not None
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        space = parse_space(words, self.hydra_context.config_loader)
        experiments = [self._experiment(point) for point in space.corners()]
        objectives, first = _objectives(experiments), experiments[0]
        directory = None if first.dry_run else Path(self.config.hydra.sweep.dir)
        study = open_study(directory, space, objectives, anew=first.sweep.rerun == "all")
        return Search(study, space, objectives, first.seed), first

    def _experiment(self, words: Sequence[str]) -> Experiment:
        """The checked configuration of a job."""
        from sparse_exp.resolve import resolve

        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        config = loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            del config["hydra"]
        return resolve(config)

    def _launch(self, jobs: Sequence[Job]) -> list[tuple[Job, Any]]:
        """Run jobs, those whose numbers follow each other at once, and pair each with what came of it."""
        assert self.launcher is not None
        done: list[tuple[Job, Any]] = []
        for _, run in itertools.groupby(enumerate(jobs), key=lambda pair: pair[1].number - pair[0]):
            together = [job for _, job in run]
            words = [job.words for job in together]
            returned = self.launcher.launch(words, initial_job_idx=together[0].number)
            done += zip(together, returned, strict=True)
        return done


def _objectives(experiments: Sequence[Experiment]) -> list[Objective]:
    """What is searched for, by full names; each must be there wherever in the space a job lies.

    Raises:
        ConfigError: there are none, or one is not known.
    """
    from hydra_plugins.sparse_exp_search._study import Objective
    from sparse_exp.errors import ConfigError
    from sparse_exp.metrics.pareto import less_is_better
    from sparse_exp.stages.names import resolve_objective

    short = experiments[0].sweep.objectives
    if not short:
        raise ConfigError("A search needs something to improve. Add sweep.objectives=[map50], for example.")
    named = [[resolve_objective(name, experiment) for name in short] for experiment in experiments]
    return [Objective(name, less=less_is_better(name)) for name in named[0]]
