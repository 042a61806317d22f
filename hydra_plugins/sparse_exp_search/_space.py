"""Turn Hydra's sweep grammar into Optuna's distributions, and a point of their space into a job's words."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from sparse_exp.errors import ConfigError, expected, first_line

_DIGITS = 6  # of a float: short enough to read, and far more exact than any effect on a training


@dataclass(frozen=True)
class Space:
    """The space that a search chooses its jobs from.

    Attributes:
        words: for each key, in order, its distribution, or the fixed word of the command line.
    """

    words: Mapping[str, BaseDistribution | str]

    @cached_property
    def axes(self) -> dict[str, BaseDistribution]:
        """The distribution of each key that varies."""
        return {key: word for key, word in self.words.items() if isinstance(word, BaseDistribution)}

    @property
    def fixed(self) -> list[str]:
        """The words that all jobs have."""
        return [word for word in self.words.values() if isinstance(word, str)]

    @property
    def described(self) -> dict[str, str]:
        """The distributions as plain text, to compare with those of another start."""
        return {key: distribution_to_json(axis) for key, axis in self.axes.items()}

    @cached_property
    def size(self) -> float:
        """The number of points; infinite where an axis has no steps."""
        return math.prod(len(values) if (values := grid(axis)) else math.inf for axis in self.axes.values())

    def job_words(self, parameters: Mapping[str, Any]) -> list[str]:
        """The words of the job at a point."""
        return [
            word if isinstance(word, str) else f"{key}={as_text(parameters[key])}"
            for key, word in self.words.items()
        ]

    def key_of(self, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        """The values of a point as texts; two points with the same key would be the same job."""
        return tuple(as_text(parameters[key]) for key in self.axes)

    def another(self, seen: Collection[tuple[str, ...]], chance: random.Random) -> dict[str, Any]:
        """A random point whose key is not in ``seen``; the space must be finite, with such a point left."""
        grids = {key: grid(axis) or [] for key, axis in self.axes.items()}
        while True:  # on average as many tries as the space has points for each one left
            point = {key: chance.choice(values) for key, values in grids.items()}
            if self.key_of(point) not in seen:
                return point

    def corners(self) -> Iterator[list[str]]:
        """Yield the words of jobs that together have every choice and both ends of every number.

        The first job has the first value of each key; each of the others has one other value.
        """
        ends = {key: _ends(axis) for key, axis in self.axes.items()}
        first = {key: values[0] for key, values in ends.items()}
        yield self.job_words(first)
        for key, values in ends.items():
            yield from (self.job_words({**first, key: value}) for value in values[1:])


def parse_space(words: Sequence[str], loader: ConfigLoader) -> Space:
    """Read overrides. Where a key stands several times, the last one counts.

    Lists, ``choice(...)`` and ``glob(...)`` give a choice, ``range(...)`` numbers with a step,
    ``interval(...)`` numbers without, ``int(interval(...))`` whole numbers. With ``tag(log,...)`` numbers are
    drawn by their logarithm.

    Args:
        words: overrides in Hydra's grammar.
        loader: knows the options that a ``glob`` of a group chooses from.

    Raises:
        ConfigError: no key varies, or one that varies has no values.
        HydraException: a word is no override.
    """
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    space = Space({override.get_key_element(): _word(override) for override in overrides})
    if not space.axes:
        do = "Give some key several values, such as model=yolov5n,yolov5s 'model.sparsity=interval(0.5,0.9)'."
        raise ConfigError(f"A search needs something that varies. {do}")
    return space


def _word(override: Override) -> BaseDistribution | str:
    """The distribution of an override that varies, else its text."""
    text = override.input_line or ""
    if not override.is_sweep_override():
        return text
    try:
        return _distribution(override)
    except (ValueError, IndexError) as error:
        do = "Correct it, for example to interval(0.5,0.9), range(1,9,2) or a,b,c."
        raise ConfigError(
            expected("what varies", "numbers from low to high, or choices", text, f"{first_line(error)} {do}")
        ) from error


def _distribution(override: Override) -> BaseDistribution:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        whole = isinstance(low, int) and isinstance(high, int)
        kind = IntDistribution if whole else FloatDistribution
        return kind(low, high, log="log" in value.tags)  # type: ignore[arg-type]
    if isinstance(value, RangeSweep):
        numbers, log = sorted(value.range()), "log" in value.tags
        if all(isinstance(number, int) for number in numbers):
            return IntDistribution(numbers[0], numbers[-1], log=log, step=abs(int(value.step)))
        return FloatDistribution(numbers[0], numbers[-1], log=log, step=abs(float(value.step)))
    return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))


def grid(axis: BaseDistribution) -> list[Any] | None:
    """All values of an axis; None where it has no steps."""
    if isinstance(axis, CategoricalDistribution):
        return list(axis.choices)
    if isinstance(axis, IntDistribution):
        return list(range(axis.low, axis.high + 1, axis.step))
    assert isinstance(axis, FloatDistribution)
    if axis.step is None:
        return None
    return [axis.low + step * axis.step for step in range(round((axis.high - axis.low) / axis.step) + 1)]


def _ends(axis: BaseDistribution) -> list[Any]:
    if isinstance(axis, CategoricalDistribution):
        return list(axis.choices)
    assert isinstance(axis, IntDistribution | FloatDistribution)
    return [axis.low] if axis.single() else [axis.low, axis.high]


def as_text(value: Any) -> str:
    """A value as it is written on the command line."""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
