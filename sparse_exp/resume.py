"""A run that is gone on with: its recorded configuration, with the words of the command line laid over it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from sparse_exp.config.places import apply_environment
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import STAGES, Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of
from sparse_exp.hints import override
from sparse_exp.resolve import read_record, resolve
from sparse_exp.runs.directory import CONFIG, Run
from sparse_exp.runs.past import ABOUT_THE_PLACE

# What a run is: with another value of these it would be another run, and its finished stages wrong.
_WHAT_IT_IS = ("model", "dataset", "recipe")
# Of these the values that say how a run computes: any number of workers and any cache gives the same images.
_HOW_IT_COMPUTES = ("dataset.workers", "dataset.cache")
# Before the data was read nothing depends on what is done with images that cannot be used.
_UNTIL_IT_IS_READ = ("dataset.on_corrupt",)
# Stages that have nothing to do, and so are not in the record, until the key gets a value.
_BROUGHT_BY = {"publish": "publish", "tracker.register": "register"}
_LONGEST_VALUE = 40  # characters, in an error
_MOST_VALUES = 6  # in an error: of another model the name says enough


@dataclass(frozen=True)
class Resumed:
    """One more start of a run.

    Attributes:
        experiment: what this start does.
        whole: what the run is, for its record: with the stages of all its starts.
        words: of a command line that makes the whole run again; None where those of its first start are
            not known.
    """

    experiment: Experiment
    whole: Experiment
    words: list[str] | None


def resumed(composed: DictConfig, job: Any) -> Resumed:
    """Lay a command line over what a run recorded of itself; nothing is written.

    Args:
        composed: what Hydra made of the command line and the defaults; ``resume`` names the run.
        job: Hydra's own configuration.

    Raises:
        ConfigError: the run has no readable record; it is to get another model, data set or recipe; or
            `resolve` finds a problem.
    """
    run = Run.read(Path(composed.resume))
    record = _record(run)
    config = copy.deepcopy(record)
    _lay_over(config, composed, job)
    typed_first = map(str, run.state.get("overrides", []))  # what was typed then wins as if typed now
    apply_environment(config, [*typed_first, *job.overrides.task])
    config.resume = composed.resume
    moved = Path(record.paths.run).resolve() != run.path
    config.paths.run = composed.resume if moved else record.paths.run
    idle = {stage for key, stage in _BROUGHT_BY.items() if OmegaConf.select(config, key) is None}
    if config.stages == record.stages:  # then nobody needs to name those that have something to do now
        config.stages = [*record.stages, *({*_BROUGHT_BY.values()} - idle - {*record.stages})]
    _require_same_run(run, record, config)
    experiment = resolve(config)
    of_all_starts = {*record.stages, *experiment.stages} - idle
    stages = [stage for stage in STAGES if stage in of_all_starts]
    whole = replace(experiment, stages=stages, resume=None)
    return Resumed(experiment, whole, _words(run.state.get("overrides"), record, whole))


def _record(run: Run) -> DictConfig:
    try:
        text = (run.path / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The run {run.path} has no {CONFIG} that can be read, so nobody knows how to go on with it. "
            "Start a new run without resume=."
        ) from error
    return read_record(text)


def _lay_over(config: DictConfig, composed: DictConfig, job: Any) -> None:
    """Let a record have what the words of a command line say.

    ``GROUP=OPTION`` replaces a group as a whole. What presets say, which may set anything, is what the
    composition differs in from one without any words. Then each ``KEY=VALUE`` sets its key.
    """
    typed: Any = OmegaConf.to_container(job.overrides.task)  # with the interpolations as they were typed
    words = OverridesParser.create().parse_overrides(typed)
    groups = [word for word in words if word.package or _is_choice(word, job.runtime.choices)]
    if groups:
        plain = compose(job.job.config_name, [])
        for key, (_, value) in _differences(plain, composed, resolve=False).items():
            OmegaConf.update(config, key, value)
    for key in (word.key_or_group for word in groups):
        if key in config:
            config[key] = copy.deepcopy(composed[key])
    for word in words:
        if word.is_delete():
            _delete(config, word.key_or_group, composed)
        elif word not in groups:  # Hydra took it: types fit, and resolve finds keys that are not known
            OmegaConf.update(config, word.key_or_group, word.value(), merge=True, force_add=True)


def _is_choice(word: Override, choices: Mapping[str, Any]) -> bool:
    """Whether a word chooses an option, as Hydra tells it from one that sets values of a group."""
    return word.key_or_group in choices and not isinstance(word.value(), dict) and not word.is_delete()


def _delete(config: DictConfig, key: str, composed: DictConfig) -> None:
    """Take a value out of a record, or back to the schema's where Hydra left that."""
    where, _, name = key.rpartition(".")
    node = OmegaConf.select(config, where) if where else config
    left = OmegaConf.select(composed, key)
    if left is not None:
        OmegaConf.update(config, key, left, merge=False)
    elif node is not None and name in node:
        OmegaConf.set_struct(node, False)
        del node[name]


def _require_same_run(run: Run, record: DictConfig, config: DictConfig) -> None:
    may_change = (*_HOW_IT_COMPUTES, *(_UNTIL_IT_IS_READ if "fetch" not in run.records else ()))
    others = [
        f"{_cut(override(key, new))} instead of {_cut(override(key, old).partition('=')[2])}"
        for key, (old, new) in _differences(record, config).items()
        if key.partition(".")[0] in _WHAT_IT_IS and key not in may_change
    ]
    file, recorded = recipe_path(config.recipe.file), run.state.get("conditions", {}).get("recipe")
    if not others and recorded and file.is_file() and sha256_of(file) != recorded:
        others = [f"another content of {config.recipe.file}"]
    if others:
        if len(others) > _MOST_VALUES:
            others[_MOST_VALUES:] = [f"{len(others) - _MOST_VALUES} more"]
        do = "Leave out what changes them, or start a new run without resume=."
        raise ConfigError(
            f"Expected the run {run.path} to keep its model, data set and recipe, "
            f"but got {', '.join(others)}. {do}"
        )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _words(recorded: Iterable[str] | None, record: DictConfig, whole: Experiment) -> list[str] | None:
    """Words that make a run again as it is now: those it had, and each value that has changed since."""
    if recorded is None:
        return None
    changed = {
        key: override(key, value)
        for key, (_, value) in _differences(record, OmegaConf.create(as_dict(whole))).items()
        if not f"{key}=".startswith(ABOUT_THE_PLACE)
    }
    kept = [word for word in recorded if word.partition("=")[0].lstrip("+") not in changed]
    return [*kept, *changed.values()]


def _differences(then: DictConfig, now: DictConfig, *, resolve: bool = True) -> dict[str, tuple[Any, Any]]:
    """Keys whose values are not the same, each with both; a value that is not there is None."""
    old, new = (dict(_flat(OmegaConf.to_container(each, resolve=resolve), "")) for each in (then, now))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _flat(plain: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(plain, dict):
        yield prefix.rstrip("."), plain
        return
    for name, value in plain.items():
        yield from _flat(value, f"{prefix}{name}.")
