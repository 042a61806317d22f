"""The command line: find the configuration, let Hydra compose it, check it, run it."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from sparse_exp.bounded_yaml import sentence_of
from sparse_exp.command import print_any_text
from sparse_exp.config.places import apply_environment, register_schema
from sparse_exp.config.plain import CONF_DIRECTORY, group
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, first_line, for_users
from sparse_exp.redaction import RedactingFormatter, redact_tracebacks, secret_problem, without_secrets
from sparse_exp.sweep import naming

_log = logging.getLogger("sparse_exp")
OmegaConfKeyError = (ConfigKeyError, ConfigAttributeError)
# When this module is imported, as processes of a launcher do that never see `main`. What the launching
# process found is kept with the configuration: the words of the others are not those of the command.
OmegaConf.register_new_resolver("sweep_name", lambda: naming.launched, use_cache=True, replace=True)
_PLUGIN = re.compile(r"Could not find 'hydra/launcher/(\w+)'")
_PLACE = re.compile(r"In '(.+?)': ")
_EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_slurm": "slurm"}  # by Hydra's name of the launcher
_LAUNCHERS = ("joblib", "ray", "submitit")  # packages whose errors are theirs
_NO_OPTION = "Config group override must be"  # Hydra's ValueError for group=null


def main() -> None:
    """Run the command line; every failure ends in plain lines and an exit code that is not 0."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them
    print_any_text()
    # Hydra's own property prints the job's command line before it raises: what is wrong is one line here.
    returned: Any = JobReturn
    returned.return_value = property(_returned, returned.return_value.fset)
    redact_tracebacks()
    naming.launched = None
    if held := [override for override in sys.argv[1:] if without_secrets(override) != override]:
        sys.exit(f"Error: {secret_problem(*held[0].partition('=')[::2])}")
    try:
        register_schema(_config_dir(sys.argv[1:]))
        hydra.main(version_base="1.3", config_path=str(CONF_DIRECTORY), config_name="config")(task)()
    except BrokenPipeError as error:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _close_sweep(error)
        sys.exit(1)
    except BaseException as error:
        unfinished = _close_sweep(error)
        if wants_traceback and isinstance(error, Exception) and not isinstance(error, SparseExpError):
            raise
        _exit(for_users(error) if isinstance(error, Exception) else error, unfinished)
    else:
        _exit(None, _close_sweep(None))


