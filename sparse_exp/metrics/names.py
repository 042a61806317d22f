"""Short names of metrics, and limits on them: from what a person types to names of ``result.json``.

``compare --best`` and ``zoo search`` share this language. A text is a list of terms between commas or
spaces, such as ``map50>=0.6, sparsity>=70%``. A term is ``KEY OP VALUE`` with one of `SIGNS`; spaces around
OP do not count. A number may be a percentage: ``70%`` is 0.7.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_exp.errors import ConfigError, expected
from sparse_exp.metrics.pareto import words_of

# Where a short name fits several metrics, those that have the first of these parts are meant, of them those
# that have the second, and so on: the validation split, what the run deploys, the engine that it is made for,
# one image at a time; the zeros of the weights that are pruned, and the compressed file.
PREFERRED = ("val", "sparse", "deepsparse", "b1", "prunable", "onnx_gzip_mb", "checkpoint_mb")
_SHOWN = 8
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_SIGN = "==|!=|<=|>=|=|<|>"
_COMPARISON = re.compile(f"([^<>=!]+)({_SIGN})([^<>=!]+)")


@dataclass(frozen=True)
class Limit:
    """What a run must keep.

    Args:
        metric: full name.
        sign: one of `SIGNS`.
        value: a number.
    """

    metric: str
    sign: str
    value: float

    def keeps(self, value: float | None) -> bool:
        """Whether a value is there and within the limit."""
        return value is not None and SIGNS[self.sign](value, self.value)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.value:g}"


def full_name(name: str, metrics: Collection[str]) -> str:
    """The metric that a name means.

    A full name means itself. Else the parts of the name (between slashes) must be parts of the metric in the
    same order (``openvino/items_per_s``), or failing that its words (between slashes and underscores;
    ``latency_p50``). Where several fit, the shortest that begins with the name is meant (``recovery/map50``),
    then `PREFERRED` decides, and then the shorter name.

    Args:
        name: as typed.
        metrics: full names to choose from.

    Raises:
        ConfigError: it fits none (names the nearest), or several.
    """
    if name in metrics:
        return name
    fitting = metrics_like(name, metrics)
    if not fitting:
        raise ConfigError(expected("a metric", "one that the runs have", name, _nearest(name, metrics)))
    # The name of a whole run's number is shorter than that of one of its engines or variants.
    fitting = _shortest([metric for metric in fitting if metric.startswith(f"{name}/")]) or fitting
    for part in PREFERRED:
        fitting = [metric for metric in fitting if part in _parts_of(metric)] or fitting
    fitting = _shortest(fitting)
    if len(fitting) > 1:
        do = f"It may be {_several(fitting)}. Name more of it."
        raise ConfigError(expected("a metric", "the name of one", name, do))
    return fitting[0]


def metrics_like(name: str, metrics: Collection[str]) -> list[str]:
    """All metrics that a name may mean; see `full_name`."""
    for split in (_parts_of, words_of):
        fitting = [metric for metric in sorted(metrics) if _in_order(split(name), split(metric))]
        if fitting:
            return fitting
    return []


def _shortest(metrics: Sequence[str]) -> list[str]:
    fewest = min((len(_parts_of(metric)) for metric in metrics), default=0)
    return [metric for metric in metrics if len(_parts_of(metric)) == fewest]


def split_terms(text: str) -> list[str]:
    """The terms of a text, each without spaces."""
    return re.sub(rf"\s*({_SIGN})\s*", r"\1", text).replace(",", " ").split()


def read_comparison(term: str) -> tuple[str, str, str] | None:
    """Key, sign and value of a term ``KEY OP VALUE``; None where it is something else."""
    match = _COMPARISON.fullmatch(term)
    return (match[1], match[2], match[3]) if match else None


def read_number(text: str) -> float | None:
    """A number or a percentage (``70%`` is 0.7); None where it is neither."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def parse_limits(text: str, metrics: Collection[str]) -> list[Limit]:
    """Limits such as ``map50>=0.6, size<=4``.

    Args:
        text: limits between commas or spaces.
        metrics: full names to choose from; see `full_name`.

    Raises:
        ConfigError: a term is no limit, or its metric is not known.
    """
    limits = []
    for term in split_terms(text):
        name, sign, value = read_comparison(term) or ("", "", "")
        number = read_number(value)
        if number is None:
            do = "Write METRIC>=NUMBER or METRIC<=NUMBER, several between commas."
            raise ConfigError(expected("--best", "limits such as 'map50>=0.6, size<=4'", term, do))
        limits.append(Limit(full_name(name, metrics), sign, number))
    return limits


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
