"""Where stores, outputs, zoo and cache are, by the same layers in every command.

The layers are the shipped defaults, ``local/default.yaml`` of ``conf``, that of ``--config-dir``, variables
of the environment, and what is typed; a later one wins. The small commands read them here. Experiments give
the environment its place with `apply_environment`, once Hydra has composed the others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparse_exp.bounded_yaml import sentence_of
from sparse_exp.config.plain import CONF_DIRECTORY, group
from sparse_exp.config.schema import Experiment, TrackerConfig
from sparse_exp.errors import ConfigError, expected, first_line
from sparse_exp.files import expanded

SQLITE = "sqlite:///"
# Of each key that a variable of the environment sets, the variable.
VARIABLES = {
    "tracker.uri": "MLFLOW_TRACKING_URI",
    "paths.zoo": "SPARSE_EXP_ZOO",
    "paths.cache": "SPARSE_EXP_CACHE",
}
_LOCAL = Path("local", "default.yaml")


@dataclass(frozen=True)
class Places:
    """Where things are. Relative paths start at the current directory.

    Attributes:
        output: the directory of all outputs.
        mlflow: the local store, used where ``tracker`` names no server.
        zoo: the local zoo; it may not exist.
        cache: what `sparse_exp.sources.cache.cache_directory` takes.
        tracker: names the tracking server.
    """

    output: Path
    mlflow: Path
    zoo: Path
    cache: str | None
    tracker: TrackerConfig

    @property
    def runs(self) -> tuple[Path, Path]:
        """The directories below which runs and sweeps lie; they may not exist."""
        return self.output / "runs", self.output / "sweeps"


def register_schema(config_dir: str | None = None) -> None:
    """Let Hydra know the types and the bounds of all keys, and a layer that it would leave out.

    Of files of one name Hydra takes the first that it finds, those of ``conf`` before those of
    ``--config-dir``. So the ``local/default.yaml`` there is laid over that of ``conf`` as ``own``. The name
    of another shipped file is refused, as nothing would come of it.

    Args:
        config_dir: see ``--config-dir`` of Hydra.

    Raises:
        ConfigError: a file there has the name of a shipped one, or cannot be read.
    """
    from hydra.core.config_store import ConfigStore

    store, schema = ConfigStore.instance(), OmegaConf.structured(Experiment)
    # Which variables there are is for the recipe to know, whose file may be another than the option's.
    OmegaConf.set_struct(schema.recipe.variables, False)
    store.store(name="schema", node=schema)
    store.store(name="own", node=_own_layer(config_dir), package="_global_")
    # Hydra deep-copies the whole store about a hundred times for --help. It is only read from here on,
    # and what is loaded from it is copied anyway.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]


def _own_layer(config_dir: str | None) -> DictConfig:
    """What ``local/default.yaml`` of ``--config-dir`` says, where ``conf`` has such a file, too."""
    own = None if config_dir is None else expanded(config_dir)
    if own is None or not own.is_dir() or own.samefile(CONF_DIRECTORY):
        return OmegaConf.create({})
    shipped = [path.relative_to(CONF_DIRECTORY) for path in CONF_DIRECTORY.rglob("*.yaml")]
    hidden = [own / name for name in shipped if name != _LOCAL and (own / name).is_file()]
    if hidden:
        raise ConfigError(f"{hidden[0]} has the name of a shipped option, which is taken instead. Rename it.")
    file = own / _LOCAL
    if not file.is_file() or _LOCAL not in shipped:
        return OmegaConf.create({})
    try:
        layer = OmegaConf.load(file)
    except YAMLError as error:
        raise ConfigError(sentence_of(error)) from error
    return layer if isinstance(layer, DictConfig) else OmegaConf.create({})


def apply_environment(config: DictConfig, words: Sequence[str]) -> None:
    """Let variables of the environment win over what files say, but not over what was typed.

    The address of a server stays out of the configuration, and is read from the environment when it is
    used: it may hold a password.

    Args:
        config: composed, or recorded; changed in place.
        words: of the command line.
    """
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    for key, variable in VARIABLES.items():
        if os.environ.get(variable) and key not in typed:
            OmegaConf.update(config, key, os.environ[variable] if key == "paths.zoo" else None)


def add_place_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Let a command line say where things are; `chosen_places` reads it.

    Args:
        parser: of the command.
        names: of the options besides ``--config-dir``: some of uri, store, zoo and cache.
    """
    texts = {
        "uri": ("URI", "MLflow server or database (default: MLFLOW_TRACKING_URI, then tracker.uri)"),
        "store": ("DIR", "local MLflow store (default: paths.mlflow)"),
        "zoo": ("DIR", "the local zoo (default: SPARSE_EXP_ZOO, then paths.zoo)"),
        "cache": ("DIR", "downloads and data sets (default: SPARSE_EXP_CACHE, then paths.cache)"),
    }
    for name in names:
        place, text = texts[name]
        parser.add_argument(f"--{name}", metavar=place, help=text)
    parser.add_argument("--config-dir", metavar="DIR", help="configuration of your own, as for sparse_exp")


def chosen_places(options: argparse.Namespace) -> Places:
    """The places that a command line means; see `add_place_options` and `find_places`."""
    keys = {"uri": "tracker.uri", "store": "paths.mlflow", "zoo": "paths.zoo", "cache": "paths.cache"}
    given = {keys[name]: getattr(options, name, None) for name in keys}
    return find_places(options.config_dir, {key: str(value) for key, value in given.items() if value})


def find_places(config_dir: str | None = None, typed: Mapping[str, str] | None = None) -> Places:
    """Where things are.

    Args:
        config_dir: see ``--config-dir`` of Hydra.
        typed: values by key, such as ``{"paths.zoo": "zoo"}``. A store that is named (``paths.mlflow``)
            is meant, whatever server else would be.

    Raises:
        ConfigError: the configuration cannot be composed.
    """
    typed = dict(typed or {})
    if "paths.mlflow" in typed and "tracker.uri" not in typed:
        typed["tracker.uri"] = f"{SQLITE}{expanded(typed['paths.mlflow']).absolute() / 'mlflow.db'}"
    config = _composed(config_dir)
    for key, value in typed.items():
        OmegaConf.update(config, key, value)
    apply_environment(config, list(typed))
    paths: Any = config.paths
    output, mlflow, zoo = (expanded(place) for place in (paths.output, paths.mlflow, paths.zoo))
    cache = paths.cache or os.environ.get(VARIABLES["paths.cache"])
    return Places(output, mlflow, zoo.absolute(), cache, group(config, "tracker", TrackerConfig))


def _composed(config_dir: str | None) -> DictConfig:
    """The configuration without any words; of the shipped one alone, the two groups that are needed."""
    if config_dir is None and not (CONF_DIRECTORY / _LOCAL).is_file():
        parts = {"paths": "paths/default.yaml", "tracker": "tracker/mlflow.yaml"}
        return OmegaConf.create({name: OmegaConf.load(CONF_DIRECTORY / file) for name, file in parts.items()})
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    own = None if config_dir is None else expanded(config_dir).absolute()
    if own is not None and not own.is_dir():
        raise ConfigError(expected("--config-dir", "a directory", config_dir, "Correct the path."))
    register_schema(config_dir)
    try:
        with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
            return compose("config", [] if own is None else [f"hydra.searchpath=['file://{own}']"])
    except YAMLError as error:
        raise ConfigError(sentence_of(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        reason, do = first_line(error).rstrip("."), "Correct it; python -m sparse_exp dry_run=true says more."
        raise ConfigError(f"The configuration cannot be read: {reason}. {do}") from error
