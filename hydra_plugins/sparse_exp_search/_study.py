"""The study of a search in Optuna: its jobs so far, the jobs to launch next, and the best ones.

Each job is a trial of the study, with the number of the job as an attribute. A job that is launched again is
a new trial with the same parameters and number; the last trial of a number counts.

The sampler is TPE, with one objective and with several. The searches here have some dozens of jobs, and an
evolutionary sampler such as NSGA-II would draw as many at random for its first population. A proposal depends
only on the seed, the number of the job and the trials before it. So an interrupted search goes on as if it
had not been interrupted.
"""

from __future__ import annotations

import io
import math
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.utils import JobReturn
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hydra_plugins.sparse_exp_search._space import Space
from sparse_exp.errors import ConfigError, StageFailed, expected, first_line
from sparse_exp.files import write_json
from sparse_exp.text import console_table, plain_text

FILE = "study.db"
_JOB, _TASK, _FAILURE = "job", "task", "failure"
_ENDED = (TrialState.COMPLETE, TrialState.FAIL)
_LOCK_TIMEOUT_S = 60
# Words that may change in a later start, since the results of the jobs do not depend on them.
_MAY_CHANGE = re.compile(r"[+~]*(launcher[.=]|ray\.|tracker[.=]|paths[.=]|sweep\.(name|rerun|trials)=)")


@dataclass(frozen=True)
class Objective:
    """A metric that the search improves.

    Attributes:
        name: its full name.
        less: whether less is better; else more is.
    """

    name: str
    less: bool

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction under Optuna's name."""
        return "minimize" if self.less else "maximize"


@dataclass(frozen=True)
class SearchJob:
    """A job to launch.

    Attributes:
        number: from 0, without gaps.
        words: its overrides.
        trial: its trial in Optuna, which is running.
    """

    number: int
    words: list[str]
    trial: Trial


