"""A recipe as YAML: read it, set its root variables, and stretch its schedule to another length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import yaml

from sparse_exp.errors import RecipeError, first_line

# Before the front matter there may be comments: Neural Magic's files begin with their licence.
_FRONT_MATTER = re.compile(r"\A\s*(?:<!--.*?-->\s*)*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
# Arguments of modifiers: points in time, and lengths of time, in epochs.
_MOMENTS = ("start_epoch", "end_epoch", "freeze_bn_stats_epoch", "disable_quantization_observer_epoch")
_SPANS = ("update_frequency", "cycle_epochs", "step_size")


class Tagged(dict[str, Any]):
    """A modifier as plain data: its arguments, and the name of its class in ``kind``."""

    def __init__(self, kind: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.kind = kind


class _Loader(yaml.SafeLoader):
    """Reads modifiers, which have tags such as ``!EpochRangeModifier``, as `Tagged`."""


class _Dumper(yaml.SafeDumper):
    """Writes `Tagged` as modifiers with tags."""


def _construct(loader: _Loader, kind: str, node: yaml.Node) -> Tagged:
    if not isinstance(node, yaml.MappingNode):
        return Tagged(kind, {})
    return Tagged(kind, {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()})


_Loader.add_multi_constructor("!", _construct)
_Dumper.add_representer(Tagged, lambda dumper, data: dumper.represent_mapping(f"!{data.kind}", dict(data)))


def body_of(text: str) -> str:
    """The YAML in a recipe file: the front matter of a Markdown file, or the whole text."""
    text = text.lstrip("\ufeff\r\n")
    match = _FRONT_MATTER.match(text)
    return match.group(1) if match else text


def read_body(body: str, name: str) -> dict[str, Any]:
    """Read a recipe as plain data; expressions (``eval(...)``) stay texts.

    Args:
        body: the recipe's YAML, see `body_of`.
        name: the recipe's name, for messages.

    Returns:
        Its root variables, and its lists of modifiers or its stages, by name.

    Raises:
        RecipeError: it is no YAML, or holds no list of modifiers.
    """
    try:
        roots = yaml.load(body, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {first_line(error)}. Correct the file.") from error
    if not isinstance(roots, dict) or "modifiers:" not in body:
        raise RecipeError(f"{name} holds no recipe: a mapping with lists of modifiers is expected.")
    return roots


def set_anchored(body: str, variables: Mapping[str, float]) -> str:
    """Write new values of variables that have YAML anchors (``num_epochs: &num_epochs 52``) into a recipe.

    SparseML sets variables only after YAML has replaced aliases (``*num_epochs``) by the old value.

    Args:
        body: the recipe's YAML.
        variables: new values by name; those of variables without an anchor are ignored.

    Returns:
        The recipe's YAML with the new values.
    """
    for name, value in variables.items():
        anchored = re.compile(rf"^({re.escape(name)}\s*:\s*&[\w-]+[ \t]+)[^\s#]+", re.MULTILINE)
        body = anchored.sub(lambda match, value=value: f"{match[1]}{value}", body)  # type: ignore[misc]
    return body


def modifiers_of(roots: Any) -> Iterator[Tagged]:
    """All modifiers of a recipe, those inside stages included."""
    if isinstance(roots, Tagged):
        yield roots
    elif isinstance(roots, dict | list):
        for value in roots.values() if isinstance(roots, dict) else roots:
            yield from modifiers_of(value)


def to_yaml(roots: Mapping[str, Any]) -> str:
    """Write a recipe given as plain data as YAML that SparseML reads."""
    return yaml.dump(dict(roots), Dumper=_Dumper, sort_keys=False)


def check_variables(roots: Mapping[str, Any], variables: Iterable[str], name: str) -> None:
    """Refuse variables that the recipe does not have.

    Args:
        roots: the recipe, see `read_body`. Its variables are scalars at its root, or at that of a stage.
        variables: names.
        name: the recipe's name, for the message.

    Raises:
        RecipeError: names the first unknown variable, and all known ones.
    """
    levels = [roots, *(value for value in roots.values() if isinstance(value, dict))]
    known = [key for level in levels for key, value in level.items() if not isinstance(value, list | dict)]
    for variable in variables:
        if variable not in known:
            raise RecipeError(
                f"The recipe {name} has no variable {variable!r}. Its variables: {', '.join(known)}."
            )


@dataclass(frozen=True)
class TimeMap:
    """A piecewise-linear, strictly rising map from epochs of one schedule to epochs of another.

    Attributes:
        old: epochs at which the pieces begin and end in the old schedule, rising from 0.
        new: the same in the new schedule.
    """

    old: tuple[float, ...]
    new: tuple[float, ...]

    def __call__(self, epoch: float) -> float:
        """Map an epoch. Beyond the end the last piece continues; a negative one means "open" and stays."""
        if epoch < 0:
            return epoch
        piece = max(0, sum(knot <= epoch for knot in self.old[:-1]) - 1)
        first, last = self.old[piece : piece + 2]
        start, end = self.new[piece : piece + 2]
        if epoch == last:
            return end  # exactly, where the formula below would round
        return start + (epoch - first) * (end - start) / (last - first)

    def stretch(self, start: float, end: float) -> float:
        """The average factor by which time between two epochs grows.

        Args:
            start: first epoch; a negative one stands for the beginning.
            end: last epoch; one that is not after ``start`` stands for the end of the schedule.
        """
        start, end = max(0.0, start), end if end > max(0.0, start) else self.old[-1]
        return (self(end) - self(start)) / (end - start) if end > start else 1.0


def time_map(boundaries: Sequence[float], num_epochs: float) -> TimeMap:
    """Stretch or squeeze a schedule: phases keep their proportions, but each has at least one epoch.

    If there are fewer epochs than phases, all phases get the same length.

    Args:
        boundaries: epochs at which phases begin and end, strictly rising from 0.
        num_epochs: new length, more than 0.
    """
    lengths = [end - start for start, end in pairwise(boundaries)]
    if num_epochs == boundaries[-1]:
        return TimeMap(tuple(boundaries), tuple(boundaries))
    new = [0.0, *accumulate(_scaled_lengths(lengths, num_epochs))]
    return TimeMap(tuple(boundaries), (*new[:-1], num_epochs))


def _scaled_lengths(lengths: Sequence[float], total: float) -> list[float]:
    """Scale lengths to a new total, each to at least 1 where the total allows it."""
    if total <= len(lengths):
        return [total / len(lengths)] * len(lengths)
    short: set[int] = set()
    while True:
        rest = total - len(short)
        whole = sum(length for index, length in enumerate(lengths) if index not in short)
        scaled = [1.0 if i in short else length * rest / whole for i, length in enumerate(lengths)]
        below = {index for index, length in enumerate(scaled) if length < 1.0}
        if not below:
            return scaled
        short |= below


def stages_of(text: str) -> list[str]:
    """Names of a recipe's stages; empty if its modifiers stand at the root."""
    roots = yaml.load(text, Loader=_Loader)
    return [key for key, value in roots.items() if isinstance(value, dict) and any(modifiers_of(value))]


