"""Short names of metrics, and limits on them: from what a person types to names of ``result.json``."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sparse_exp.errors import ConfigError, expected
from sparse_exp.metrics.pareto import words_of

# Where a short name fits several metrics, those that have the first of these parts are meant, of them those
# that have the second, and so on: the validation split, what the run deploys, the engine that it is made for,
# one image at a time; the compressed file, and the zeros of the weights that are pruned.
PREFERRED = ("val", "sparse", "deepsparse", "b1", "prunable", "onnx_gzip_mb")
_SHOWN = 8
_LIMIT = re.compile(r"\s*(?P<name>[^<>=]+?)\s*(?P<sign><=|>=|==|=|<|>)\s*(?P<value>[^<>=\s]+)\s*")
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Limit:
    """What a run must keep.

    Args:
        metric: full name.
        sign: one of ``<= >= < > = ==``.
        value: a number.
    """

    metric: str
    sign: str
    value: float

    def keeps(self, value: float | None) -> bool:
        """Whether a value is there and within the limit."""
        return value is not None and _SIGNS[self.sign](value, self.value)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.value:g}"


def full_name(name: str, metrics: Collection[str]) -> str:
    """The metric that a name means.

    A full name means itself. Else the parts of the name (between slashes) must be parts of the metric in the
    same order (``openvino/items_per_s``), or failing that its words (between slashes and underscores;
    ``latency_p50``). Where several fit, `PREFERRED` decides, and then the shorter name.

    Args:
        name: as typed.
        metrics: full names to choose from.

    Raises:
        ConfigError: it fits none (names the nearest), or several.
    """
    if name in metrics:
        return name
    fitting: list[str] = []
    for split in (_parts_of, words_of):
        fitting = fitting or [metric for metric in sorted(metrics) if _in_order(split(name), split(metric))]
    if not fitting:
        raise ConfigError(expected("a metric", "one that the runs have", name, _nearest(name, metrics)))
    for part in PREFERRED:
        fitting = [metric for metric in fitting if part in _parts_of(metric)] or fitting
    # The name of a whole run's number is shorter than that of one of its variants.
    fewest = min(len(_parts_of(metric)) for metric in fitting)
    fitting = [metric for metric in fitting if len(_parts_of(metric)) == fewest]
    if len(fitting) > 1:
        do = f"It may be {_several(fitting)}. Name more of it."
        raise ConfigError(expected("a metric", "the name of one", name, do))
    return fitting[0]


def parse_limits(text: str, metrics: Collection[str]) -> list[Limit]:
    """Limits such as ``map50>=0.6, size<=4``.

    Args:
        text: limits between commas.
        metrics: full names to choose from; see `full_name`.

    Raises:
        ConfigError: a part is no limit, or its metric is not known.
    """
    return [_limit(part, metrics) for part in text.split(",") if part.strip()]


def _limit(text: str, metrics: Collection[str]) -> Limit:
    match = _LIMIT.fullmatch(text)
    value = _number(match["value"]) if match else None
    if match is None or value is None:
        do = "Write METRIC>=NUMBER or METRIC<=NUMBER, several between commas."
        raise ConfigError(expected("--best", "limits such as 'map50>=0.6, size<=4'", text.strip(), do))
    return Limit(full_name(match["name"], metrics), match["sign"], value)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _parts_of(name: str) -> list[str]:
    return name.split("/")


def _in_order(wanted: Sequence[str], present: Sequence[str]) -> bool:
    """Whether all that is wanted is present, in that order."""
    rest = iter(present)
    return all(word in rest for word in wanted)


def _nearest(name: str, metrics: Collection[str]) -> str:
    """The metrics, or parts of them, that are spelled most like that; else what the last parts are."""
    parts = {part for metric in metrics for part in _parts_of(metric)}
    close = difflib.get_close_matches(name, sorted({*metrics, *parts}), n=3, cutoff=0.6)
    return f"Nearest: {', '.join(close)}." if close else f"There are {_several(sorted(_ends(metrics)))}."


def _ends(metrics: Collection[str]) -> set[str]:
    return {_parts_of(metric)[-1] for metric in metrics}


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
