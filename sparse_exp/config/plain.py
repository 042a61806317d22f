"""Configurations as plain data, and where their shipped values lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_exp.errors import ConfigError, expected, first_line

CONF_DIRECTORY = next(
    folder
    for folder in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf")
    if (folder / "config.yaml").is_file()
)


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass configuration as nested plain dicts, lists and scalars."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_dict(schema: type, plain: Mapping[str, Any]) -> Any:
    """A dataclass configuration from what `as_dict` gave, perhaps with an earlier schema.

    Args:
        schema: the dataclass.
        plain: its values; keys that it does not have are left out, missing ones keep their defaults.

    Raises:
        ConfigError: a value is of another type.
    """
    known = {key: value for key, value in plain.items() if key in get_type_hints(schema)}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), known))
    except OmegaConfBaseException as error:
        raise ConfigError(f"An earlier configuration cannot be read: {first_line(error)}.") from error


def group(config: DictConfig, name: str, schema: type) -> Any:
    """One group of a composed configuration, before the whole is checked.

    Args:
        config: what Hydra composed.
        name: of the group.
        schema: its dataclass, which is what is returned.

    Raises:
        ConfigError: a value is of another type.
    """
    plain: Any = OmegaConf.to_container(config[name])
    return from_dict(schema, plain)


def options(name: str, schema: type) -> dict[str, Any]:
    """All shipped options of a group that need no other: by name, each as its dataclass.

    Args:
        name: of the group, a folder of ``conf``.
        schema: its dataclass.

    Raises:
        ConfigError: a value is of another type.
    """
    files = sorted((CONF_DIRECTORY / name).glob("*.yaml"))
    loaded: dict[str, Any] = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files}
    return {option: from_dict(schema, plain) for option, plain in loaded.items()}


def as_yaml(config: Any) -> str:
    """A dataclass configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def recipe_path(file: str) -> Path:
    """Where a recipe lies: a path as given, or else beside the options in ``conf/recipe``."""
    given = Path(file).expanduser()
    shipped = CONF_DIRECTORY / "recipe" / file
    return given if given.is_file() or not shipped.is_file() else shipped


def out_of_bounds(node: Any, prefix: str) -> Iterator[str]:
    """What is wrong with single values of a dataclass configuration.

    Args:
        node: the dataclass.
        prefix: of its keys, such as ``"trainer."``.
    """
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from out_of_bounds(value, key + ".")
        elif value is not None:
            yield from _bound_problem(key, value, item.metadata)


def _bound_problem(key: str, value: Any, metadata: Any) -> Iterator[str]:
    choices, values = metadata.get("choices"), value if isinstance(value, list) else [value]
    if choices:
        wrong = [v for v in values if v not in choices]
        if wrong:
            yield expected(key, f"one of {', '.join(choices)}", wrong[0], f"Set {key} to one of them.")
        return
    low, high, above = (metadata.get(name) for name in ("low", "high", "above"))
    for number in values:
        within = (
            (low is None or number >= low)
            and (high is None or number <= high)
            and (above is None or number > above)
        )
        if not within:  # a value that is not a number lies in no range
            range_ = _range(low, high, above, metadata["unit"]) + (" each" if value is values else "")
            yield expected(key, range_, number, f"Change {key}.")


def _range(low: float | None, high: float | None, above: float | None, unit: str) -> str:
    start = f"above {above}" if above is not None else f"at least {low}"
    end = f" and at most {high}" if high is not None else ""
    return f"{start}{end}{' ' + unit if unit else ''}"