def renamed_stages(text: str, taken: Sequence[str]) -> str:
    """Rename the stages of a recipe that have a name that is taken."""
    roots, stages = yaml.load(text, Loader=_Loader), {}
    for key, value in roots.items():
        count = len(taken)
        while isinstance(value, dict) and (key in taken or key in stages):
            count += 1
            key = f"stage_{count}"
        stages[key] = value
    return to_yaml(stages)


def without(text: str, kind: str) -> str:
    """A recipe without its modifiers of one kind; "" if it has no others."""
    roots = _drop(yaml.load(text, Loader=_Loader), kind)
    return to_yaml(roots) if any(modifiers_of(roots)) else ""


def _drop(value: Any, kind: str) -> Any:
    """A part of a recipe without modifiers of a kind, and without lists and stages that this empties."""
    if isinstance(value, list):
        return [_drop(item, kind) for item in value if not (isinstance(item, Tagged) and item.kind == kind)]
    if isinstance(value, dict) and not isinstance(value, Tagged):
        changed = {key: _drop(item, kind) for key, item in value.items()}
        emptied = [key for key in changed if changed[key] in ([], {}) and value[key]]
        return {key: item for key, item in changed.items() if key not in emptied}
    return value


def rescaled(text: str, time: TimeMap) -> str:
    """Map every time in every modifier of a recipe.

    Moments are mapped. Spans such as ``update_frequency`` grow by the same factor as the time in which their
    modifier acts. A decay per epoch is adjusted so that it ends at the same value.

    Args:
        text: the recipe's YAML, without expressions.
        time: the map.

    Returns:
        YAML of the new recipe.
    """
    roots = yaml.load(text, Loader=_Loader)
    for modifier in modifiers_of(roots):
        stretch = time.stretch(modifier.get("start_epoch", -1.0), modifier.get("end_epoch", -1.0))
        _rescale(modifier, time, stretch)
        if isinstance(modifier.get("lr_kwargs"), dict):
            _rescale(modifier["lr_kwargs"], time, stretch)
            if modifier.get("lr_class") == "ExponentialLR":
                modifier["lr_kwargs"]["gamma"] **= 1.0 / stretch
    return to_yaml(roots)


def _rescale(arguments: dict[str, Any], time: TimeMap, stretch: float) -> None:
    """Map the times in a modifier's arguments in place."""
    for key in _MOMENTS:
        _change(arguments, key, time)
    for key in _SPANS:
        _change(arguments, key, lambda span: span * stretch if span > 0 else span)
    for key in ("milestones", "update_epochs"):
        if isinstance(arguments.get(key), list):
            arguments[key] = [time(epoch) for epoch in arguments[key]]


def _change(arguments: dict[str, Any], key: str, change: Callable[[float], float]) -> None:
    if isinstance(arguments.get(key), int | float):
        arguments[key] = change(float(arguments[key]))
