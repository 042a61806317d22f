"""The times in a recipe: stretch its schedule to another length, and put two schedules behind each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from sparse_exp.recipes.language import Tagged, filled_in, modifiers_of, read_body, to_yaml

# Arguments of modifiers: points in time, and lengths of time, in epochs.
_MOMENTS = ("start_epoch", "end_epoch", "freeze_bn_stats_epoch", "disable_quantization_observer_epoch")
_SPANS = ("update_frequency", "cycle_epochs", "step_size")
_LISTS = ("milestones", "update_epochs")
_ENDLESS = (
    "QuantizationModifier",
    "SetLearningRateModifier",
    "SetParamModifier",
    "SetWeightDecayModifier",
)
"""Kinds whose ``end_epoch`` must stay open."""


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
    """Names of a recipe's stages; empty if its modifiers stand at the root.

    Args:
        text: the recipe's YAML.
    """
    return [stage for stage in _stages(text) if stage]


def staged(before: str, after: str) -> str:
    """Make two recipes stages of one, as SparseML composes recipes.

    The epochs of the second are counted from the end of the first, which is rounded up to a whole epoch. What
    never ends in the first ends there, but for what was only set.

    Args:
        before: YAML of the first, without expressions, every modifier with its ``start_epoch`` and
            ``end_epoch``. It may have stages.
        after: the same of the second.

    Returns:
        YAML of both, in stages with names of their own.
    """
    first, second = _stages(before), _stages(after)
    end = float(math.ceil(max(_last(modifier) for listed in first.values() for modifier in listed)))
    for listed in first.values():
        for modifier in listed:
            if modifier.get("end_epoch") == -1.0 and modifier.kind not in _ENDLESS:
                modifier["end_epoch"] = end
    for listed in second.values():
        for modifier in listed:
            _shift(modifier, end)
    if "" in first:
        first = {"stage_0" if "" in second else f"pre_{next(iter(second))}": first[""]}
        second = {"stage_1" if stage == "" else stage: listed for stage, listed in second.items()}
    return to_yaml(in_stages({**first, **_renamed(second, taken=list(first))}))


def in_stages(stages: Mapping[str, Sequence[Tagged]]) -> dict[str, Any]:
    """A recipe as plain data.

    Args:
        stages: modifiers by the name of their stage; "" stands for a recipe without stages.
    """
    if "" in stages:
        return {"modifiers": list(stages[""])}
    return {stage: {f"{stage}_modifiers": list(listed)} for stage, listed in stages.items()}


def _stages(text: str) -> dict[str, list[Tagged]]:
    return filled_in(read_body(text, "the recipe"), {}, "the recipe")


def _renamed(stages: Mapping[str, list[Tagged]], taken: Sequence[str]) -> dict[str, list[Tagged]]:
    """Give other names to the stages whose names are taken, or empty."""
    renamed: dict[str, list[Tagged]] = {}
    for stage, listed in stages.items():
        name, count = stage, len(taken)
        while name in ("", *taken) or name in renamed:
            count += 1
            name = f"stage_{count}"
        renamed[name] = listed
    return renamed


def _last(modifier: Tagged) -> float:
    return max(float(modifier.get("start_epoch", -1.0)), float(modifier.get("end_epoch", -1.0)))


def _shift(modifier: Tagged, by: float) -> None:
    """Let a modifier act later, in place. What had begun with the schedule still does."""
    for key in _MOMENTS:
        endless = key == "end_epoch" and modifier.get(key) == -1.0
        if isinstance(modifier.get(key), int | float) and not endless:
            modifier[key] = max(0.0, float(modifier[key])) + by
    for arguments in (modifier, modifier.get("lr_kwargs")):
        for key in _LISTS:
            if isinstance(arguments, dict) and isinstance(arguments.get(key), list):
                arguments[key] = [epoch + by for epoch in arguments[key]]


def without(text: str, kind: str) -> str:
    """A recipe without its modifiers of one kind; "" if it has no others."""
    stages = {
        stage: [modifier for modifier in listed if modifier.kind != kind]
        for stage, listed in _stages(text).items()
    }
    left = {stage: listed for stage, listed in stages.items() if listed}
    return to_yaml(in_stages(left)) if left else ""


def rescaled(text: str, time: TimeMap) -> str:
    """Map every time in every modifier of a recipe.

    Moments are mapped. Spans such as ``update_frequency`` grow by the same factor as the time in which their
    modifier acts. A decay per epoch is adjusted so that it ends at the same value. As the map rises strictly,
    what had a length has one afterwards; what becomes shorter than a step is a matter of the step.

    Args:
        text: the recipe's YAML, without expressions.
        time: the map.

    Returns:
        YAML of the new recipe.
    """
    roots = read_body(text, "the recipe")
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
    for key in _LISTS:
        if isinstance(arguments.get(key), list):
            arguments[key] = [time(epoch) for epoch in arguments[key]]


def _change(arguments: dict[str, Any], key: str, change: Callable[[float], float]) -> None:
    if isinstance(arguments.get(key), int | float):
        arguments[key] = change(float(arguments[key]))