def _config_dir(words: list[str]) -> str | None:
    """The value of Hydra's own option ``--config-dir``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd")
    with suppress(argparse.ArgumentError):  # Hydra says it
        found: str | None = parser.parse_known_args(words)[0].config_dir
        return found
    return None


def _returned(job: JobReturn) -> Any:
    """What a job returned; its error is raised."""
    if job.status == JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def _close_sweep(error: BaseException | None) -> str | None:
    """Close the sweep that this process has opened, if it has; what to end with where jobs failed."""
    launch = sys.modules.get("sparse_exp.sweep.launch")
    return launch.close_sweep(error) if launch else None


def _exit(error: BaseException | None, unfinished: str | None) -> None:
    """End with what a user is told of an error.

    Raises:
        BaseException: the error itself where it is none of a user's.
    """
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if unfinished and (error is None or isinstance(error, SparseExpError)):
        sys.exit(f"Error: {unfinished}")
    launcher = type(error).__module__.partition(".")[0] in _LAUNCHERS  # such as of a worker that was killed
    if isinstance(error, Exception) and (unfinished or launcher):
        then = unfinished or "The same command goes on with the sweep."
        sys.exit(without_secrets(f"Error: {type(error).__name__}: {first_line(error)} {then}"))
    if isinstance(error, ConfigError):
        sys.exit(without_secrets("\n".join(f"Error: {problem}" for problem in error.problems)))
    if isinstance(error, SparseExpError):
        sys.exit(without_secrets(f"Error: {error}"))
    if isinstance(error, HydraException | OmegaConfBaseException):
        sys.exit(without_secrets(f"Error: {_one_line(error)}"))
    if isinstance(error, YAMLError):
        sys.exit(f"Error: {sentence_of(error)}")
    groups = [word.removesuffix("=null") for word in sys.argv[1:] if word.endswith("=null")]
    if isinstance(error, ValueError) and groups and str(error).startswith(_NO_OPTION):
        sys.exit(f"Error: The group {groups[0]} needs an option. Choose one; --help lists them.")
    if error is not None:
        raise error


def task(config: DictConfig) -> Any:
    """Run what Hydra composed: the run, or one job of a sweep, perhaps in a process of its launcher's.

    Returns:
        For a job the values of ``sweep.objectives``, for the sweeper.

    Raises:
        SparseExpError: what stopped it.
    """
    from sparse_exp.experiment import run
    from sparse_exp.resolve import resolve
    from sparse_exp.resume import resumed

    job = HydraConfig.get()
    swept = not OmegaConf.is_missing(job.job, "num")
    if job.job.chdir:
        raise ConfigError(naming.NO_CHDIR)
    log_to_console(f"[{job.job.num}] " if swept and config.launcher.jobs > 1 else "")
    if job.runtime.output_dir != str(Path.cwd()):  # a job of a sweep, or hydra.run.dir=... was given
        config.paths.run = job.runtime.output_dir
    _leave_option_variables(config, job)
    _take_typed_stub(config, list(job.overrides.task))
    apply_environment(config, job.overrides.task)
    by_time = "${now:" in str(OmegaConf.to_container(config.paths)["run"])  # type: ignore[index, call-overload]
    if swept and config.resume:  # each job would go on with that one run, as another experiment
        do = "A sweep goes on by its own command; to go on with one run, leave out -m."
        raise ConfigError(f"resume={config.resume} is of no use in a sweep. {do}")
    if swept:
        return _run_job(config, job)

    words = list(job.overrides.task)
    if config.sweep.objectives or job.runtime.choices.get("sweep"):
        _log.warning("Without -m this is a single run: sweep= and sweep.objectives have no effect.")
    if config.resume:
        start = resumed(config, job)
        run(start.experiment, _hydra_words(start.words), start.words, whole=start.whole)
    else:
        run(resolve(config), _hydra_files(config, job), words, numbered=by_time)
    return None


def _run_job(config: DictConfig, job: Any) -> Any:
    from sparse_exp.children import end_when_orphaned
    from sparse_exp.resolve import resolve
    from sparse_exp.sweep.job import Job, record_failure, run_job

    end_when_orphaned()
    place = Job(
        number=int(job.job.num),
        directory=Path(job.runtime.output_dir),
        sweep=Path(job.sweep.dir),
        overrides=list(job.overrides.task),
        hydra_files=_hydra_files(config, job),
    )
    experiment = None
    try:
        if place.earlier:  # so that what it made itself does not stand in its way
            config.resume = str(place.directory)
        experiment = resolve(config)
        return run_job(place, experiment)
    except Exception as error:
        tracker = group(config, "tracker", TrackerConfig)
        if not config.dry_run:
            record_failure(place, str(config.name), tracker, Path(config.paths.mlflow), experiment, error)
        for line in str(error).splitlines():
            _log.error("Job %d failed: %s", place.number, line)
        raise error if isinstance(error, SparseExpError) else _as_failure(error) from None


def _as_failure(error: Exception) -> SparseExpError:
    """An error that reaches the launcher from whatever process: not all kinds can be sent."""
    if isinstance(error, OmegaConfBaseException):
        return ConfigError(_one_line(error))
    if isinstance(missing := for_users(error), SparseExpError):
        return missing
    _log.debug("Unexpected", exc_info=error)
    return StageFailed(f"{type(error).__name__}: {first_line(error)}")


def _take_typed_stub(config: DictConfig, words: list[str]) -> None:
    """Let a ``model.stub`` that is typed be the start, over ``model.weights`` of a file, for any model.

    Raises:
        ConfigError: other weights are typed, too.
    """
    from sparse_exp.sources.start import is_shipped

    typed = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(words)}
    stub, weights = typed.get("model.stub"), typed.get("model.weights")
    if not stub:
        return
    if weights:
        raise ConfigError(f"model.stub={stub} and model.weights={weights} are two starts. Leave one out.")
    model = config.model
    if model.weights or not is_shipped(model.name):  # of those that are, `sources.start.chosen` knows it
        model.weights = model.stub


def _leave_option_variables(config: DictConfig, job: Any) -> None:
    """Where ``recipe.file`` is another than that of the recipe's option, leave out the option's variables.

    Those set on the command line stay, and of a preset or ``conf/local`` those with a value that the
    option does not have: what is composed does not tell who set it.
    """
    option = _option_values(job, "recipe")
    variables: Any = OmegaConf.to_container(config.recipe.variables)
    own = option.get("variables") or {}
    if not own or option.get("file") == config.recipe.file:
        return
    said = _variables_said(list(job.overrides.task))
    left = [name for name in own if name not in said and name in variables and variables[name] == own[name]]
    config.recipe.variables = {name: value for name, value in variables.items() if name not in left}
    if left:
        _log.info(
            "recipe.file=%s is not the file of recipe=%s: its variables are left out (%s).",
            config.recipe.file,
            job.runtime.choices["recipe"],
            ", ".join(left),
        )


def _option_values(job: Any, group: str) -> dict[str, Any]:
    """The chosen option of a group as its file has it; empty where there is none."""
    name = f"{group}/{job.runtime.choices.get(group)}.yaml"
    folders = [Path(source.path) for source in job.runtime.config_sources if source.schema == "file"]
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    values = OmegaConf.to_container(OmegaConf.load(path)) if path else {}
    return values if isinstance(values, dict) else {}  # type: ignore[return-value]


def _variables_said(words: list[str]) -> set[str]:
    """The recipe variables that a command line sets."""
    key, said = "recipe.variables", set()
    for word in OverridesParser.create().parse_overrides(words):
        value = word.value()
        if word.key_or_group == key and isinstance(value, dict):
            said |= {str(getattr(name, "text", name)) for name in value}
        elif word.key_or_group.startswith(f"{key}."):
            said.add(word.key_or_group.removeprefix(f"{key}."))
    return said


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever standard error is now: a progress bar replaces it while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.INFO)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def _hydra_files(config: DictConfig, job: Any) -> dict[str, str]:
    return {
        "config.yaml": OmegaConf.to_yaml(config),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.masked_copy(OmegaConf.create({"hydra": job}), "hydra")),
        "overrides.yaml": OmegaConf.to_yaml(job.overrides.task),
    }


def _hydra_words(words: list[str] | None) -> dict[str, str]:
    """Of the files that Hydra wrote at a run's first start, what a later one changes."""
    return {} if words is None else {"overrides.yaml": OmegaConf.to_yaml(words)}


