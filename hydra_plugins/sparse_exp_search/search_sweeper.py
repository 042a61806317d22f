"""The sweeper that Hydra calls: it launches the jobs that Optuna proposes, and tells Optuna their values.

Every Hydra program that runs in this environment imports this file. So it imports Optuna, and sparse_exp,
which sets environment variables, in functions only.
"""

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
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra_plugins.sparse_exp_search._study import Search, SearchJob
    from sparse_exp.config.schema import Experiment

_log = logging.getLogger("sparse_exp.search")  # below sparse_exp, whose messages the command line shows


# The keys below hydra.sweeper, as a plain dict. Hydra executes a plugin before it adds it to sys.modules, and
# until then a dataclass cannot look up its annotations, which are strings here.
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
        params: for each key the values to search, in the grammar of Hydra's sweeps; the command line adds to
            them and replaces them.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the arguments, and make the launcher; see Hydra's ``Sweeper``."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search, and log its summary.

        Args:
            arguments: the command line's words that do not set up Hydra.

        Raises:
            ConfigError: see `sparse_exp_search._preparation.prepare_search`.
            MissingDependency: Optuna is not installed.
            Exception: the error of the first job that failed; all others have run.
        """
        assert self.config is not None
        search, first = self._prepare(arguments)
        if first.dry_run:  # the plan of one job; no study and no file
            for _, returned in self._launch(search.propose(1)):
                _ = returned.return_value  # raises the job's error
            return
        directory = Path(self.config.hydra.sweep.dir)
        OmegaConf.save(self.config, directory / "multirun.yaml")  # as Hydra's own sweeper does
        left = search.unfinished(failed=first.sweep.rerun == "failed")
        failures: list[Exception] = []
        at_once = first.launcher.jobs
        while batch := left[:at_once] or search.propose(min(at_once, first.sweep.trials - search.ended)):
            left = left[at_once:]
            for job, returned in self._launch(batch):
                failures += search.tell(job, returned)
        search.write(directory / "search.json")
        _log.info("%s", search.summary())
        if failures:
            raise failures[0]

    def _prepare(self, arguments: list[str]) -> tuple[Search, Experiment]:
        """The search, and the experiment at one point of its space."""
        from sparse_exp.errors import MissingDependency

        try:
            from hydra_plugins.sparse_exp_search._preparation import prepare_search
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            do = "Install it with: pip install 'sparse-exp[search]'"
            raise MissingDependency(f"A search needs Optuna, which is not installed. {do}") from error
        assert self.config is not None
        assert self.hydra_context is not None
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        return prepare_search(self.config, self.hydra_context.config_loader, words)

    def _launch(self, jobs: Sequence[SearchJob]) -> list[tuple[SearchJob, Any]]:
        """Run jobs, and pair each with its result. Those with consecutive numbers run at once.

        A launcher numbers the jobs of one call consecutively, so that others need a call of their own.
        """
        assert self.launcher is not None
        done: list[tuple[SearchJob, Any]] = []
        for _, run in itertools.groupby(enumerate(jobs), key=lambda pair: pair[1].number - pair[0]):
            consecutive = [job for _, job in run]
            words = [job.words for job in consecutive]
            returned = self.launcher.launch(words, initial_job_idx=consecutive[0].number)
            done += zip(consecutive, returned, strict=True)
        return done
