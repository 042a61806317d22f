"""Turn configurations into plain data and back, read the shipped options, check the bounds of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_exp.config.imgsz import STRIDE, imgsz_of, in_words, plain, sides
from sparse_exp.config.schema import AUTO
from sparse_exp.errors import ConfigError, expected, first_line
from sparse_exp.files import expanded

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
    """Make a dataclass configuration from the dict of `as_dict`, which may be that of an earlier schema.

    Args:
        schema: the dataclass.
        plain: its values; unknown keys are ignored, missing ones keep their defaults.

    Raises:
        ConfigError: a value has the wrong type.
    """
    known = {key: value for key, value in plain.items() if key in get_type_hints(schema)}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), known))
    except OmegaConfBaseException as error:
        raise ConfigError(f"An earlier configuration cannot be read: {first_line(error)}.") from error


def group(config: DictConfig, name: str, schema: type) -> Any:
    """One group of a composed configuration, before the whole is checked.

    Args:
        config: as Hydra composed it.
        name: of the group.
        schema: its dataclass.

    Returns:
        The group as its dataclass.

    Raises:
        ConfigError: a value has the wrong type.
    """
    plain: Any = OmegaConf.to_container(config[name])
    return from_dict(schema, plain)


def options(name: str, schema: type) -> dict[str, Any]:
    """Read all shipped options of a group, each as its dataclass, under their names.

    The files are read without Hydra, so that an option with a defaults list does not get its other parts.

    Args:
        name: of the group, a folder of ``conf``.
        schema: its dataclass.

    Raises:
        ConfigError: a value has the wrong type.
    """
    files = sorted((CONF_DIRECTORY / name).glob("*.yaml"))
    loaded: dict[str, Any] = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files}
    return {option: from_dict(schema, plain) for option, plain in loaded.items()}


def as_yaml(config: Any) -> str:
    """A dataclass configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def recipe_path(file: str) -> Path:
    """The path of a recipe: ``file`` itself, or the one in ``conf/recipe`` where only that exists."""
    given = expanded(file)
    shipped = CONF_DIRECTORY / "recipe" / file
    return given if given.is_file() or not shipped.is_file() else shipped


def out_of_bounds(node: Any, prefix: str) -> Iterator[str]:
    """Yield a sentence for each value of a dataclass configuration that is out of its bounds.

    Args:
        node: the dataclass.
        prefix: of its keys, for example ``"trainer."``.
    """
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from out_of_bounds(value, key + ".")
        elif value is not None or item.metadata.get("auto"):
            yield from _value_out_of_bounds(key, value, item.metadata)


def _value_out_of_bounds(key: str, value: Any, metadata: Any) -> Iterator[str]:
    if metadata.get("image_size"):
        yield from _size_out_of_bounds(key, value, metadata)
        return
    if metadata.get("auto"):
        if value == AUTO:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            yield expected(key, f"{AUTO} or a whole number", value, f"Change {key}.")
            return
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
        if not within:  # NaN is in no range
            start = f"above {above}" if above is not None else f"at least {low}"
            end = f" and at most {high}" if high is not None else ""
            unit = f" {metadata['unit']}" if metadata["unit"] else ""
            each = " each" if value is values else ""
            yield expected(key, f"{start}{end}{unit}{each}", number, f"Change {key}.")


def _size_out_of_bounds(key: str, value: Any, metadata: Any) -> Iterator[str]:
    """See `out_of_bounds`, for a size of images."""
    try:
        own = sides(imgsz_of(value))
    except ValueError:
        do = f"For example {key}=640, or {key}=[384,640]."
        yield expected(key, "a positive whole number of pixels, or [height,width]", plain(value), do)
        return
    low, high = metadata["low"], metadata["high"]
    nearest = imgsz_of([min(high, max(low, round(side / STRIDE) * STRIDE)) for side in own])
    if not all(low <= side <= high for side in own):
        each = "" if isinstance(value, int) else " each"
        bounds = f"at least {low} and at most {high} px{each}"
        yield expected(key, bounds, plain(value), f"Change {key}.")
    elif any(side % STRIDE for side in own):
        do = f"The detector's largest stride is {STRIDE}; use {key}={in_words(nearest)}."
        yield expected(key, f"a multiple of {STRIDE}", plain(value), do)