def log_to_console(prefix: str = "") -> None:
    """Let what the package logs, from INFO on, reach standard error as plain lines.

    Args:
        prefix: of each line, to tell runs apart that log beside each other.
    """
    if not _log.handlers:
        _log.addHandler(_ConsoleHandler())
        _log.propagate = False
    for handler in _log.handlers:
        if isinstance(handler, _ConsoleHandler):
            handler.setFormatter(RedactingFormatter(f"{prefix}%(message)s"))
    _log.setLevel(logging.INFO)


def _one_line(error: HydraException | OmegaConfBaseException) -> str:
    """What Hydra or OmegaConf spread over several lines, with what to do about it."""
    where = ""
    if (place := _PLACE.match(str(error))) and isinstance(error.__context__, OmegaConfBaseException):
        where, error = f"{place[1]}.yaml: ", error.__context__  # Hydra raises it without a cause
    while isinstance(error.__cause__, HydraException | OmegaConfBaseException):
        error = error.__cause__
    if isinstance(error, OmegaConfKeyError):
        parent = OmegaConf.to_container(error.parent_node) if error.parent_node is not None else {}
        keys = ", ".join(str(key) for key in parent if key != "hydra") if isinstance(parent, dict) else ""
        return f"{where}Unknown key {error.full_key}. Keys there: {keys}."
    if isinstance(error, OmegaConfBaseException):
        first, key = str(error).splitlines()[0].rstrip("."), error.full_key or "configuration"
        if "is not a ListConfig" in first:
            return f"{where}Expected {key} to be a list. Write it in brackets: {key}=[...]."
        return f"{where}{key}: {first}. Correct the value; --help lists all keys."
    text = str(error).partition("Config search path")[0]
    if (plugin := _PLUGIN.search(text)) and (extra := _EXTRAS.get(plugin[1])):
        return f"launcher={extra} is not installed. Install it with: pip install 'sparse-exp[{extra}]'"
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{first}. {' '.join(rest[:1])} {', '.join(rest[1:])}".rstrip(" .") + "."