def open_study(
    directory: Path | None, space: Space, objectives: Sequence[Objective], *, anew: bool
) -> optuna.Study:
    """Open the study of an earlier start, or begin a new one.

    Args:
        directory: of the sweep; None: the study is kept in memory.
        space: the space of the search.
        objectives: the metrics to improve.
        anew: begin a new study in any case; the earlier ones stay in the file.

    Raises:
        ConfigError: the file cannot be used, or its study is that of another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = _storage(directory)
        count = len(optuna.get_all_study_names(storage))
        name = f"search-{count if anew or not count else count - 1}"
        directions = [objective.direction for objective in objectives]
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, load_if_exists=True
        )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        do = "Move the file away, or choose another sweep.name."
        raise ConfigError(f"The study in {directory} cannot be used: {first_line(error)} {do}") from error
    fixed = sorted(word for word in space.fixed if not _MAY_CHANGE.match(word))
    directed = [f"{objective.direction} {objective.name}" for objective in objectives]
    task = {"objectives": directed, "fixed words": fixed, **space.described}
    before = study.user_attrs.get(_TASK, task)
    if before != task:
        changed = ", ".join(key for key in {**task, **before} if task.get(key) != before.get(key))
        raise ConfigError(
            f"The search in {directory} was another one: {changed} changed. Choose another sweep.name, or "
            "begin anew with sweep.rerun=all."
        )
    study.set_user_attr(_TASK, task)
    return study


def _storage(directory: Path | None) -> optuna.storages.BaseStorage:
    if directory is None:
        return optuna.storages.InMemoryStorage()
    directory.mkdir(parents=True, exist_ok=True)
    waiting = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}}
    return optuna.storages.RDBStorage(f"sqlite:///{directory.absolute() / FILE}", engine_kwargs=waiting)


class Search:
    """The jobs of a study.

    Args:
        study: see `open_study`.
        space: the space of the search.
        objectives: the metrics to improve.
        seed: of the proposals.
    """

    def __init__(self, study: optuna.Study, space: Space, objectives: Sequence[Objective], seed: int) -> None:
        self._study, self._space, self._objectives, self._seed = study, space, list(objectives), seed

    @property
    def trials(self) -> dict[int, FrozenTrial]:
        """The last trial of each job, by its number."""
        trials = self._study.get_trials(deepcopy=False)
        latest = {trial.user_attrs[_JOB]: trial for trial in trials if _JOB in trial.user_attrs}
        return dict(sorted(latest.items()))

    @property
    def ended(self) -> int:
        """Jobs that have finished or failed."""
        return sum(trial.state in _ENDED for trial in self.trials.values())

    def unfinished(self, *, failed: bool) -> list[SearchJob]:
        """The jobs of an earlier start whose end it has not recorded, to be launched again.

        Args:
            failed: whether jobs that have failed are launched again, too.
        """
        for _ in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self._study.tell(self._study.ask(), state=TrialState.FAIL)  # an earlier start ended within _job
        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        states = (TrialState.RUNNING, TrialState.FAIL) if failed else (TrialState.RUNNING,)
        jobs = [
            self._job(number, trial.params) for number, trial in self.trials.items() if trial.state in states
        ]
        for trial in left:  # only now, so that no job is lost when this process ends before
            self._study.tell(trial.number, state=TrialState.FAIL)
        return jobs

    def propose(self, count: int) -> list[SearchJob]:
        """Propose new jobs; in a finite space none is the same as another.

        Args:
            count: how many, at most as many as the space has left; none where it is not positive.
        """
        left = self._space.size - len(self.trials)
        return [self._proposal() for _ in range(min(max(0, count), int(min(left, count))))]

    def _proposal(self) -> SearchJob:
        trials = self.trials
        number = len(trials)
        chance = random.Random(f"{self._seed}/{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar, with which running jobs count, is experimental
            sampler = optuna.samplers.TPESampler(seed=chance.getrandbits(31), constant_liar=True)
        self._study.sampler = sampler
        trial = self._study.ask(self._space.axes)
        seen = {self._space.key_of(before.params) for before in trials.values()}
        if self._space.key_of(trial.params) in seen and self._space.size < math.inf:
            self._study.tell(trial, state=TrialState.FAIL)  # a job would measure the same again
            return self._job(number, self._space.another(seen, chance))
        trial.set_user_attr(_JOB, number)
        return SearchJob(number, self._space.job_words(trial.params), trial)

    def _job(self, number: int, parameters: Mapping[str, Any]) -> SearchJob:
        """A job with a new trial of these parameters."""
        self._study.enqueue_trial(dict(parameters))
        trial = self._study.ask(self._space.axes)
        trial.set_user_attr(_JOB, number)
        return SearchJob(number, self._space.job_words(trial.params), trial)

    def tell(self, job: SearchJob, returned: JobReturn) -> list[Exception]:
        """Record the result of a job.

        Args:
            job: the job.
            returned: by its launcher.

        Returns:
            The error of a job that failed; else an empty list.
        """
        try:
            with redirect_stderr(io.StringIO()):  # Hydra prints the overrides of a failed job there
                value = returned.return_value
            values = self._values(job, value)
        except Exception as error:
            job.trial.set_user_attr(_FAILURE, first_line(error))
            self._study.tell(job.trial, state=TrialState.FAIL)
            return [error]
        self._study.tell(job.trial, values)
        return []

    def _values(self, job: SearchJob, value: Any) -> list[float]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        names = [objective.name for objective in self._objectives]
        finite = all(isinstance(number, int | float) and math.isfinite(number) for number in values)
        if len(values) != len(names) or not finite:
            do = "Look at its log; choose other sweep.objectives if it cannot have them."
            raise StageFailed(
                expected(f"{', '.join(names)} of job {job.number}", "finite numbers", value, do)
            )
        return [float(number) for number in values]

    @property
    def best(self) -> list[tuple[int, FrozenTrial]]:
        """Number and trial of the jobs that no other beats, sorted by the first objective, best first."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.trials.values()):
            return []
        numbers = {trial.number for trial in self._study.best_trials}
        front = [(job, trial) for job, trial in self.trials.items() if trial.number in numbers]
        return sorted(front, key=lambda pair: pair[1].values[0], reverse=not self._objectives[0].less)

    def write(self, path: Path) -> None:
        """Write the whole search as JSON: objectives, numbers of jobs, the best jobs, all jobs."""
        failed = sum(trial.state == TrialState.FAIL for trial in self.trials.values())
        write_json(
            path,
            {
                "objectives": {objective.name: objective.direction for objective in self._objectives},
                "jobs": {"ended": self.ended, "failed": failed},
                "best": [self._row(job, trial) for job, trial in self.best],
                "all": [self._row(job, trial) for job, trial in self.trials.items()],
            },
        )

    def _row(self, number: int, trial: FrozenTrial) -> dict[str, Any]:
        names = [objective.name for objective in self._objectives]
        finished = trial.state == TrialState.COMPLETE
        return {
            "job": number,
            "state": "FINISHED" if finished else "FAILED",
            "parameters": dict(zip(self._space.axes, self._space.key_of(trial.params), strict=True)),
            "values": dict(zip(names, trial.values, strict=True)) if finished else {},
            "failure": trial.user_attrs.get(_FAILURE),
        }

    def summary(self) -> str:
        """A text for the console: the number of jobs, and the best of them as a table."""
        what = "The Pareto front" if len(self._objectives) > 1 else "The best"
        lines = [f"\nThe search has {self.ended} jobs. {what}:", self._table()] if self.best else []
        if len(self.trials) >= self._space.size:
            lines.append(f"All {self._space.size} points of its space were tried.")
        return "\n".join(lines) or f"The search has {self.ended} jobs, none of which finished."

    def _table(self) -> str:
        names = [objective.name for objective in self._objectives]
        rows = [
            [str(number), *self._space.key_of(trial.params), *(f"{value:.4g}" for value in trial.values)]
            for number, trial in self.best
        ]
        return plain_text(console_table(("job", *self._space.axes, *names), rows), width=110).rstrip()
