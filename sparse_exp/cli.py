"""The command line: find the configuration, let Hydra compose it, check it, run it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sparse_exp.config.resolve import CONF_DIRECTORY, resolve
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, SparseExpError

_log = logging.getLogger("sparse_exp")
OmegaConfKeyError = (ConfigKeyError, ConfigAttributeError)
_NO_OPTION = "Config group override must be"  # Hydra's ValueError for group=null


def main() -> None:
    """Run the command line; every failure ends in plain lines and an exit code that is not 0."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them
    _register_schema()
    try:
        _compose_and_run()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        sys.exit(f"Error: {_one_line(error)}")
    except ValueError as error:
        groups = [word.removesuffix("=null") for word in sys.argv[1:] if word.endswith("=null")]
        if wants_traceback or not groups or not str(error).startswith(_NO_OPTION):
            raise
        sys.exit(f"Error: The group {groups[0]} needs an option. Choose one; --help lists them.")
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _register_schema() -> None:
    store, schema = ConfigStore.instance(), OmegaConf.structured(Experiment)
    # Which variables there are is for the recipe to know, whose file may be another than the option's.
    OmegaConf.set_struct(schema.recipe.variables, False)
    store.store(name="schema", node=schema)
    # Hydra deep-copies the whole store about a hundred times for --help. It is only read from here on,
    # and what is loaded from it is copied anyway.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]


@hydra.main(version_base="1.3", config_path=str(CONF_DIRECTORY), config_name="config")
def _compose_and_run(config: DictConfig) -> None:
    log_to_console()
    job = HydraConfig.get()
    if job.runtime.output_dir != str(Path.cwd()):  # a job of a sweep, or hydra.run.dir=... was given
        config.paths.run = job.runtime.output_dir
    _leave_option_variables(config, job)
    try:
        experiment = resolve(config)
        from sparse_exp.experiment import run

        run(experiment, _hydra_files(config, job), list(job.overrides.task))
    except OmegaConfBaseException as error:
        sys.exit(f"Error: {_one_line(error)}")
    except ConfigError as error:
        sys.exit("\n".join(f"Error: {problem}" for problem in error.problems))
    except SparseExpError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


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


def log_to_console() -> None:
    """Let what the package logs, from INFO on, reach standard error as plain lines."""
    if not _log.handlers:
        handler = _ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.propagate = False
    _log.setLevel(logging.INFO)


def _one_line(error: HydraException | OmegaConfBaseException) -> str:
    """What Hydra or OmegaConf spread over several lines, with what to do about it."""
    while isinstance(error.__cause__, HydraException | OmegaConfBaseException):
        error = error.__cause__
    if isinstance(error, OmegaConfKeyError):
        parent = OmegaConf.to_container(error.parent_node) if error.parent_node is not None else {}
        keys = ", ".join(str(key) for key in parent if key != "hydra") if isinstance(parent, dict) else ""
        return f"Unknown key {error.full_key}. Keys there: {keys}."
    if isinstance(error, OmegaConfBaseException):
        first = str(error).splitlines()[0].rstrip(".")
        return f"{error.full_key or 'configuration'}: {first}. Correct the value; --help lists all keys."
    text = str(error).partition("Config search path")[0]
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{first}. {' '.join(rest[:1])} {', '.join(rest[1:])}".rstrip(" .") + "."
